"""Draws grids of reconstructions, tiles and captions."""

import json
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from mae.models.mae import Reconstruction, Statistics
from mae.models.patches import patchify, unpatchify

HEADINGS = ("original", "the model sees", "the model paints")
STATISTICS: dict[Statistics, str] = {  # under norm_pix
    "original": "Brightness and contrast of a patch are not predicted: here they are those of the original",
    "visible": "Brightness and contrast of a patch are not predicted: here they are interpolated from the visible ones",
}
MIN_WIDTH = 128  # pixels: narrower images are enlarged
BORDER, GAP = 2, 12  # white pixels around each tile, and beside the three tiles of an image
LETTER, LINE, MARGIN = 13, 18, 6  # pixels: letters and lines of a caption, and space below the last one


def shown_range(images: Tensor) -> tuple[float, float]:
    """Returns the values in [0, 1] to draw black and white: 0 and 1, of 16 bits all but the outermost thousandths.

    Few images use up 16 bits: the 12 of a camera would be drawn nearly black.
    """
    if images.dtype != torch.uint16:
        return 0.0, 1.0
    low, high = np.percentile(images.cpu().numpy(), (0.1, 99.9)).tolist()
    return (low / 65535, high / 65535) if low < high else (0.0, 1.0)


def stretch(images: Tensor, shown: tuple[float, float]) -> Tensor:
    """Maps images in [0, 1] so that the values of `shown_range` become 0 and 1."""
    return (images - shown[0]) / (shown[1] - shown[0])


def reconstruction_columns(
    images: Tensor, reconstruction: Reconstruction, patch_size: int, shown: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Returns original, masked image (hidden patches in mid grey) and reconstruction of each image.

    images, reconstruction.images  [B, C, H, W] in [0, 1]
    shown                          of `stretch`
    returns                        [B, 3, C, H, W]
    """
    images, painted = stretch(images, shown), stretch(reconstruction.images.to(images), shown)
    grid = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    patches = torch.where(reconstruction.mask[..., None].bool(), 0.5, patchify(images, patch_size))
    return torch.stack([images, unpatchify(patches, patch_size, grid), painted], dim=1)


def save_grid(columns: Tensor, file: Path, lines: list[str], shown: tuple[float, float] = (0.0, 1.0)) -> None:
    """Writes three pictures per image, at least MIN_WIDTH pixels wide each, some images beside each other.

    columns  [B, 3, C, H, W]  as of `reconstruction_columns`
    lines    of the caption
    shown    of `stretch`; the file keeps it with the layout, for `read_grid`
    """
    drawn = tiles(rearrange(columns, "b k c h w -> (b k) c h w"))
    count, (height, width) = len(columns), drawn.shape[-2:]
    across = next(n for n in range(1, count + 1) if n == count or 3 * n * width >= -(-count // n) * height)
    images = F.pad(rearrange(drawn, "(b k) c h w -> b c h (k w)", k=3), (0, GAP), value=1.0)
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -count % across), value=1.0)
    picture = add_caption(rearrange(images, "(b a) c h w -> c (b h) (a w)", a=across), [*lines, ""])
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=LETTER)
    for number in range(3 * across):
        left = number * width + number // 3 * GAP + BORDER
        draw.text((left, 5 + LINE * len(lines)), HEADINGS[number % 3], fill="dimgrey", font=font)
    about = PngInfo()
    about.add_text("grid", json.dumps({"images": count, "across": across, "shown": shown}))
    picture.save(file, "PNG", pnginfo=about)


def enlargement(width: int) -> int:
    """Returns the whole factor that makes images of this width at least MIN_WIDTH wide."""
    return max(1, -(-MIN_WIDTH // width))


def tiles(images: Tensor) -> Tensor:
    """Returns images as RGB, enlarged to at least MIN_WIDTH, inside a white border.

    images   [B, C, H, W] in [0, 1]
    returns  [B, 3, h, w]
    """
    shown = images.clamp(0, 1)[:, :3].cpu()
    shown = shown.mean(1, keepdim=True).expand(-1, 3, -1, -1) if shown.shape[1] < 3 else shown
    shown = F.interpolate(shown, scale_factor=enlargement(shown.shape[-1]), mode="nearest")
    return F.pad(shown, (BORDER,) * 4, value=1.0)


def add_caption(pixels: Tensor, lines: list[str], size: int = LETTER) -> Image.Image:
    """Returns a picture [3, H, W] in [0, 1] with lines of text above it, in letters of `size` pixels."""
    picture = to_image(pixels)
    font, line = ImageFont.load_default(size=size), LINE * size // LETTER
    text_width = int(max(font.getlength(text) for text in lines)) + 8
    top = line * len(lines) + MARGIN
    whole = Image.new("RGB", (max(picture.width, text_width), picture.height + top), "white")
    draw = ImageDraw.Draw(whole)
    for number, text in enumerate(lines):
        draw.text((4, 3 + number * line), text, fill="black", font=font)
    whole.paste(picture, (0, top))
    return whole


def to_image(pixels: Tensor, shown: tuple[float, float] | None = None) -> Image.Image:
    """Returns pixels [C, H, W] with one or three channels, uint8, uint16 or in [0, 1], as an RGB image.

    shown  of `stretch`; None: of the pixels themselves
    """
    if pixels.dtype != torch.uint8:
        unit = pixels.float() / 65535 if pixels.dtype == torch.uint16 else pixels.float()
        pixels = (stretch(unit, shown or shown_range(pixels)).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").expand(-1, -1, 3).contiguous().numpy())
