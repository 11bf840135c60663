"""The scale of a model's images, and a photograph in that scale for comparing models on."""

import json
from pathlib import Path
from typing import Any, NamedTuple

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Scale(NamedTuple):
    """Mean and deviation per channel in units of 1, and whether the source says so or the paper's are assumed."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    known: bool


def scale_of(path: Path, recipe: dict[str, Any] | None, channels: int) -> Scale:
    """What the images of a model were normalised with.

    path    the source: a folder of another library may say it in preprocessor_config.json or config.json
    recipe  of an own checkpoint
    """
    said = recipe.get("data", {}) if recipe else _of_folder(path) if path.is_dir() else {}
    if said.get("mean") and said.get("std"):
        return Scale(tuple(said["mean"]), tuple(said["std"]), known=True)
    # Every published masked autoencoder was trained with these; further channels go through the three in turn.
    mean, std = (tuple(values[channel % 3] for channel in range(channels)) for values in IMAGENET)
    return Scale(mean, std, known=False)


def _of_folder(folder: Path) -> dict[str, Any]:
    if (file := folder / "preprocessor_config.json").is_file():
        settings = json.loads(file.read_text())
        return {"mean": settings.get("image_mean"), "std": settings.get("image_std")}
    if (file := folder / "config.json").is_file():
        return json.loads(file.read_text()).get("pretrained_cfg", {})
    return {}
