"""Prepares pictures for pages: reads grids back, lays attention over an image, writes data: URLs."""

import base64
import io
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mae.pictures.draw import BORDER, GAP, LINE, MARGIN, enlargement

Row = list[Image.Image]


class Grid(NamedTuple):
    """Pictures read back from a file of `save_grid`.

    rows   [images] original, masked, reconstruction, as large as the model saw them
    shown  values in [0, 1] that are drawn black and white
    """

    rows: list[Row]
    shown: tuple[float, float]

    def originals(self, channels: int, bits: int) -> Tensor:
        """Returns the originals as the model takes them, uint8 or uint16 [B, C, H, W]; of 16 bits 256 values remain."""
        pixels = torch.from_numpy(np.stack([np.asarray(row[0])[..., :channels] for row in self.rows]))
        pixels = rearrange(pixels, "b h w c -> b c h w")
        if bits == 8:
            return pixels
        low, high = self.shown
        return ((low + (high - low) * pixels.double() / 255) * 65535).round().to(torch.uint16)


def read_grid(file: Path, size: tuple[int, int]) -> Grid | None:
    """Cuts a file of `save_grid` into its pictures; those of earlier versions have one image per row.

    size     height and width of the images
    returns  None if the file is still being written or damaged, or holds no grid of such images
    """
    picture = read_picture(file)
    if picture is None:
        return None
    factor = enlargement(size[1])
    height, width = (side * factor + 2 * BORDER for side in size)
    rows = (picture.height - 2 * LINE - MARGIN) // height  # a caption has two lines or three
    try:
        about = json.loads(picture.info.get("grid") or json.dumps({"images": rows, "across": 1, "shown": (0, 1)}))
        count, across, shown = about["images"], about["across"], about["shown"]
        rows = -(-count // across)
    except (ValueError, LookupError, TypeError, ZeroDivisionError):
        return None
    top = picture.height - rows * height
    if picture.width < 3 * width * across or count < 1 or top < 0:
        return None

    def cell(image: int, column: int) -> Image.Image:
        left = (image % across * 3 + column) * width + image % across * GAP + BORDER
        upper = top + image // across * height + BORDER
        box = (left, upper, left + size[1] * factor, upper + size[0] * factor)
        return picture.crop(box).resize((size[1], size[0]), Image.Resampling.NEAREST)

    return Grid([[cell(image, column) for column in range(3)] for image in range(count)], (shown[0], shown[1]))


def read_picture(file: Path) -> Image.Image | None:
    """Returns a picture as RGB, None if the file is still being written or damaged."""
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises on damaged files
        return None


def overlay_attention(image: Image.Image, received: np.ndarray) -> Image.Image:
    """Returns the image in grey, enlarged, under a map [h, w] in colours from its lowest value to its highest."""
    factor = enlargement(image.width)
    shown = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    spanned = (received - received.min()) / max(float(np.ptp(received)), 1e-12)
    smooth = Image.fromarray((spanned * 255).astype(np.uint8)).resize(shown.size, Image.Resampling.BICUBIC)
    colours = Image.fromarray(matplotlib.colormaps["inferno"](np.asarray(smooth), bytes=True)[..., :3])
    return Image.blend(shown.convert("L").convert("RGB"), colours, 0.65)


def data_url(image: Image.Image, form: str, **settings: int) -> str:
    """Returns an image as a data: URL in a format of Pillow, with that format's settings."""
    file = io.BytesIO()
    image.save(file, form, **settings)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
