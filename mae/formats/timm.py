"""timm's plain Vision Transformer as a `.safetensors` file: its names are ours."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.formats.format import Comparison, Export, Format, refuse_other_keys
from mae.models.classifier import Classifier
from mae.models.vit import Encoder, LayerNorm


def timm_arguments(model: Encoder) -> dict[str, Any]:
    """Returns arguments of timm's VisionTransformer that give the architecture of our encoder or classifier."""
    config, pool, classes = model.config, "token" if model.config.class_token else "", 0
    if isinstance(model, Classifier):
        pool, classes = "avg" if model.pool == "patches" else "token", model.classes
    return {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "class_token": config.class_token,
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
    save_file(model.state_dict(), file, said)
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
