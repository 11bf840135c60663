"""PIL: reads PNG, WebP, BMP, TIFF, PPM, and the JPEGs that jpeg.py does not.

`pixels` returns images as stored, for decode.py to turn; `picture` turns them upright itself.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from data.errors import FORMAT_ERRORS, DataError
from data.images.arrays import with_bits
from data.images.jpeg import read_orientation

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
# decode.MAX_PIXELS is the limit for all formats; PIL would warn of its own inside Image.open.
Image.MAX_IMAGE_PIXELS = None


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Opens an image within the block; ignores what PIL only warns of, such as a broken EXIF block.

    Raises DataError if it is not an image or is damaged, even if PIL notices that only within the block.
    """
    with warnings.catch_warnings(action="ignore"):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except FORMAT_ERRORS as error:
            reason = "are no image of a known format" if "identify" in str(error) else f"are damaged ({error})"
            raise DataError(f"its {len(data)} bytes {reason}") from None
        with image:
            try:
                yield image
            except FORMAT_ERRORS as error:
                raise DataError(f"the {image.format} image cannot be decoded ({error})") from None


def pixels(data: bytes, channels: int) -> np.ndarray:
    """Decodes the image as stored, [height, width, channels]: uint16 for 16-bit grey, else uint8.

    channels  1 (luma) or 3 (RGB); with any other number the channels stay as in the file
    """
    with opened(data) as image:
        image.load()
        if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip
            return np.repeat(_grey(image)[..., None], channels, axis=2)
        mode = {1: "L", 3: "RGB"}.get(channels, image.mode)
        values = np.array(_without_palette(image).convert(mode))
    return values.reshape(*values.shape[:2], -1)


def picture(data: bytes, mode: str | None = None, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decodes the whole image, upright.

    mode      "L" or "RGB"; None keeps grey images grey and converts all others to RGB
    at_least  (width, height) that suffice: a large JPEG is then decoded at 1/2, 1/4 or 1/8

    Raises DataError if it cannot be decoded.
    """
    with opened(data) as image:
        turn = read_orientation(image.getexif)
        if at_least:
            width, height = at_least
            image.draft(None, (height, width) if turn >= 5 else (width, height))
        profile = image.info.get("icc_profile") if image.mode in ("L", "RGB") else None
        image.load()
        upright = ImageOps.exif_transpose(image) if turn > 1 else image
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        if image.mode.startswith("I"):
            upright = Image.fromarray(with_bits(_grey(upright), 8))
        found = _without_palette(upright).convert(mode or ("L" if grey else "RGB"))
    found.info = {"icc_profile": profile} if profile else {}
    return found


def _grey(image: Image.Image) -> np.ndarray:
    return np.clip(np.asarray(image).astype(np.int64), 0, 65535).astype(np.uint16)


def _without_palette(image: Image.Image) -> Image.Image:
    # `convert("RGB")` would warn of the transparency.
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
