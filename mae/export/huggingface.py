"""Hugging Face `ViTMAEForPreTraining` folders: config.json and model.safetensors with the names used on the hub."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mae.checkpoint import read
from mae.errors import CheckpointError

TOP = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layernorm": "norm",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
# Releases of 2026 write the decoder's blocks as decoder_encoder.layer.
LAYER = re.compile(r"(vit\.encoder\.layer|decoder\.decoder_layers|decoder\.decoder_encoder\.layer)\.(\d+)\.(.+)")
QKV = re.compile(r"attention\.attention\.(query|key|value)\.(weight|bias)")


def read_vitmae(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration (fields of MAEConfig) and weights (our names) of a ViTMAE folder.

    Raises CheckpointError when files are missing, the model is another one, or a key has no counterpart.
    """
    settings = json.loads((folder / "config.json").read_text())
    if settings.get("model_type") != "vit_mae":
        raise CheckpointError(
            f"{folder} holds a model of type {settings.get('model_type')}: only vit_mae is a masked autoencoder"
        )
    return _config(settings), _rename(read_weights(folder))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, under the names they were saved with."""
    if (file := folder / "model.safetensors").exists():
        return load_file(file)
    if (file := folder / "pytorch_model.bin").exists():
        return read(file)
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _config(settings: dict[str, Any]) -> dict[str, Any]:
    # Saved configurations leave defaults out in some releases; these are the library's.
    def get(name: str, default: Any) -> Any:
        return settings.get(name, default)

    width, decoder_width = get("hidden_size", 768), get("decoder_hidden_size", 512)
    if get("decoder_intermediate_size", 2048) != 4 * decoder_width:
        raise CheckpointError("decoder_intermediate_size is not 4 x decoder_hidden_size, which our decoder needs")
    if get("hidden_act", "gelu") != "gelu" or not get("qkv_bias", True):
        raise CheckpointError("hidden_act other than gelu, or qkv_bias=false: not the architecture of the paper")
    return {
        "image_size": get("image_size", 224),
        "patch_size": get("patch_size", 16),
        "in_channels": get("num_channels", 3),
        "width": width,
        "depth": get("num_hidden_layers", 12),
        "num_heads": get("num_attention_heads", 12),
        "mlp_ratio": get("intermediate_size", 3072) / width,
        "decoder_width": decoder_width,
        "decoder_depth": get("decoder_num_hidden_layers", 8),
        "decoder_num_heads": get("decoder_num_attention_heads", 16),
        "mask_ratio": get("mask_ratio", 0.75),
        "norm_pix": get("norm_pix_loss", False),
    }


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    unexplained = []
    for key, value in state.items():
        if match := LAYER.fullmatch(key):
            blocks = "blocks" if match[1].startswith("vit") else "decoder_blocks"
            block = f"{blocks}.{match[2]}"
            part, _, kind = match[3].rpartition(".")
            if attention := QKV.fullmatch(match[3]):
                qkv.setdefault(f"{block}.attn.qkv.{attention[2]}", {})[attention[1]] = value
            elif part in BLOCK:
                renamed[f"{block}.{BLOCK[part]}.{kind}"] = value
            else:
                unexplained.append(key)
        elif key in TOP:
            renamed[TOP[key]] = value
        elif (stem := key.rpartition("."))[0] in TOP:
            renamed[f"{TOP[stem[0]]}.{stem[2]}"] = value
        else:
            unexplained.append(key)
    if unexplained:
        raise CheckpointError(f"these keys have no counterpart in a masked autoencoder: {', '.join(unexplained)}")
    for key, parts in qkv.items():
        renamed[key] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return renamed
