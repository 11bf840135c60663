"""Pictures of a run: reconstructions, nearest neighbours, and the loss curve."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mae.models.mae import Reconstruction
from mae.models.patches import patchify, unpatchify

matplotlib.use("Agg")

TRUE_STATISTICS = "normalised pixels: hidden patches carry the mean and deviation of the true patches"
FRAMES = torch.tensor([[0.75, 0.75, 0.75], [0.12, 0.35, 0.85], [0.85, 0.2, 0.15]])  # grey, blue, red


def hide(images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Images with their hidden patches in mid grey.

    images  [B, C, H, W] in [0, 1];  mask [B, N], 1 hidden
    """
    grid = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    patches = torch.where(mask[..., None].bool(), 0.5, patchify(images, patch_size))
    return unpatchify(patches, patch_size, grid)


def reconstruction_columns(images: Tensor, reconstruction: Reconstruction, patch_size: int) -> Tensor:
    """Original, masked image and reconstruction of each.

    images, reconstruction.images  [B, C, H, W] in [0, 1]
    returns                        [B, 3, C, H, W]
    """
    masked = hide(images, reconstruction.mask, patch_size)
    return torch.stack([images, masked, reconstruction.images.to(images)], dim=1)


def reconstruction_grid(
    images: Tensor, reconstruction: Reconstruction, patch_size: int, norm_pix: bool, title: str
) -> Image.Image:
    """One row per image: original, masked, reconstruction, at least 128 pixels each.

    images, reconstruction.images  [B, C, H, W] in [0, 1]
    """
    columns = reconstruction_columns(images, reconstruction, patch_size)
    rows = rearrange(tiles(rearrange(columns, "b k c h w -> (b k) c h w")), "(b k) c h w -> c (b h) (k w)", k=3)
    caption = [title, "original | masked | reconstruction"] + ([TRUE_STATISTICS] if norm_pix else [])
    return captioned(rows, caption)


def neighbour_grid(images: Tensor, neighbours: Tensor, right: Tensor) -> Image.Image:
    """One row per image: itself, and its nearest neighbours framed in blue where they are of its class, else in red.

    images      [B, C, H, W] in [0, 1]
    neighbours  [B, k, C, H, W]
    right       [B, k] bool
    """
    shown = rearrange(torch.cat([images[:, None], neighbours], dim=1), "b k c h w -> (b k) c h w")
    own = torch.zeros(len(images), 1, dtype=torch.int64)
    frames = FRAMES[torch.cat([own, 2 - right.long()], dim=1).flatten()]
    rows = rearrange(tiles(shown, frames), "(b k) c h w -> c (b h) (k w)", b=len(images))
    return captioned(rows, ["test image | its nearest training images", "blue: the same class, red: another"])


def tiles(images: Tensor, frames: Tensor | None = None) -> Tensor:
    """Images as RGB of at least 128 pixels with a frame, white unless colours are given.

    images   [B, C, H, W] in [0, 1]
    frames   [B, 3] in [0, 1]
    returns  [B, 3, h, w]
    """
    shown = images.clamp(0, 1)[:, :3].cpu()
    shown = shown.mean(1, keepdim=True).expand(-1, 3, -1, -1) if shown.shape[1] < 3 else shown
    enlarge = max(1, -(-128 // shown.shape[-1]))
    shown = F.pad(F.interpolate(shown, scale_factor=enlarge, mode="nearest"), (2, 2, 2, 2), value=1.0)
    if frames is None:
        return shown
    framed = frames[:, :, None, None].expand(-1, -1, shown.shape[-2] + 8, shown.shape[-1] + 8).clone()
    framed[:, :, 4:-4, 4:-4] = shown
    return F.pad(framed, (2, 2, 2, 2), value=1.0)


def picture_of(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1]"""
    return Image.fromarray((rearrange(pixels, "c h w -> h w c") * 255).round().byte().numpy())


def captioned(pixels: Tensor, caption: list[str]) -> Image.Image:
    """A picture [3, H, W] in [0, 1] below some lines of text."""
    rows = picture_of(pixels)
    font = ImageFont.load_default(size=13)
    line = 18
    text_width = int(max(font.getlength(text) for text in caption)) + 8
    picture = Image.new("RGB", (max(rows.width, text_width), rows.height + line * len(caption) + 6), "white")
    draw = ImageDraw.Draw(picture)
    for number, text in enumerate(caption):
        draw.text((4, 3 + number * line), text, fill="black", font=font)
    picture.paste(rows, (0, line * len(caption) + 6))
    return picture


BORDER = 2  # pixels around each image of a reconstruction_grid


Row = list[Image.Image]


def read_grid(file: Path, size: tuple[int, int]) -> list[Row] | None:
    """[original, masked, reconstruction] per image, as the model saw them; None for a file that is not whole.

    size  height and width of the images, which `mae.pictures.reconstruction_grid` has enlarged and framed
    """
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except OSError:  # just in writing
        return None
    factor = enlargement(size[1])
    height, width = (side * factor + 2 * BORDER for side in size)
    rows = (picture.height - 30) // height  # there is a caption of two or three lines above
    top = picture.height - rows * height

    def cell(row: int, column: int) -> Image.Image:
        left, upper = column * width + BORDER, top + row * height + BORDER
        box = (left, upper, left + size[1] * factor, upper + size[0] * factor)
        return picture.crop(box).resize((size[1], size[0]), Image.Resampling.NEAREST)

    return [[cell(row, column) for column in range(3)] for row in range(rows)]


def enlargement(width: int) -> int:
    """By which images of this width are enlarged in the pictures of a run, so that single pixels can be seen."""
    return max(1, -(-128 // width))


def enlarged(image: Image.Image) -> Image.Image:
    factor = enlargement(image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def heat(image: Image.Image, received: np.ndarray) -> Image.Image:
    """An image in grey under a map [h, w] in colours, from its lowest value to its highest."""
    shown = enlarged(image)
    spanned = (received - received.min()) / max(float(np.ptp(received)), 1e-12)
    smooth = Image.fromarray((spanned * 255).astype(np.uint8)).resize(shown.size, Image.Resampling.BICUBIC)
    colours = Image.fromarray(matplotlib.colormaps["inferno"](np.asarray(smooth), bytes=True)[..., :3])
    return Image.blend(shown.convert("L").convert("RGB"), colours, 0.65)
