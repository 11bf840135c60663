"""timm's folders, laid out as on the hub: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import Tensor

from mae.errors import CheckpointError
from mae.formats.format import Comparison, Export, Format
from mae.formats.timm import timm_arguments

# timm wants the name of one of its own models; the arguments beside it decide.
ARCHITECTURES = {192: "tiny_patch16", 384: "small_patch16", 768: "base_patch16", 1024: "large_patch16"}


def read(settings: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns fields of MAEConfig, and weights. Raises CheckpointError if the model is no plain Vision Transformer."""
    if not settings["architecture"].startswith("vit_"):
        raise CheckpointError(f"this is timm's {settings['architecture']}: only plain vit_* are encoders here")
    arguments = settings.get("model_args", {})
    names = {"img_size": "image_size", "num_heads": "num_heads"}
    return {ours: arguments[theirs] for theirs, ours in names.items() if theirs in arguments}, weights


def write(export: Export, folder: Path) -> dict[str, Any]:
    model = export.encoder
    architecture = f"vit_{ARCHITECTURES.get(model.config.width, 'base_patch16')}_224"
    return write_folder(folder, architecture, timm_arguments(model), export, model.state_dict())


def write_folder(
    folder: Path, architecture: str, arguments: dict[str, Any], export: Export, state: dict[str, Tensor]
) -> dict[str, Any]:
    """Writes config.json and model.safetensors. Returns what the card says of loading them.

    architecture  the name of one of timm's models
    arguments     what replaces that model's own
    """
    config = export.model.config
    settings = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.in_channels, *config.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": export.scale.mean,
            "std": export.scale.std,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
        },
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return {"call": f'timm.create_model("local-dir:{folder.name}", pretrained=True)'}


def compare(export: Export, folder: Path, images: Tensor) -> Iterator[Comparison]:
    # timm loads strictly: its error names a key that is on one side only.
    peer: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    yield Comparison(peer.forward_features(images), export.features(images))


FORMAT = Format(
    sentence='folder for timm.create_model("local-dir:FOLDER", pretrained=True): the encoder',
    peer="timm",
    write=write,
    compare=compare,
)
