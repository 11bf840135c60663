"""Hugging Face `ViTModel` and `ViTForImageClassification` folders: the encoder or a classifier, with the settings and
names used on the hub, also for ViTMAE.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.errors import CheckpointError, ConfigError
from mae.formats.format import Comparison, Export, Format, require
from mae.formats.huggingface import load_peer, preprocessor_settings, write_folder
from mae.models.classifier import Classifier
from mae.models.config import MAEConfig

BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
QKV = ("query", "key", "value")
QUERY = "attention.attention.query"
TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
LAYERS = {"encoder.layer": "blocks"}
CLASSIFIER_TOP = {f"vit.{theirs}": ours for theirs, ours in TOP.items()} | {"classifier": "head"}
CLASSIFIER_LAYERS = {"vit.encoder.layer": "blocks"}


def write(export: Export, folder: Path) -> dict[str, Any]:
    config = export.encoder.config
    require(config, "transformers' ViTModel", "one class token")
    settings = {"architectures": ["ViTModel"], "model_type": "vit"} | encoder_settings(config)
    names, how_to_load = (TOP, LAYERS), {"class": "transformers.ViTModel", "arguments": {"add_pooling_layer": False}}
    if isinstance(export.model, Classifier):
        settings |= {"architectures": ["ViTForImageClassification"]} | class_settings(export.model)
        names, how_to_load = (CLASSIFIER_TOP, CLASSIFIER_LAYERS), {"class": "transformers.ViTForImageClassification"}
    preprocessing = preprocessor_settings(config.image_size, export.scale)
    write_folder(folder, settings, to_hub_names(export.encoder.state_dict(), *names), preprocessing)
    return how_to_load


def class_settings(model: Classifier) -> dict[str, Any]:
    """Returns the head's part of config.json. Raises ConfigError if the head has another input than transformers'."""
    if model.pool != "class_token":
        raise ConfigError(
            "transformers' ViTForImageClassification classifies the class token, and this classifier the mean of the "
            "patches, for which its architecture has no place: choose --to timm-folder, whose folders transformers' "
            "AutoModelForImageClassification reads too, or timm, facebook, onnx or pt2; or train with "
            "task.pool=class_token"
        )
    names = model.class_names or [f"LABEL_{label}" for label in range(model.classes)]
    times = Counter(names)  # two of ImageNet's classes are called crane
    names = [name if times[name] == 1 else f"{name} ({label})" for label, name in enumerate(names)]
    return {
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }


def compare(export: Export, folder: Path, images: Tensor) -> Iterator[Comparison]:
    from transformers import ViTForImageClassification, ViTModel

    if isinstance(export.model, Classifier):
        peer = load_peer(ViTForImageClassification, folder)
        yield Comparison(peer(images).logits, export.model(images))
        return
    peer = load_peer(ViTModel, folder, add_pooling_layer=False)
    yield Comparison(peer(images).last_hidden_state, export.features(images))


def encoder_settings(config: MAEConfig) -> dict[str, Any]:
    """Returns the encoder's part of config.json."""
    height, width = config.image_size
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "qkv_bias": True,
    }


def encoder_fields(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the encoder's fields of MAEConfig from config.json; what some releases leave out is their default.

    Raises CheckpointError if the encoder differs from the paper's.
    """
    if settings.get("hidden_act", "gelu") != "gelu" or not settings.get("qkv_bias", True):
        raise CheckpointError("hidden_act other than gelu, or qkv_bias=false: not the architecture of the paper")
    # The published masked autoencoders say 1e-12 in their config.json and were trained with our 1e-6.
    if settings.get("layer_norm_eps", 1e-12) > 1e-6:
        raise CheckpointError(f"layer_norm_eps={settings['layer_norm_eps']}: our encoder has 1e-6")
    width = settings.get("hidden_size", 768)
    return {
        "image_size": settings.get("image_size", 224),
        "patch_size": settings.get("patch_size", 16),
        "in_channels": settings.get("num_channels", 3),
        "width": width,
        "depth": settings.get("num_hidden_layers", 12),
        "num_heads": settings.get("num_attention_heads", 12),
        "mlp_ratio": settings.get("intermediate_size", 3072) / width,
    }


def rename(
    state: dict[str, Tensor], top: dict[str, str], layers: dict[str, str], block: dict[str, str] = BLOCK
) -> dict[str, Tensor]:
    """Returns weights under our names, queries, keys and values joined.

    top     hub name of a parameter or module -> ours
    layers  hub name of a list of blocks -> ours; of several for one list, the first is written
    block   hub name of a part of a block -> ours

    Raises CheckpointError naming every key without a counterpart.
    """
    layer = re.compile(rf"({'|'.join(map(re.escape, layers))})\.(\d+)\.(.+)\.(weight|bias)")
    renamed: dict[str, Tensor] = {}
    unexplained = []
    for key, value in state.items():
        stem, _, kind = key.rpartition(".")
        if match := layer.fullmatch(key):
            number, part = f"{layers[match[1]]}.{match[2]}", match[3]
            if part in block:
                renamed[f"{number}.{block[part]}.{match[4]}"] = value
            elif part == QUERY:
                parts = [state[key.replace("query", name)] for name in QKV if key.replace("query", name) in state]
                renamed[f"{number}.attn.qkv.{match[4]}"] = torch.cat(parts)
            elif part not in ("attention.attention.key", "attention.attention.value"):
                unexplained.append(key)
        elif key in top:
            renamed[top[key]] = value
        elif stem in top:
            renamed[f"{top[stem]}.{kind}"] = value
        else:
            unexplained.append(key)
    if unexplained:
        raise CheckpointError(f"these keys have no counterpart here: {', '.join(unexplained[:8])}")
    return renamed


def to_hub_names(
    state: dict[str, Tensor], top: dict[str, str], layers: dict[str, str], block: dict[str, str] = BLOCK
) -> dict[str, Tensor]:
    """Returns weights under the names used on the hub: the inverse of `rename`."""
    top, block = ({ours: theirs for theirs, ours in names.items()} for names in (top, block))
    lists = {ours: theirs for theirs, ours in reversed(layers.items())}
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, kind = key.rpartition(".")
        if key in top or stem in top:
            renamed[top[key] if key in top else f"{top[stem]}.{kind}"] = value
            continue
        blocks, number, part = stem.split(".", 2)
        prefix = f"{lists[blocks]}.{number}"
        if part == "attn.qkv":
            for name, third in zip(QKV, value.chunk(3), strict=True):
                renamed[f"{prefix}.attention.attention.{name}.{kind}"] = third
        else:
            renamed[f"{prefix}.{block[part]}.{kind}"] = value
    return renamed


FORMAT = Format(
    sentence="folder for transformers' ViTModel: the encoder, or a classifier of the class token",
    peer="transformers",
    write=write,
    compare=compare,
    heads=True,
)
