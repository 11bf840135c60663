"""Hugging Face `ViTMAEForPreTraining` folders: the whole autoencoder, with the names used on the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.errors import CheckpointError
from mae.formats import hf_vit
from mae.formats.format import Comparison, Export, Format, require
from mae.formats.hf_vit import QUERY, encoder_fields, encoder_settings, rename, to_hub_names
from mae.formats.huggingface import load_peer, preprocessor_settings, write_folder
from mae.models.mae import MaskedAutoencoder

TOP = {f"vit.{theirs}": ours for theirs, ours in hf_vit.TOP.items()} | {
    "decoder.decoder_embed": "decoder_embed",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
LAYERS = {
    "vit.encoder.layer": "blocks",
    "decoder.decoder_layers": "decoder_blocks",
    "decoder.decoder_encoder.layer": "decoder_blocks",  # written by releases of 2026
}


KINDS = ("vit_mae", "vit")


def read(settings: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the fields of MAEConfig that config.json of a ViTMAE or ViT says. Raises CheckpointError if there is no
    such architecture here.
    """
    fields = encoder_fields(settings)
    if not any(key.startswith("decoder.decoder_pred.") for key in weights):
        return fields
    decoder_width = settings.get("decoder_hidden_size", 512)
    if settings.get("decoder_intermediate_size", 2048) != 4 * decoder_width:
        raise CheckpointError("decoder_intermediate_size is not 4 x decoder_hidden_size, which our decoder needs")
    return fields | {
        "decoder_width": decoder_width,
        "decoder_depth": settings.get("decoder_num_hidden_layers", 8),
        "decoder_num_heads": settings.get("decoder_num_attention_heads", 16),
        "mask_ratio": settings.get("mask_ratio", 0.75),
        "norm_pix": settings.get("norm_pix_loss", False),
    }


def of_transformers(weights: dict[str, Tensor]) -> bool:
    """Returns whether weights have transformers' names of a Vision Transformer."""
    return any(key.endswith(f".{QUERY}.weight") for key in weights)


def to_our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights of ViTMAE, ViT or a classifier under our names.

    Raises CheckpointError naming every key without a counterpart.
    """
    return rename(weights, hf_vit.TOP | hf_vit.CLASSIFIER_TOP | TOP, hf_vit.LAYERS | LAYERS)


def write(export: Export, folder: Path) -> dict[str, Any]:
    config = export.encoder.config
    require(config, "transformers' ViTMAE", "one class token", "square images", "a decoder of self-attention")
    settings = {"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae"} | encoder_settings(config)
    settings |= {
        "decoder_hidden_size": config.decoder_width,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_num_heads,
        "decoder_intermediate_size": 4 * config.decoder_width,
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.norm_pix,
    }
    preprocessing = preprocessor_settings(config.image_size, export.scale)
    write_folder(folder, settings, to_hub_names(export.encoder.state_dict(), TOP, LAYERS), preprocessing)
    return {"class": "transformers.ViTMAEForPreTraining"}


def compare(export: Export, folder: Path, images: Tensor) -> Iterator[Comparison]:
    """Compares the loss, and the prediction of the hidden patches, under the same mask."""
    from transformers import ViTMAEForPreTraining

    model = export.encoder
    assert isinstance(model, MaskedAutoencoder)
    peer = load_peer(ViTMAEForPreTraining, folder)
    noise = torch.rand(1, model.config.patches, generator=torch.Generator().manual_seed(0))
    theirs, ours = peer(images, noise=noise), model(images, noise)
    yield Comparison(theirs.logits[theirs.mask.bool()], ours.pred.flatten(0, 1))
    yield Comparison(theirs.loss, ours.loss)


FORMAT = Format(
    sentence="folder for transformers' ViTMAEForPreTraining: encoder and decoder",
    peer="transformers",
    compared="loss and predictions",
    write=write,
    compare=compare,
    holds="autoencoder",
)
