"""Hugging Face `PixioModel` and `PixioBackbone` folders: the encoder, with the names used on the hub.

Source: Yang et al. 2025 (arXiv 2512.15715).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from mae.errors import ConfigError
from mae.formats import hf_vit
from mae.formats.format import Comparison, Export, Format, require
from mae.formats.hf_vit import encoder_fields, encoder_settings, rename, to_hub_names
from mae.formats.huggingface import load_peer, preprocessor_settings, write_folder

KIND = "pixio"
BLOCK = {
    "attention.output.dense": "attn.proj",
    "norm1": "norm1",
    "norm2": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
OTHER_BLOCK = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}  # of releases that name them as the published code does
FIRST = "encoder.layer.0.norm1.weight"  # an MAE's is called layernorm_before
NORM = ("layernorm.weight", "layernorm.bias")


def read(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of MAEConfig that config.json says; what it leaves out is the default of `PixioConfig`.

    Raises CheckpointError as `encoder_fields` does.
    """
    defaults = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "image_size": 256}
    settings = defaults | settings
    hidden = {"intermediate_size": int(settings["hidden_size"] * settings.get("mlp_ratio", 4))}
    return encoder_fields(settings | hidden) | {"class_tokens": settings.get("n_cls_tokens", 8)}


def of_pixio(weights: dict[str, Tensor]) -> bool:
    """Returns whether weights have the names of a Pixio on the hub."""
    return any(key.endswith(FIRST) for key in weights)


def to_our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights of a PixioModel, or of the one inside a PixioBackbone, under our names.

    Raises CheckpointError naming every key without a counterpart.
    """
    once = {key: value for key, value in weights.items() if not key.startswith(f"{KIND}.")}  # see `write`
    return rename(once, hf_vit.TOP, hf_vit.LAYERS, BLOCK | OTHER_BLOCK)


def write(export: Export, folder: Path) -> dict[str, Any]:
    config = export.encoder.config
    require(config, "transformers' PixioModel", "a class token", "square images")
    if config.mlp_ratio != int(config.mlp_ratio):
        raise ConfigError(
            f"transformers' PixioModel knows only whole numbers as mlp_ratio, and this model has {config.mlp_ratio:g}: "
            "choose another --to"
        )
    settings = {"architectures": ["PixioModel"], "model_type": KIND} | encoder_settings(config)
    del settings["intermediate_size"]
    settings |= {"mlp_ratio": int(config.mlp_ratio), "n_cls_tokens": config.class_tokens}
    weights = to_hub_names(export.encoder.state_dict(), hf_vit.TOP, hf_vit.LAYERS, BLOCK)
    # PixioBackbone has a norm of its own beside the encoder's, and takes the plain names for that one.
    weights |= {f"{KIND}.{key}": weights[key].clone() for key in NORM}
    write_folder(folder, settings, weights, preprocessor_settings(config.image_size, export.scale))
    return {"class": "transformers.PixioModel"}


def compare(export: Export, folder: Path, images: Tensor) -> Iterator[Comparison]:
    from transformers import PixioBackbone, PixioModel

    config, ours = export.encoder.config, export.features(images)
    yield Comparison(load_peer(PixioModel, folder)(images).last_hidden_state, ours)
    (maps,) = load_peer(PixioBackbone, folder)(images).feature_maps
    tokens = rearrange(ours[:, config.class_tokens :], "b (h w) d -> b d h w", h=config.grid[0])
    yield Comparison(maps, tokens, of="the backbone's last feature map")


FORMAT = Format(
    sentence="folder for transformers' PixioModel and PixioBackbone: the encoder, with one or more class tokens",
    peer="transformers",
    write=write,
    compare=compare,
)
