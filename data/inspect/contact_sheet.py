"""Contact sheet: a picture of some samples with their keys."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.errors import DataError
from data.images.arrays import channels_of
from data.images.decode import has_16_bits, verify
from data.images.pil import picture
from data.index.index import ShardIndex
from data.index.passed_over import printable
from data.order.samplers import spread

COLUMNS, SAMPLES = 8, 48
SIDE, TEXT, GAP = 160, 30, 8  # pixels of an image, of the lines below it, and between images


def draw_sheet(index: ShardIndex, path: Path, samples: int = SAMPLES, names: Sequence[str] = ()) -> None:
    """Writes a PNG of evenly spread samples, row by row, with key and class; a corrupt one is a grey square.

    Of an image with other channels the first three are shown as colours, or the first one as grey; 16 bits are shown
    from the darkest to the brightest value of the image.

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
        name = "" if number < 0 else names[number] if number < len(names) else str(number)
        written = describe(printable(index.key(sample)), name, font)
        draw.multiline_text((left, top + SIDE + 2), written, fill="black", font=font, spacing=1)
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise DataError(f"--sheet {path} cannot be written ({error.strerror}). Choose another file.") from None


def describe(key: str, name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Returns two lines as wide as an image: key and [name] of the class, or the key alone. "…" stands for what is cut.

    The end of a key tells more than its beginning, the beginning of a name more than its end.
    """

    def fits(text: str) -> bool:
        return font.getlength(text) <= SIDE

    def end(text: str) -> str:
        return next(cut for n in range(len(text)) if fits(cut := f"{'…' * (n > 0)}{text[n:]}"))

    if name:
        cuts = (f"[{name[:n]}{'…' * (n < len(name))}]" for n in range(len(name), 0, -1))
        return f"{end(key)}\n{next(cut for cut in cuts if fits(cut))}"
    if fits(key):
        return key
    second = next(key[n:] for n in range(len(key)) if fits(key[n:]))
    return f"{end(key[: -len(second)])}\n{second}"


def _thumbnail(index: ShardIndex, sample: int) -> Image.Image:
    try:
        data = index.read(sample)
        if channels_of(data) or has_16_bits(data):
            values = verify(data, None)
            values = _stretch(values[..., : 3 if values.shape[2] > 2 else 1])
            image = Image.fromarray(np.broadcast_to(values, (*values.shape[:2], 3)).copy())
        else:
            image = picture(data, "RGB", at_least=(2 * SIDE, 2 * SIDE))
    except DataError:
        return Image.new("RGB", (SIDE, SIDE), "grey")
    image.thumbnail((SIDE, SIDE))
    return image


def _stretch(values: np.ndarray) -> np.ndarray:
    """Returns uint8; of uint16 the darkest and brightest thousandth become black and white: few use up 16 bits."""
    if values.dtype == np.uint8:
        return values
    low, high = np.percentile(values, (0.1, 99.9))
    if low == high:
        low, high = 0, 65535
    return (np.clip((values - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
