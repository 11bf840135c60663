"""From the bytes of an image to cropped and resized tensors.

JPEGs go through libjpeg-turbo (simplejpeg), which decodes no more of them than the crops need; `.npy` and TIFF of many
channels through numpy and tifffile; everything else (PNG, WebP, BMP, TIFF, PPM, CMYK and slightly damaged JPEGs)
through PIL. Whatever the orientation in EXIF says, boxes and results are upright. An alpha channel is dropped, the
colours below it stay as they are stored.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.errors import DataError
from data.images import arrays, jpeg, pil
from data.images.crops import Box

Filter = Literal["bicubic", "bilinear"]

MAX_PIXELS = 1 << 28
TURNS = {  # What turns the stored image of an EXIF orientation upright: transpose, then flip rows, flip columns.
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
DCT_SCALES = (8, 4, 2)


class Header(NamedTuple):
    """What is known of an image before its pixels are decoded; height and width are those of the upright image."""

    height: int
    width: int
    orientation: int
    jpeg: jpeg.JPEG | None


def read_header(data: bytes, channels: int = 3) -> Header:
    """DataError: not an image, or larger than MAX_PIXELS."""
    found = jpeg.parse(data) if channels in (1, 3) else None
    if found:
        height, width, orientation = found.height, found.width, found.orientation
    elif arrays.is_array(data, channels):
        (height, width), orientation = arrays.image_size(data), 1
    else:
        with pil.opened(data) as image:
            height, width, orientation = image.height, image.width, pil.orientation(image)
    if height * width > MAX_PIXELS:
        raise DataError(f"its {height}x{width} pixels are above the limit of {MAX_PIXELS} pixels")
    if TURNS[orientation][0]:
        height, width = width, height
    return Header(height, width, orientation, found)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the upright image, from the header. DataError: not an image, or larger than MAX_PIXELS."""
    return read_header(data)[:2]


def decode(
    data: bytes,
    header: Header,
    boxes: Sequence[Box],
    size: tuple[int, int],
    channels: int = 3,
    *,
    exact: bool = True,
    bits: int = 8,
    filter: Filter = "bicubic",
) -> list[Tensor]:
    """Boxes of one image, each resized with antialiased interpolation.

    boxes    (top, left, height, width) in the upright image
    size     (height, width) of the results
    exact    False: a JPEG is decoded at 1/2, 1/4 or 1/8 as long as each box keeps twice the size of the result; its
             edges then move to multiples of 2, 4 or 8 pixels
    bits     8 or 16 of the results; 16-bit values become 8-bit ones by value / 257, and the other way round
    returns  for each box uint8 or uint16 [channels, height, width]; channels is 1 (luma), 3 (RGB), or as many as the
             file has

    DataError: cannot be decoded.
    """
    stored = [_stored(box, header) for box in boxes]
    scale = 1 if exact or header.jpeg is None else _dct_scale(stored, size, header.orientation)
    stored = [_snapped(box, scale, header) for box in stored]
    bottom = max(top + height for top, _, height, _ in stored)
    pixels, scale = _pixels(data, header, channels, bits, scale, bottom)
    crops = (
        pixels[top // scale : (top + height) // scale, left // scale : (left + width) // scale]
        for top, left, height, width in stored
    )
    return [_resized(_turned(crop, header.orientation), size, filter) for crop in crops]


def verify(data: bytes) -> np.ndarray:
    """The pixels [height, width, channels] of an image that decodes completely, as stored, uint8.

    DataError: it does not, or is damaged.
    """
    channels = arrays.channels_of(data) or 3
    header = read_header(data, channels)
    if data.startswith(b"\x89PNG"):
        pil.check_png(data)
    return _pixels(data, header, channels, bits=8, scale=1, bottom=max(header[:2]))[0]


class Kind(NamedTuple):
    """What an image is, in words."""

    form: str  # JPEG, PNG, …
    mode: str  # of PIL: L is grey, RGB, RGBA, P a palette, CMYK, I;16 …; of arrays the channels and their type
    height: int  # of the upright image
    width: int


def kind(data: bytes) -> Kind:
    """Format, kind of pixels and size without decoding. DataError: not an image, or larger than MAX_PIXELS."""
    if channels := arrays.channels_of(data):
        return Kind(arrays.form(data), f"{channels} channels", *read_header(data, channels)[:2])
    with pil.opened(data) as image:
        return Kind(image.format or "", image.mode, *image_size(data))


def _pixels(data: bytes, header: Header, channels: int, bits: int, scale: int, bottom: int) -> tuple[np.ndarray, int]:
    """The stored image [height, width, channels] down to the row `bottom` at least, and the scale that it is at."""
    if header.jpeg:
        try:
            pixels = jpeg.decode(data, header.jpeg, "GRAY" if channels == 1 else "RGB", bottom, scale)
        except ValueError:
            pass  # Strict about harmless damage too: PIL is the judge of that.
        else:
            return arrays.with_bits(pixels, bits), scale
    if header.jpeg is None and arrays.is_array(data, channels):
        pixels = arrays.pixels(data)
    else:
        pixels = pil.pixels(data, channels)
    if pixels.shape[2] != channels:
        raise DataError(f"it has {pixels.shape[2]} channels where model.in_channels={channels} are wanted")
    return arrays.with_bits(pixels, bits), 1


def _dct_scale(boxes: list[Box], size: tuple[int, int], orientation: int) -> int:
    """The strongest reduction that leaves twice the wanted size of each box."""
    rows, columns = size[::-1] if TURNS[orientation][0] else size
    room = min(min(height / rows, width / columns) for _, _, height, width in boxes) / 2
    return next((scale for scale in DCT_SCALES if scale <= room), 1)


def _snapped(box: Box, scale: int, header: Header) -> Box:
    """The box with its edges on multiples of `scale`: between them the reduced image has no pixels."""
    if scale == 1:
        return box
    rows, columns = (header.width, header.height) if TURNS[header.orientation][0] else (header.height, header.width)
    top, left, height, width = (round(edge / scale) for edge in box)
    height, width = min(height, rows // scale), min(width, columns // scale)
    top, left = min(top, rows // scale - height), min(left, columns // scale - width)
    return top * scale, left * scale, height * scale, width * scale


def _stored(box: Box, header: Header) -> Box:
    """The box in the image as it is stored."""
    top, left, height, width = box
    transposed, rows_flipped, columns_flipped = TURNS[header.orientation]
    if rows_flipped:
        top = header.height - top - height
    if columns_flipped:
        left = header.width - left - width
    return (left, top, width, height) if transposed else (top, left, height, width)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    transposed, rows_flipped, columns_flipped = TURNS[orientation]
    upright = pixels.transpose(1, 0, 2) if transposed else pixels
    return upright[:: -1 if rows_flipped else 1, :: -1 if columns_flipped else 1]


def _resized(pixels: np.ndarray, size: tuple[int, int], filter: Filter) -> Tensor:
    """[height, width, channels] of any size to [channels, *size], by the fixed-point arithmetic of PIL for 8 bits."""
    if pixels.shape[:2] == size:
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    if image.dtype == torch.uint8:
        return functional.interpolate(image, size, mode=filter, antialias=True)[0]
    resized = functional.interpolate(image.float(), size, mode=filter, antialias=True)
    return resized.round_().clamp_(0, 65535).to(torch.uint16)[0]
