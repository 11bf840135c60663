"""Hugging Face folders: their files, and what ViT and ViTMAE share, settings and names used on the hub."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae.errors import CheckpointError
from mae.formats.format import Scale, refuse_other_keys
from mae.models.config import MAEConfig
from mae.run.checkpoint_files import read

BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
QKV = ("query", "key", "value")


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns config.json of a folder. Raises CheckpointError if there is none or it is no JSON."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the weights of a folder, memory-mapped. Raises CheckpointError if it has none."""
    if (file := folder / "model.safetensors").exists():
        return load_file(file)
    if (file := folder / "pytorch_model.bin").exists():
        return read(file)
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def write_folder(
    folder: Path, settings: dict[str, Any], weights: dict[str, Tensor], preprocessing: dict[str, Any]
) -> None:
    """Writes config.json, model.safetensors, and preprocessor_config.json if the library can prepare the images."""
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if len(preprocessing["image_mean"]) == 3:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


def preprocessor_settings(image_size: tuple[int, int], scale: Scale) -> dict[str, Any]:
    """Returns preprocessor_config.json: resize bicubically, scale to [0, 1], normalise by mean and deviation."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image_size[0], "width": image_size[1]},
        "resample": 3,  # PIL's bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(scale.mean),
        "image_std": list(scale.std),
    }


def load_peer(peer: Any, folder: Path, **arguments: Any) -> Any:
    """Loads a model of the class `peer` of transformers from a folder, in evaluation mode.

    Raises CheckpointError if a key is on one side only.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = peer.from_pretrained(folder, output_loading_info=True, **arguments)
    refuse_other_keys("transformers", info["missing_keys"], info["unexpected_keys"])
    return model.eval()


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


def to_our_names(state: dict[str, Tensor], top: dict[str, str], layers: dict[str, str]) -> dict[str, Tensor]:
    """Returns weights under our names, queries, keys and values joined.

    top     hub name of a parameter or module -> ours
    layers  hub name of a list of blocks -> ours; of several for one list, the first is written

    Raises CheckpointError naming every key without a counterpart.
    """
    layer = re.compile(rf"({'|'.join(map(re.escape, layers))})\.(\d+)\.(.+)\.(weight|bias)")
    renamed: dict[str, Tensor] = {}
    unexplained = []
    for key, value in state.items():
        stem, _, kind = key.rpartition(".")
        if match := layer.fullmatch(key):
            block, part = f"{layers[match[1]]}.{match[2]}", match[3]
            if part in BLOCK:
                renamed[f"{block}.{BLOCK[part]}.{match[4]}"] = value
            elif part == "attention.attention.query":
                parts = [state[key.replace("query", name)] for name in QKV if key.replace("query", name) in state]
                renamed[f"{block}.attn.qkv.{match[4]}"] = torch.cat(parts)
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


def to_hub_names(state: dict[str, Tensor], top: dict[str, str], layers: dict[str, str]) -> dict[str, Tensor]:
    """Returns weights under the names used on the hub: the inverse of `to_our_names`."""
    top, block = ({ours: theirs for theirs, ours in names.items()} for names in (top, BLOCK))
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
