"""Hugging Face `SamModel` and `SamVisionModel` folders: the image encoder under the names used on the hub."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from mae.errors import CheckpointError
from mae.export.huggingface import read_weights

PREFIX = "vision_encoder."
OTHER_PARTS = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.")
# Theirs, ours: parts of a key between dots, replaced from left to right.
NAMES = {
    "layers.": "blocks.",
    "patch_embed.projection.": "patch_embed.proj.",
    "neck.conv1.": "neck.0.",
    "neck.layer_norm1.": "neck.1.",
    "neck.conv2.": "neck.2.",
    "neck.layer_norm2.": "neck.3.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
}
SETTINGS = {
    "image_size": ("image_size", 1024),
    "patch_size": ("patch_size", 16),
    "num_channels": ("in_channels", 3),
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("depth", 12),
    "num_attention_heads": ("num_heads", 12),
    "window_size": ("window", 14),
    "global_attn_indexes": ("global_blocks", (2, 5, 8, 11)),
    "output_channels": ("out_channels", 256),
}
# What our encoder is; the library can also do without.
FIXED = {"use_rel_pos": True, "use_abs_pos": True, "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": 1e-6}


def read_sam(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration (fields of SamConfig) and weights (our names) of a SamModel or SamVisionModel folder.

    Raises CheckpointError when files are missing, the model is another one, or a key has no counterpart.
    """
    settings = json.loads((folder / "config.json").read_text())
    kind = settings.get("model_type")
    if kind not in ("sam", "sam_vision_model"):
        raise CheckpointError(f"this is a model of type {kind}: only sam and sam_vision_model have a SAM encoder")
    vision = settings.get("vision_config", settings)
    for name, value in FIXED.items():
        if vision.get(name, value) != value:
            raise CheckpointError(f"{name}={vision[name]} where a SAM-style encoder has {value}")
    # Saved configurations leave defaults out in some releases; these are the library's.
    fields = {ours: vision.get(theirs, default) for theirs, (ours, default) in SETTINGS.items()}
    hidden = vision.get("mlp_dim")
    fields["mlp_ratio"] = hidden / fields["width"] if hidden else vision.get("mlp_ratio", 4.0)
    state = read_weights(folder)
    unknown = [key for key in state if not key.startswith((PREFIX, *OTHER_PARTS))]
    if unknown:
        raise CheckpointError(f"these keys belong to no part of a SAM: {', '.join(unknown[:8])}")
    return fields, {our_name(key): value for key, value in state.items() if key.startswith(PREFIX)}


def our_name(key: str) -> str:
    """vision_encoder.layers.0.layer_norm1.weight -> blocks.0.norm1.weight"""
    key = key.removeprefix(PREFIX)
    for theirs, ours in NAMES.items():
        key = key.replace(theirs, ours)
    return key


def their_name(key: str) -> str:
    """blocks.0.norm1.weight -> vision_encoder.layers.0.layer_norm1.weight"""
    for theirs, ours in NAMES.items():
        key = key.replace(ours, theirs)
    return PREFIX + key
