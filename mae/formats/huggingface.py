"""Hugging Face folders: their files, and their models as peers."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mae.errors import CheckpointError
from mae.formats.format import Scale, refuse_other_keys


def read_settings(file: Path) -> dict[str, Any]:
    """Returns config.json or another file of settings. Raises CheckpointError if there is none or it is no JSON."""
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} holds no settings by name, but {str(settings)[:40]}")
    return settings


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
