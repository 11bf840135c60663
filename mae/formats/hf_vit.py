"""Hugging Face `ViTModel` folders: the encoder, with the names used on the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mae.formats.format import Comparison, Export, Format, require
from mae.formats.huggingface import (
    encoder_fields,
    encoder_settings,
    load_peer,
    preprocessor_settings,
    to_hub_names,
    to_our_names,
    write_folder,
)

TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
LAYERS = {"encoder.layer": "blocks"}


def read(settings: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns fields of MAEConfig, and weights under our names. Raises CheckpointError for others, as a pooler's."""
    return encoder_fields(settings), to_our_names(weights, TOP, LAYERS)


def write(export: Export, folder: Path) -> dict[str, Any]:
    config = export.encoder.config
    require(config, "transformers' ViTModel", "a class token")
    settings = {"architectures": ["ViTModel"], "model_type": "vit"} | encoder_settings(config)
    preprocessing = preprocessor_settings(config.image_size, export.scale)
    write_folder(folder, settings, to_hub_names(export.encoder.state_dict(), TOP, LAYERS), preprocessing)
    return {"class": "transformers.ViTModel", "arguments": {"add_pooling_layer": False}}


def compare(export: Export, folder: Path, images: Tensor) -> Iterator[Comparison]:
    from transformers import ViTModel

    peer = load_peer(ViTModel, folder, add_pooling_layer=False)
    yield Comparison(peer(images).last_hidden_state, export.features(images))


FORMAT = Format(
    sentence="folder for transformers' ViTModel: the encoder",
    suffix="",
    peer="transformers",
    compared="features of all tokens",
    write=write,
    compare=compare,
)
