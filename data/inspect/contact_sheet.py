"""Contact sheet: a picture of some samples with their keys."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.errors import DataError
from data.images.arrays import channels_of
from data.images.decode import verify
from data.images.pil import picture
from data.index.index import ShardIndex
from data.index.passed_over import printable
from data.order.samplers import spread

COLUMNS, SAMPLES = 8, 48
SIDE, TEXT, GAP = 160, 30, 8  # pixels of an image, of the lines below it, and between images
LETTERS = 26  # per line


def draw_sheet(index: ShardIndex, path: Path, samples: int = SAMPLES, names: Sequence[str] = ()) -> None:
    """Writes a PNG of evenly spread samples, row by row, with key and class; a corrupt one is a grey square.

    Of an image with other channels the first three are shown as colours, or the first one as grey.

    names  of the classes by label, as far as they are known
    """
    chosen = spread(len(index), samples).tolist()
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * (SIDE + TEXT + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, sample in enumerate(chosen):
        left, top = GAP + place % columns * (SIDE + GAP), GAP + place // columns * (SIDE + TEXT + GAP)
        image = _thumbnail(index, sample)
        sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
        number = index.label(sample)
        label = f" [{names[number] if number < len(names) else number}]" if number >= 0 else ""
        lines = textwrap.wrap(printable(index.key(sample)) + label, LETTERS)
        # The end of a key tells more than its beginning.
        draw.multiline_text((left, top + SIDE + 2), "\n".join(lines[-2:]), fill="black", font=font, spacing=1)
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise DataError(f"--sheet {path} cannot be written ({error.strerror}). Choose another file.") from None


def _thumbnail(index: ShardIndex, sample: int) -> Image.Image:
    try:
        data = index.read(sample)
        if channels := channels_of(data):
            values = verify(data)[..., : 3 if channels > 2 else 1]
            image = Image.fromarray(np.broadcast_to(values, (*values.shape[:2], 3)).copy())
        else:
            image = picture(data, "RGB", at_least=(2 * SIDE, 2 * SIDE))
    except DataError:
        return Image.new("RGB", (SIDE, SIDE), "grey")
    image.thumbnail((SIDE, SIDE))
    return image
