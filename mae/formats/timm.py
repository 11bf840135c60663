"""timm's plain Vision Transformer as a `.safetensors` file: its names are ours."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.errors import ConfigError
from mae.formats.format import Comparison, Export, Format, refuse_other_keys
from mae.models.classifier import Classifier
from mae.models.vit import Encoder, LayerNorm


def timm_state(model: Encoder) -> dict[str, Tensor]:
    """Returns the weights under timm's names: of several class tokens, all but the first are its register tokens."""
    state = model.state_dict()
    if model.config.class_tokens > 1:
        state["cls_token"], state["reg_token"] = (
            one.contiguous() for one in state["cls_token"].tensor_split([1], dim=1)
        )
    return state


def join_class_tokens(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights with timm's register tokens as further class tokens: the inverse of `timm_state`.

    They are such only where they have positions of their own, which timm calls no_embed_class=False.
    """
    joined = torch.cat([weights["cls_token"], weights["reg_token"]], dim=1)
    return {key: value for key, value in weights.items() if key != "reg_token"} | {"cls_token": joined}


def timm_arguments(model: Encoder) -> dict[str, Any]:
    """Returns arguments of timm's VisionTransformer that give the architecture of our encoder or classifier.

    Raises ConfigError for a classifier of the mean of several class tokens, which timm does not pool.
    """
    config, classes = model.config, 0
    pool = "token" if config.class_tokens == 1 else ""  # timm would take the first of several
    if isinstance(model, Classifier):
        if model.pool == "class_token" and config.class_tokens > 1:
            raise ConfigError(
                f"timm has no place for a classifier of the mean of {config.class_tokens} class tokens: choose "
                "--to onnx or pt2, or train with task.pool=patches"
            )
        pool, classes = "avg" if model.pool == "patches" else "token", model.classes
    return {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "class_token": config.class_tokens > 0,
        "reg_tokens": max(0, config.class_tokens - 1),
        "global_pool": pool,
        "num_classes": classes,
    }


def write(export: Export, file: Path) -> dict[str, Any]:
    model = export.encoder
    said = {"format": "pt", "config": model.config.model_dump_json()}
    if isinstance(model, Classifier) and model.class_names:
        said["label_names"] = json.dumps(model.class_names)
    if export.weights:
        said["weights"] = json.dumps(export.weights)
    save_file(timm_state(model), file, said)
    return {"class": "timm.models.vision_transformer.VisionTransformer", "arguments": timm_arguments(model)}


def compare(export: Export, file: Path, images: Tensor) -> Iterator[Comparison]:
    yield from compare_with_timm(export.encoder, load_file(file), images)


def compare_with_timm(model: Encoder, state: dict[str, Tensor], images: Tensor) -> Iterator[Comparison]:
    """Compares features, and the scores of a classifier, of timm's model with the weights `state` and of `model`."""
    with torch.device("meta"):
        peer = VisionTransformer(**timm_arguments(model), norm_layer=LayerNorm).eval()
    problems = peer.load_state_dict(state, strict=False, assign=True)
    refuse_other_keys("timm", problems.missing_keys, problems.unexpected_keys)
    if isinstance(model, Classifier):
        yield Comparison(peer(images), model(images))
    yield Comparison(peer.forward_features(images), model.encode(images))


FORMAT = Format(
    sentence="safetensors for timm's VisionTransformer: the encoder, or a classifier",
    suffix=".safetensors",
    peer="timm",
    write=write,
    compare=compare,
    heads=True,
)
