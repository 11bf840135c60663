"""Masks over photographs, with the prompts that they answer, and the scores as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")

WIDTH = 300  # pixels of a column
COLOURS = {"truth": (255, 200, 0), "mask": (30, 120, 255)}
LABELS = {1: (0, 170, 0), 0: (220, 0, 0)}  # foreground, background
Box = Sequence[float]


def mask_over(pixels: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """uint8 [height, width, 3] with half of the colour inside the mask, and all of it along its edge."""
    inner = mask.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(mask, step, axis)
    painted = np.where(mask[..., None], (pixels // 2 + np.array(colour) // 2).astype(np.uint8), pixels)
    return np.where((mask & ~inner)[..., None], np.array(colour, np.uint8), painted)


def column(
    pixels: np.ndarray,
    mask: np.ndarray,
    colour: tuple[int, int, int],
    points: Sequence[tuple[float, float, int]] = (),
    box: Box | None = None,
) -> Image.Image:
    """A photograph [height, width, 3] with a mask, clicks (x, y, label) and a box in its pixels, WIDTH wide."""
    scale = WIDTH / pixels.shape[1]
    picture = Image.fromarray(mask_over(pixels, mask, colour)).resize((WIDTH, round(pixels.shape[0] * scale)))
    draw = ImageDraw.Draw(picture)
    if box is not None:
        draw.rectangle([edge * scale for edge in box], outline=LABELS[1], width=2)
    for x, y, label in points:
        centre = ((x + 0.5) * scale, (y + 0.5) * scale)
        draw.circle(centre, 5, fill=LABELS[label], outline="white", width=1)
    return picture


def table(titles: Sequence[str], rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Rows of pictures with a line of text below each, and a title above each column."""
    font, line = ImageFont.load_default(size=13), 18
    heights = [max(picture.height for picture, _ in row) + line + 4 for row in rows]
    whole = Image.new("RGB", ((WIDTH + 4) * len(titles), line + 4 + sum(heights)), "white")
    draw = ImageDraw.Draw(whole)
    for number, title in enumerate(titles):
        draw.text((number * (WIDTH + 4) + 4, 2), title, fill="black", font=font)
    top = line + 4
    for row, height in zip(rows, heights, strict=True):
        for number, (picture, text) in enumerate(row):
            whole.paste(picture, (number * (WIDTH + 4), top))
            draw.text((number * (WIDTH + 4) + 4, top + picture.height + 1), text, fill="black", font=font)
        top += height
    return whole


def draw_scores(file: Path, scores: dict[str, dict[str, Any]], title: str) -> None:
    """Mean IoU over the number of clicks, and by box as a dashed line, for each model."""
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
