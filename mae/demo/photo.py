"""Photographs: reading files of any mode, and fitting them to the input of an autoencoder or a SAM."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, PngImagePlugin
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.sam.square_frame import Size, size_in_frame

# By default Pillow refuses a PNG with a text of 1 MB, such as the workflow that image generators add.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28
BITS, PLANES, NUMBER = 258, 284, 339  # tags of a TIFF
NUMBERS = {2: "signed numbers", 3: "real numbers"}  # by NUMBER


def read_photograph(path: Path, bits: int = 8) -> Image.Image:
    """Reads a photograph and turns it upright.

    bits  of the values that the model was trained on, 8 or 16

    Raises ConfigError if the file is no image, is damaged, holds numbers whose scale is unknown (real, signed, or of
    more than 16 bits), or colours of 16 bits, of which Pillow reads 8, for a model that was trained on 16.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of broken EXIF blocks and large sizes, which do no harm
            with Image.open(path) as opened:
                held, cut = _other_numbers(opened), bits == 16 and _has_16_bit_colours(opened)
                opened.load()
                image = ImageOps.exif_transpose(opened)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = "no known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ConfigError(f"{path.name} cannot be read as an image ({reason}). Choose another file") from error
    if held:
        raise ConfigError(f"{path.name} holds {held}, not a photograph. Save it with 8 or 16 bits per channel")
    if cut:
        raise ConfigError(
            f"{path.name} holds colours of 16 bits, of which 8 would be read; the model was trained on all. Use grey"
        )
    return image


def _other_numbers(image: Image.Image) -> str:
    """Returns what an image holds if it is not whole numbers of at most 16 bits that Pillow reads; "" otherwise."""
    if not isinstance(image, TiffImageFile):
        return "real numbers" if image.mode == "F" else ""
    number, bits = image.tag_v2.get(NUMBER, (1,))[0], max(image.tag_v2.get(BITS, (1,)))
    if number in NUMBERS or bits not in (1, 2, 4, 8, 16):
        return NUMBERS.get(number, f"{bits} bits per channel")
    # Pillow takes them for planes of 8 bits.
    return "16-bit channels in planes" if bits == 16 and image.tag_v2.get(PLANES) == 2 and image.mode != "I;16" else ""


def _has_16_bit_colours(image: ImageFile) -> bool:
    """Returns whether an image has colours of 16 bits: by the layout of its values, or the largest of a PPM."""
    tiles: Any = image.tile
    return not image.mode.startswith("I") and any(
        ";16" in str(tile.args) or (tile.codec_name.startswith("ppm") and tile.args[-1] > 255) for tile in tiles
    )


def fit_to_model(image: Image.Image, config: MAEConfig, bits: int = 8) -> Tensor:
    """Returns the largest centre crop of the model's shape, resized to its input: uint8 [1, C, H, W].

    bits  16, of a model that was trained with them: grey of 16 bits becomes uint16

    Drops an alpha channel, as in training.
    """
    height, width = config.image_size
    if image.mode.startswith("I") and bits == 16:
        values = np.clip(np.asarray(image), 0, 65535)
        fitted = ImageOps.fit(Image.fromarray(values.astype(np.float32)), (width, height), Image.Resampling.BICUBIC)
        grey = np.clip(np.array(fitted).round(), 0, 65535).astype(np.uint16)
        return torch.from_numpy(np.repeat(grey[None, None], config.in_channels, axis=1))
    image = to_colours(image, "L" if config.in_channels == 1 else "RGB")
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return rearrange(torch.from_numpy(np.array(image)), "h w ... -> 1 (...) h w", h=height, w=width)


def fit_to_frame(image: Image.Image, side: int) -> tuple[Tensor, Size]:
    """Lays an RGB photograph top left into SAM's square frame, its longer side filling it, as in training.

    returns  uint8 [1, 3, side, side], zero outside the photograph, and its height and width in the frame
    """
    height, width = size_in_frame((image.height, image.width), side)
    frame = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    resized = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    frame[0, :, :height, :width] = rearrange(torch.from_numpy(resized), "h w c -> c h w")
    return frame, (height, width)


def to_colours(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Returns an image of 8 bits per channel as RGB or grey (L), without an alpha channel."""
    if image.mode.startswith("I"):  # `convert` would clip 16 bits
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) / 257).round().astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
