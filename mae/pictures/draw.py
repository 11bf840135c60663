"""Draws grids of reconstructions, tiles and captions."""

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mae.models.mae import Reconstruction
from mae.models.patches import patchify, unpatchify

TRUE_STATISTICS = "brightness and contrast of hidden patches: from the original"
MIN_WIDTH = 128  # pixels: narrower images are enlarged
BORDER = 2  # white pixels around each tile
LINE, MARGIN = 18, 6  # pixels: height of a line of a caption, and space below the last one


def reconstruction_columns(images: Tensor, reconstruction: Reconstruction, patch_size: int) -> Tensor:
    """Returns original, masked image (hidden patches in mid grey) and reconstruction of each image.

    images, reconstruction.images  [B, C, H, W] in [0, 1]
    returns                        [B, 3, C, H, W]
    """
    grid = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    patches = torch.where(reconstruction.mask[..., None].bool(), 0.5, patchify(images, patch_size))
    return torch.stack([images, unpatchify(patches, patch_size, grid), reconstruction.images.to(images)], dim=1)


def reconstruction_grid(
    images: Tensor, reconstruction: Reconstruction, patch_size: int, norm_pix: bool, title: str
) -> Image.Image:
    """Draws one row per image: original, masked, reconstruction, at least MIN_WIDTH pixels wide each.

    images, reconstruction.images  [B, C, H, W] in [0, 1]
    """
    columns = reconstruction_columns(images, reconstruction, patch_size)
    rows = rearrange(tiles(rearrange(columns, "b k c h w -> (b k) c h w")), "(b k) c h w -> c (b h) (k w)", k=3)
    return add_caption(
        rows, [title, "original | what the model sees | what it paints"] + ([TRUE_STATISTICS] if norm_pix else [])
    )


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


def add_caption(pixels: Tensor, lines: list[str]) -> Image.Image:
    """Returns a picture [3, H, W] in [0, 1] with lines of text above it."""
    picture = to_image(pixels)
    font = ImageFont.load_default(size=13)
    text_width = int(max(font.getlength(text) for text in lines)) + 8
    top = LINE * len(lines) + MARGIN
    whole = Image.new("RGB", (max(picture.width, text_width), picture.height + top), "white")
    draw = ImageDraw.Draw(whole)
    for number, text in enumerate(lines):
        draw.text((4, 3 + number * LINE), text, fill="black", font=font)
    whole.paste(picture, (0, top))
    return whole


def to_image(pixels: Tensor) -> Image.Image:
    """Returns pixels [C, H, W] with one or three channels, uint8, uint16 or in [0, 1], as an RGB image."""
    if pixels.dtype == torch.uint16:
        pixels = pixels.float() / 65535
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").expand(-1, -1, 3).contiguous().numpy())
