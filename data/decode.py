"""From the bytes of an image to a cropped and resized uint8 tensor.

Ordinary JPEGs go through libjpeg-turbo (simplejpeg); everything else (PNG, WebP, BMP, TIFF, PPM, CMYK, EXIF-rotated,
slightly damaged JPEGs) through PIL. An alpha channel is dropped, the colours below it stay as they are stored.
"""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from data.errors import DataError
from data.transforms import Box

MAX_PIXELS = 1 << 28
# PIL would warn at a third of this, and from inside Image.open: the limit is checked here, for both decoders alike.
Image.MAX_IMAGE_PIXELS = None

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation: what turns the stored image upright.
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What PIL's readers raise on damaged files.
FORMAT_ERRORS = (SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error, zlib.error)
PIL_ERRORS = (OSError, *FORMAT_ERRORS)


class Header(NamedTuple):
    """What an image says of itself."""

    form: str  # JPEG, PNG, …
    mode: str  # of PIL: L is grey, RGB, RGBA, P a palette, CMYK, I;16 …
    height: int  # of the upright image
    width: int


def read_header(data: bytes) -> Header:
    """Format, kind of pixels and size without decoding. DataError: not an image, or larger than MAX_PIXELS."""
    height, width = image_size(data)
    with _opened(data) as image:
        return Header(image.format or "", image.mode, height, width)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the upright image, from the header. DataError: not an image, or larger than MAX_PIXELS."""
    size = _jpeg_size(data)
    if size is None:
        with _opened(data) as image:
            turned = _orientation(image) >= 5
            size = (image.width, image.height) if turned else (image.height, image.width)
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"its {size[0]}x{size[1]} pixels are above the limit of {MAX_PIXELS} pixels")
    return size


def decode(data: bytes, box: Box, size: tuple[int, int], channels: int) -> Tensor:
    """The box of an image, resized with antialiased bicubic interpolation.

    box      (top, left, height, width) in the upright image
    size     (height, width) of the result
    returns  uint8 [channels, height, width], contiguous; channels is 1 (luma) or 3 (RGB)

    DataError: cannot be decoded.
    """
    top, left, height, width = box
    pixels = _pixels(data, channels)[top : top + height, left : left + width]
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    if size != (height, width):
        image = functional.interpolate(image, size, mode="bicubic", antialias=True)
    return image[0].contiguous()


def verify(data: bytes) -> np.ndarray:
    """The pixels [height, width, 3] of an image that decodes completely; DataError if it does not, or is damaged."""
    image_size(data)
    if data.startswith(b"\x89PNG"):
        with _opened(data) as image:
            try:
                image.verify()  # Its checksums, at which decoding does not look.
            except PIL_ERRORS as error:
                raise DataError(f"the PNG image is damaged ({error})") from None
    return _pixels(data, 3)


def _pixels(data: bytes, channels: int) -> np.ndarray:
    """The whole upright image, uint8 [height, width, channels], writable."""
    if _jpeg_size(data) is not None:
        try:
            return simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")
        except ValueError:
            pass  # Strict about harmless damage too, such as stray bytes between markers: PIL is the judge of that.
    pixels = np.array(picture(data, mode="L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def picture(data: bytes, mode: str | None = None, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The whole upright image by PIL.

    mode      "L" or "RGB"; None keeps grey images grey and makes all others RGB
    at_least  (width, height) of the upright image that suffice: a large JPEG is then decoded at 1/2, 1/4 or 1/8

    DataError: cannot be decoded.
    """
    with _opened(data) as image:
        try:
            turn = _orientation(image)
            if at_least:
                width, height = at_least
                image.draft(None, (height, width) if turn >= 5 else (width, height))
            profile = image.info.get("icc_profile") if image.mode in ("L", "RGB") else None
            image.load()
            upright = image.transpose(UPRIGHT[turn]) if turn > 1 else image
            grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
            pixels = _eight_bit(upright).convert(mode or ("L" if grey else "RGB"))
        except PIL_ERRORS as error:
            raise DataError(f"the {image.format} image cannot be decoded ({error})") from None
    pixels.info = {"icc_profile": profile} if profile else {}
    return pixels


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that simplejpeg decodes as it is: grey or three-component and upright; else None."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours in ("CMYK", "YCCK"):
        return None
    # PIL's parsing costs a twentieth of a small image, so that it is asked only where there is an EXIF block.
    if data.find(b"Exif\0\0", 0, 1 << 17) >= 0:
        with _opened(data) as image:
            if _orientation(image) > 1:
                return None
    return int(height), int(width)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image by PIL, closed at the end. What PIL only warns of, such as a broken EXIF block, does not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except PIL_ERRORS as error:
            reason = "are no image of a known format" if "identify" in str(error) else f"are damaged ({error})"
            raise DataError(f"its {len(data)} bytes {reason}") from None
        with image:
            yield image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 … 8; 1 where there is none or it makes no sense."""
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    except PIL_ERRORS:
        return 1
    return turn if turn in UPRIGHT else 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits (65535 → 255), which PIL's own `convert` would clip; other images unchanged."""
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # Or `convert("RGB")` would warn.
    if not image.mode.startswith("I"):
        return image
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
