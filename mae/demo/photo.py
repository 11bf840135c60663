"""Photographs: reading files of any mode, and fitting them to a model's input."""

import warnings
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from mae.errors import ConfigError
from mae.models.config import MAEConfig


def read_photograph(path: Path) -> Image.Image:
    """Reads a photograph and turns it upright.

    Raises ConfigError if the file is no image, is damaged, or holds real numbers, whose scale is unknown.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of broken EXIF blocks and large sizes, which do no harm
            with Image.open(path) as opened:
                opened.load()
                image = ImageOps.exif_transpose(opened)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = "no known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ConfigError(f"{path.name} cannot be read as an image ({reason}). Choose another file") from error
    if image.mode == "F":
        raise ConfigError(f"{path.name} holds real numbers, not a photograph. Save it with 8 or 16 bits per channel")
    return image


def fit_to_model(image: Image.Image, config: MAEConfig) -> Tensor:
    """Returns the largest centre crop of the model's shape, resized to its input: uint8 [1, C, H, W].

    Drops an alpha channel, as in training.
    """
    if image.mode.startswith("I"):  # `convert` would clip 16 bits
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) / 257).round().astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    height, width = config.image_size
    image = ImageOps.fit(
        image.convert("L" if config.in_channels == 1 else "RGB"), (width, height), Image.Resampling.BICUBIC
    )
    return rearrange(torch.from_numpy(np.array(image)), "h w ... -> 1 (...) h w", h=height, w=width)
