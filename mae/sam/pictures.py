"""Pictures of segmentation: masks with the prompts they answer, maps over tokens, and the scores as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mae.sam.segmenter import BACKGROUND, FOREGROUND

COLUMN_WIDTH = 300  # pixels
MASK_COLOURS = {"truth": (255, 200, 0), "mask": (30, 120, 255)}
LABEL_COLOURS = {FOREGROUND: (0, 170, 0), BACKGROUND: (220, 0, 0)}
OVERLAY_STRENGTH = 0.6  # of the colours at the highest value
Box = Sequence[float]


def paint_mask(pixels: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Blends a colour into uint8 [height, width, 3] inside the mask, and draws its edge in the plain colour."""
    inner = mask.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(mask, step, axis)
    painted = np.where(mask[..., None], (pixels // 2 + np.array(colour) // 2).astype(np.uint8), pixels)
    return np.where((mask & ~inner)[..., None], np.array(colour, np.uint8), painted)


def draw_answer(
    pixels: np.ndarray,
    mask: np.ndarray,
    colour: tuple[int, int, int],
    points: Sequence[tuple[float, float, int]] = (),
    box: Box | None = None,
) -> Image.Image:
    """Draws a photograph [height, width, 3], COLUMN_WIDTH wide, with a mask, clicks (x, y, label) and a box."""
    scale = COLUMN_WIDTH / pixels.shape[1]
    size = COLUMN_WIDTH, round(pixels.shape[0] * scale)
    picture = Image.fromarray(paint_mask(pixels, mask, colour)).resize(size)
    draw = ImageDraw.Draw(picture)
    if box is not None:
        draw.rectangle([edge * scale for edge in box], outline=LABEL_COLOURS[FOREGROUND], width=2)
    for x, y, label in points:
        centre = ((x + 0.5) * scale, (y + 0.5) * scale)
        draw.circle(centre, 5, fill=LABEL_COLOURS[label], outline="white", width=1)
    return picture


def overlay(image: Tensor, levels: Tensor, span: tuple[float, float] | None = None) -> Image.Image:
    """Lays a map over an image: from no colour at the lowest value to bright colours at the highest.

    image   [3, H, W]  in [0, 1]
    levels  [h, w]     resized bilinearly to the image
    span    the lowest and the highest value; None: those of the map, cut at its 99th percentile, since a handful of
            tokens may draw most of the attention
    """
    size = image.shape[-2:]
    levels = F.interpolate(levels.float()[None, None], size, mode="bilinear", align_corners=False)[0, 0].cpu()
    low, high = span or (levels.min(), levels.flatten().kthvalue(max(1, int(levels.numel() * 0.99))).values)
    levels = ((levels - low) / max(high - low, torch.finfo(levels.dtype).tiny)).clamp(0, 1)
    colours = torch.from_numpy(matplotlib.colormaps["turbo"](levels.numpy())[..., :3]).float()
    strength = OVERLAY_STRENGTH * levels[..., None]
    picture = (1 - strength) * rearrange(image.float().cpu(), "c h w -> h w c") + strength * colours
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy())


def save_overlays(folder: Path, image: Tensor, maps: dict[str, Tensor]) -> list[Path]:
    """Writes block-00-NAME.png, … for maps [depth, h, w] of every block over an image [3, H, W] in [0, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, blocks in maps.items():
        for block, levels in enumerate(blocks):
            paths.append(folder / f"block-{block:02d}-{name}.png")
            overlay(image, levels).save(paths[-1])
    return sorted(paths)


def draw_table(titles: Sequence[str], rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Draws rows of pictures, each with a line of text below it, and a title above each column."""
    font, line = ImageFont.load_default(size=13), 18
    heights = [max(picture.height for picture, _ in row) + line + 4 for row in rows]
    whole = Image.new("RGB", ((COLUMN_WIDTH + 4) * len(titles), line + 4 + sum(heights)), "white")
    draw = ImageDraw.Draw(whole)
    for number, title in enumerate(titles):
        draw.text((number * (COLUMN_WIDTH + 4) + 4, 2), title, fill="black", font=font)
    top = line + 4
    for row, height in zip(rows, heights, strict=True):
        for number, (picture, text) in enumerate(row):
            whole.paste(picture, (number * (COLUMN_WIDTH + 4), top))
            draw.text((number * (COLUMN_WIDTH + 4) + 4, top + picture.height + 1), text, fill="black", font=font)
        top += height
    return whole


def draw_scores(file: Path, scores: dict[str, dict[str, Any]], title: str) -> None:
    """Plots mean IoU over the number of clicks, and by box as a dashed line, for each model."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, result) in enumerate(scores.items()):
        colour = f"C{number}"
        clicks = [int(count) for count in result["clicks"]]
        axes.plot(clicks, list(result["clicks"].values()), marker="o", color=colour, label=f"{name}, clicks")
        axes.axhline(result["box"], linestyle="--", linewidth=1, color=colour, label=f"{name}, box")
    axes.set(xlabel="clicks", ylabel="mean IoU", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file)
