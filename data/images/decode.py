"""Decoding: the bytes of an image → upright, cropped and resized tensors.

1 header   size and EXIF orientation, without decoding pixels         jpeg.py, arrays.py, pil.py
2 boxes    from the upright image to the stored one                   here
3 pixels   as stored, not turned, but TIFF, which comes upright:
           JPEG, only the rows of the boxes, at 1/1 to 1/8 of size    jpeg.py (libjpeg-turbo)
           `.npy`, TIFF of other channels than grey or RGB            arrays.py (numpy, tifffile)
           PNG, WebP, BMP, TIFF, PPM, CMYK or damaged JPEG            pil.py
4 turn     each crop upright, then resize it                          here

This module turns all but TIFF by the EXIF orientation (and `pil.picture`, which decodes whole images for packing and
pictures). Alpha channels are dropped; the colours below stay as stored.
"""

import contextlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.errors import DataError
from data.images import arrays, jpeg, pil
from data.images.arrays import TURNS, turn
from data.images.crops import Box

Filter = Literal["bicubic", "bilinear"]

MAX_PIXELS = 1 << 28
DCT_SCALES = (8, 4, 2)
LOST_BITS = (
    "and perhaps other images have 16 bits: data.bits=8 keeps the upper 8 of them, data.bits=16 all. "
    "`python -m data.inspect` shows the range of the values."
)


class Header(NamedTuple):
    """Header of an image; height and width are those of the upright image."""

    height: int
    width: int
    orientation: int  # EXIF, of the pixels that are decoded: 1 for TIFF
    jpeg: jpeg.JPEG | None  # if jpeg.py can decode it


def read_header(data: bytes, channels: int = 3) -> Header:
    """Reads the header. Raises DataError if it is not one of an image, or the image is larger than MAX_PIXELS."""
    found = jpeg.parse(data) if channels in (1, 3) else None
    if found:
        height, width, orientation = found.height, found.width, found.orientation
    elif arrays.is_array(data, channels):
        (height, width), orientation = arrays.image_size(data), 1
    else:
        height, width, orientation = pil.image_size(data)
    if height * width > MAX_PIXELS:
        raise DataError(f"its {height}x{width} pixels are above the limit of {MAX_PIXELS} pixels")
    if TURNS[orientation][0]:
        height, width = width, height
    return Header(height, width, orientation, found)


def image_size(data: bytes) -> tuple[int, int]:
    """Returns (height, width) of the upright image, from the header. Raises DataError as `read_header` does."""
    return read_header(data, arrays.channels_of(data) or 3)[:2]


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
    """Decodes boxes of one image and resizes each, with antialiasing.

    boxes    (top, left, height, width) in the upright image
    size     (height, width) of the results
    exact    False: decodes a JPEG at 1/2, 1/4 or 1/8 if each box then still has twice the size of the result; edges
             of boxes move to multiples of 2, 4 or 8 pixels
    bits     8 or 16 per value of the results, converted by a factor of 257
    returns  for each box uint8 or uint16 [channels, height, width]; channels is 1 (luma), 3 (RGB), or as many as the
             file has

    Raises DataError if the image cannot be decoded.
    """
    stored = [_to_stored(box, header) for box in boxes]
    scale = 1 if exact or header.jpeg is None else _dct_scale(stored, size, header.orientation)
    stored = [_snap(box, scale, header) for box in stored]
    bottom = max(top + height for top, _, height, _ in stored)
    pixels, scale = _pixels(data, header, channels, bits, scale, bottom)
    crops = (
        pixels[top // scale : (top + height) // scale, left // scale : (left + width) // scale]
        for top, left, height, width in stored
    )
    return [_resize(turn(crop, header.orientation), size, filter) for crop in crops]


def verify(data: bytes, bits: int | None = 8) -> np.ndarray:
    """Decodes a whole image, as stored, with 8, 16 or its own bits: uint8 or uint16 [height, width, channels].

    Raises DataError if it is damaged, or cannot be read for another reason.
    """
    channels = arrays.channels_of(data) or 3
    header = read_header(data, channels)
    if data.startswith(b"\x89PNG"):
        with pil.opened(data) as image:
            image.verify()  # its checksums, which decoding ignores
    return _pixels(data, header, channels, bits, scale=1, bottom=max(header[:2]))[0]


class Kind(NamedTuple):
    """Format and kind of an image, in words."""

    form: str  # JPEG, PNG, …
    mode: str  # PIL's: L (grey), RGB, RGBA, P (palette), CMYK, I;16 …; for arrays the number of channels
    height: int  # of the upright image
    width: int


def kind(data: bytes) -> Kind:
    """Returns format, mode and size from the header. Raises DataError as `read_header` does."""
    if channels := arrays.channels_of(data):
        form = "NPY" if data.startswith(arrays.NPY) else "TIFF"
        return Kind(form, f"{channels} channels", *read_header(data, channels)[:2])
    with pil.opened(data) as image:
        return Kind(image.format or "", image.mode, *image_size(data))


def has_16_bits(data: bytes) -> bool:
    """Returns whether the values of an image have 16 bits, from its header. Raises DataError as `read_header` does."""
    if data.startswith(arrays.NPY) or arrays.channels_of(data):
        return arrays.has_16_bits(data)
    with pil.opened(data) as image:
        return pil.has_16_bits(image)


def _pixels(
    data: bytes, header: Header, channels: int, bits: int | None, scale: int, bottom: int
) -> tuple[np.ndarray, int]:
    """Decodes the stored image [height, width, channels] down to row `bottom` at least; returns it and its scale."""
    if header.jpeg:
        try:
            pixels = jpeg.decode(data, header.jpeg, "GRAY" if channels == 1 else "RGB", bottom, scale)
        except ValueError:
            pass  # simplejpeg refuses harmless damage too, so let PIL decide.
        else:
            return arrays.with_bits(pixels, bits), scale
    if header.jpeg is None and arrays.is_array(data, channels):
        pixels = _array(data, channels, bits)
    else:
        pixels = pil.pixels(data, channels, bits)
    if pixels.shape[2] != channels:
        raise DataError(
            f"it has {pixels.shape[2]} channels where model.in_channels={channels} are wanted"
            f"{arrays.explain_channels(data, channels)}"
        )
    return arrays.with_bits(pixels, bits), 1


def _array(data: bytes, channels: int, bits: int | None) -> np.ndarray:
    """Decodes an image of arrays.py; by PIL where tifffile lacks a codec and PIL has the same channels."""
    try:
        return arrays.pixels(data)
    except arrays.CodecMissing:
        header = arrays.read_tiff(data)
        with contextlib.suppress(DataError):
            if header.pages == 1 and header.shape[2] == channels:
                pixels = pil.pixels(data, channels, bits)
                if pixels.shape[2] == channels:
                    return pixels
        raise


def _dct_scale(boxes: list[Box], size: tuple[int, int], orientation: int) -> int:
    """Returns the strongest reduction that leaves each box at twice the size of its result."""
    rows, columns = size[::-1] if TURNS[orientation][0] else size
    room = min(min(height / rows, width / columns) for _, _, height, width in boxes) / 2
    return next((scale for scale in DCT_SCALES if scale <= room), 1)


def _snap(box: Box, scale: int, header: Header) -> Box:
    """Moves the edges of a box to multiples of `scale`, where the reduced image has its pixels."""
    if scale == 1:
        return box
    rows, columns = (header.width, header.height) if TURNS[header.orientation][0] else (header.height, header.width)
    top, left, height, width = (round(edge / scale) for edge in box)
    height, width = min(height, rows // scale), min(width, columns // scale)
    top, left = min(top, rows // scale - height), min(left, columns // scale - width)
    return top * scale, left * scale, height * scale, width * scale


def _to_stored(box: Box, header: Header) -> Box:
    """Maps a box of the upright image to the stored image."""
    top, left, height, width = box
    transposed, rows_flipped, columns_flipped = TURNS[header.orientation]
    if rows_flipped:
        top = header.height - top - height
    if columns_flipped:
        left = header.width - left - width
    return (left, top, width, height) if transposed else (top, left, height, width)


def _resize(pixels: np.ndarray, size: tuple[int, int], filter: Filter) -> Tensor:
    """Resizes [height, width, channels] to [channels, *size], at 8 bits by the fixed-point arithmetic of PIL."""
    if pixels.shape[:2] == size:
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    if image.dtype == torch.uint8:
        return functional.interpolate(image, size, mode=filter, antialias=True)[0]
    resized = functional.interpolate(image.float(), size, mode=filter, antialias=True)
    return resized.round_().clamp_(0, 65535).to(torch.uint16)[0]
