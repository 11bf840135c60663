"""The scale of a model's images, and a photograph in that scale for comparing models on."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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


def photograph(image_size: tuple[int, int], scale: Scale) -> Tensor:
    """A portrait (NASA, public domain, from scikit-image) as a model sees it: float32 [1, C, H, W].

    Channels beyond the third repeat the colours.
    """
    from skimage.data import astronaut

    pixels = torch.from_numpy(astronaut()).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, image_size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in scale[:2])
    return (pixels[:, [channel % 3 for channel in range(mean.shape[1])]] - mean) / std
