"""`.npy` and TIFF images with any number of channels: [H, W, C] or [H, W], uint8 or uint16.

The channels of a TIFF are the samples of its pixels, or its pages if several of one sample are alike (OME, ImageJ).
"""

import io
import math
import struct
from typing import Any, NamedTuple

import numpy as np
import tifffile

from data.errors import FORMAT_ERRORS, DataError

NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_VALUES = 1 << 31
TYPES = "uint8 and uint16 are read. Scale the values to 0 … 65535 and save them as uint16"
CHANNELS_FIRST = "looks like channels first. Save numpy.moveaxis(array, 0, -1)"
MAX_FLAT = 16  # rows; an array of no more, with twice as many columns and channels, has its channels first
MINIMAL = (0, 1)  # photometric interpretations without colours: 0 is white, 0 is black
ALPHA = ASSOCIATED, UNASSOCIATED = (1, 2)  # kinds of extra samples; by the first the colours are multiplied
REDUCED, MASK = 1, 4  # bits of the kind of a page
ORIENTATION = 0x0112
TURNS = {  # EXIF orientation: how to turn the stored image upright: transpose, then flip rows, flip columns
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class CodecMissing(DataError):
    """tifffile needs a package for the compression of a TIFF."""


class Tiff(NamedTuple):
    """Header of a TIFF."""

    shape: tuple[int, int, int]  # height, width, channels, as stored
    pages: int  # that make up the image; its channels if there are several
    orientation: int  # EXIF, 1 … 8
    dtype: np.dtype
    picture: bool  # grey or colours as PIL reads them, without channels of another meaning


def is_array(data: bytes, channels: int) -> bool:
    """Returns whether this module reads the image: `.npy`, and TIFF unless 1 or 3 channels of one page are wanted."""
    return data.startswith(NPY) or (
        data.startswith(TIFF) and (channels not in (1, 3) or (_has_pages(data) and read_tiff(data).pages > 1))
    )


def channels_of(data: bytes) -> int | None:
    """Returns the channels of an image that is no picture of grey or colours, from its header; None for pictures."""
    if data.startswith(NPY):
        return _layout(data)[0][2]
    if data.startswith(TIFF) and not (header := read_tiff(data)).picture:
        return header.shape[2]
    return None


def image_size(data: bytes) -> tuple[int, int]:
    """Returns (height, width) of the upright image. Raises DataError if the header is not that of an image."""
    if data.startswith(NPY):
        return _layout(data)[0][:2]
    header = read_tiff(data)
    height, width, _ = header.shape
    return (width, height) if TURNS[header.orientation][0] else (height, width)


def pixels(data: bytes) -> np.ndarray:
    """Returns the upright image [H, W, C], uint8 or uint16.

    Raises DataError if the image is damaged, truncated or of another type, CodecMissing if a package is missing.
    """
    if data.startswith(NPY):
        shape, dtype, start = _layout(data)
        if len(data) - start < math.prod(shape) * dtype.itemsize:
            raise DataError(f"the array is truncated: its {len(data)} bytes do not hold {shape} of {dtype}")
        values = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
        return values if dtype.isnative else values.astype(dtype.newbyteorder("="))
    header = read_tiff(data)
    try:
        values = tifffile.imread(io.BytesIO(data), key=range(header.pages) if header.pages > 1 else 0)
    except FORMAT_ERRORS as error:
        if "imagecodecs" in str(error):
            raise CodecMissing(
                f"its compression needs a package ({error}). Install it with `pip install imagecodecs`, or save the "
                "image uncompressed or with deflate"
            ) from None
        raise DataError(f"the TIFF image cannot be decoded ({error})") from None
    _check_type(values.dtype)
    if values.ndim == 3 and values.shape != header.shape:
        values = values.transpose(1, 2, 0)
    return np.ascontiguousarray(turn(values.reshape(header.shape), header.orientation))


def has_16_bits(data: bytes) -> bool:
    """Returns whether the values have 16 bits, from the header."""
    return (_layout(data)[1] if data.startswith(NPY) else read_tiff(data).dtype).itemsize == 2


def explain_channels(data: bytes, channels: int) -> str:
    """Returns what may be the reason why an image does not have this number of channels, "" if none is known."""
    if data.startswith(TIFF) and _has_pages(data) and (pages := read_tiff(data).pages) > 1:
        return f": its {pages} pages of one channel. Save the one that is meant alone, or set model.in_channels={pages}"
    if data.startswith(NPY) and (shape := _layout(data)[0])[0] == channels:
        return f": its shape {list(shape)} {CHANNELS_FIRST}"
    return ""


def with_bits(pixels: np.ndarray, bits: int | None) -> np.ndarray:
    """Converts pixels to 8 or 16 bits, or leaves them as they are; 65535 corresponds to 255."""
    if pixels.dtype == np.uint16 and bits == 8:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype == np.uint8 and bits == 16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return pixels


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns [H, W, C] turned upright."""
    transposed, rows_flipped, columns_flipped = TURNS[orientation]
    upright = pixels.transpose(1, 0, 2) if transposed else pixels
    return upright[:: -1 if rows_flipped else 1, :: -1 if columns_flipped else 1]


def _layout(data: bytes) -> tuple[tuple[int, int, int], np.dtype, int]:
    """Returns the shape, type and first byte of the values of a `.npy`."""
    stream = io.BytesIO(data[: 1 << 16])
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=4096)
    except FORMAT_ERRORS as error:
        raise DataError(f"the .npy header is damaged ({error})") from None
    if fortran and len(shape) > 1:
        raise DataError("the .npy array is in Fortran order. Save it with numpy.ascontiguousarray")
    if len(shape) == 3 and shape[0] <= MAX_FLAT and min(shape[1:]) >= 2 * MAX_FLAT:
        raise DataError(f"the array has the shape {list(shape)}, which {CHANNELS_FIRST}")
    return _image_shape(shape), _check_type(dtype), stream.tell()


def read_tiff(data: bytes) -> Tiff:
    """Reads the header. Raises DataError if it is damaged, or not that of one image of uint8 or uint16."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            assert isinstance(page, tifffile.TiffPage)
            shape, axes, dtype, bits = page.shape, page.axes, page.dtype, page.bitspersample
            samples, extra = page.samplesperpixel, page.extrasamples
            orientation = page.tags.valueof(ORIENTATION, default=1)
            pages = sum(_is_alike(other, page) for other in file.pages) if _has_pages(data) else 1
    except FORMAT_ERRORS as error:
        raise DataError(f"the TIFF header is damaged ({error})") from None
    if dtype is not None:
        _check_type(dtype if dtype != np.bool_ else np.dtype(np.uint8))
    if dtype is None or bits not in (1, 2, 4, 8, 16):
        raise DataError(f"its values have {bits} bits; {TYPES}")
    if axes not in ("YX", "YXS", "SYX"):
        raise DataError(f"the TIFF image has the axes {axes}; an image is [height, width, channels]")
    if pages > 1 and samples > 1:
        raise DataError(f"it holds {pages} pages of {samples} channels, and an image is one page: save each on its own")
    planar = axes == "SYX"  # one plane per channel
    if planar:
        shape = (*shape[1:], shape[0])
    # PIL reads planes of colours alone or with an alpha that they are not multiplied by; grey with alpha in 8 bits.
    coloured = page.photometric not in MINIMAL and samples <= 4 and not (planar and extra and extra[0] != UNASSOCIATED)
    grey_alpha = samples == 2 and not planar and dtype.itemsize == 1 and bool(extra) and extra[0] in ALPHA
    return Tiff(
        _image_shape((*shape, pages) if pages > 1 else shape),
        pages,
        orientation if orientation in TURNS else 1,
        dtype,
        picture=pages == 1 and (samples == 1 or coloured or grey_alpha),
    )


def _has_pages(data: bytes) -> bool:
    """Returns whether a TIFF has more than one page, without the price of tifffile."""
    order = "<" if data[:1] == b"I" else ">"
    place, count, entry = ("Q", "Q", 20) if data[2:4] in (b"+\0", b"\0+") else ("I", "H", 12)
    try:
        (first,) = struct.unpack_from(order + place, data, 8 if entry == 20 else 4)
        (entries,) = struct.unpack_from(order + count, data, first)
        (following,) = struct.unpack_from(order + place, data, first + struct.calcsize(count) + entries * entry)
    except struct.error:
        return False  # damaged, as reading it will say
    return following != 0


def _is_alike(page: Any, first: Any) -> bool:
    """Returns whether a page is one more of the same kind as the first, neither a thumbnail of it nor a mask."""
    reduced = page.subfiletype & (REDUCED | MASK)
    return not reduced and page.shape == first.shape and page.dtype == first.dtype


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) > MAX_VALUES:
        raise DataError(f"the array has the shape {tuple(shape)}; an image is [height, width, channels]")
    return shape[0], shape[1], shape[2] if len(shape) == 3 else 1


def _check_type(dtype: np.dtype) -> np.dtype:
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise DataError(f"the array is of {dtype}; {TYPES}")
    return dtype
