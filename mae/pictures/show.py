"""Prepares pictures for pages: reads grids back, lays attention over an image, writes data: URLs."""

import base64
import io
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from mae.pictures.draw import BORDER, LINE, MARGIN, enlargement

Row = list[Image.Image]


def read_grid(file: Path, size: tuple[int, int]) -> list[Row] | None:
    """Cuts a `reconstruction_grid` into [original, masked, reconstruction] per image, as the model saw them.

    size     height and width of the images
    returns  None if the file is still being written or damaged, or holds no grid of such images
    """
    picture = read_picture(file)
    if picture is None:
        return None
    factor = enlargement(size[1])
    height, width = (side * factor + 2 * BORDER for side in size)
    rows = (picture.height - 2 * LINE - MARGIN) // height  # a caption has two lines or three
    if picture.width < 3 * width or rows < 1:
        return None
    top = picture.height - rows * height

    def cell(row: int, column: int) -> Image.Image:
        left, upper = column * width + BORDER, top + row * height + BORDER
        box = (left, upper, left + size[1] * factor, upper + size[0] * factor)
        return picture.crop(box).resize((size[1], size[0]), Image.Resampling.NEAREST)

    return [[cell(row, column) for column in range(3)] for row in range(rows)]


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
