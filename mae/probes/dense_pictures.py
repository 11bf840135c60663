"""Pictures of dense probes: photograph, truth, and what was predicted, beside each other."""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae.pictures.draw import LETTER, LINE, MARGIN, add_caption, tiles
from mae.probes.dense_targets import Classes

GOLDEN = 0.618034  # of a turn between the hues of neighbouring classes, so that none are alike
WIDTH = 320  # pixels of a photograph, at most
CHIP = 12  # pixels of the side of a colour in the legend


def palette(classes: Classes) -> np.ndarray:
    """Returns a colour for each class, [C, 3] in [0, 1]; void is black."""
    values = (0.95, 0.7, 0.5)
    colours = [colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.75, values[number % 3]) for number in range(classes.count)]
    if classes.void < classes.count:
        colours[classes.void] = (0.0, 0.0, 0.0)
    return np.array(colours)


def colour_classes(labels: Tensor, classes: Classes) -> Tensor:
    """Returns a map of classes in colours, void in black: [H, W] -> [3, H, W] in [0, 1]."""
    colours = torch.from_numpy(np.concatenate([palette(classes), np.zeros((1, 3))])).float()
    labels = torch.where((labels == classes.void) | (labels >= classes.count), classes.count, labels.long())
    return rearrange(colours[labels], "h w c -> c h w")


def colour_depths(depths: Tensor, low: float, high: float) -> Tensor:
    """Returns depths in colours, those between `low` and `high` metres apart, unknown ones black: [3, H, W]."""
    share = (depths.clamp(low, high).log() - math.log(low)) / max(math.log(high / low), 1e-6)
    colours = torch.from_numpy(matplotlib.colormaps["turbo"](share.numpy())[..., :3]).float()
    return rearrange(torch.where((depths > 0)[..., None], colours, 0.0), "h w c -> c h w")


def draw_predictions(
    rows: Sequence[Sequence[Tensor]], titles: Sequence[str], path: Path, legend: Classes | None
) -> Path:
    """Draws a row for each photograph: pictures [3, H, W] in [0, 1] under these titles, and the colours of the classes.

    legend  None: none
    """
    drawn = [torch.cat([tiles(_shrink(picture)[None])[0] for picture in row], dim=-1) for row in rows]
    widest = max(row.shape[-1] for row in drawn)
    padded = [torch.nn.functional.pad(row, (0, widest - row.shape[-1]), value=1.0) for row in drawn]
    picture = add_caption(torch.cat(padded, dim=-2), [f"From the left: {', '.join(titles)}"])
    (picture if legend is None else _with_legend(picture, legend)).save(path)
    return path


def _shrink(picture: Tensor) -> Tensor:
    height, width = picture.shape[-2:]
    if width <= WIDTH:
        return picture
    size = max(1, round(height * WIDTH / width)), WIDTH
    rows, columns = (
        ((torch.arange(to) + 0.5) * (of / to)).long() for to, of in zip(size, (height, width), strict=True)
    )
    return picture[:, rows[:, None], columns]


def _with_legend(picture: Image.Image, classes: Classes) -> Image.Image:
    font, colours = ImageFont.load_default(size=LETTER), palette(classes)
    places, left, line = [], MARGIN, 0
    for number in classes.scored:
        width = CHIP + 2 * MARGIN + int(font.getlength(classes.name(number))) + MARGIN
        if left + width > picture.width and left > MARGIN:
            left, line = MARGIN, line + 1
        places.append((number, left, picture.height + MARGIN + line * LINE))
        left += width
    whole = Image.new("RGB", (picture.width, picture.height + (line + 1) * LINE + 2 * MARGIN), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for number, x, y in places:
        draw.rectangle((x, y, x + CHIP, y + CHIP), fill=tuple(int(part * 255) for part in colours[number]))
        draw.text((x + CHIP + MARGIN, y - 2), classes.name(number), fill="black", font=font)
    return whole
