"""Images of any number of channels: `.npy` members, and TIFF with more than PIL reads. [H, W, C] or [H, W], uint8 or
uint16."""

import io
import math

import numpy as np
import tifffile

from data.errors import FORMAT_ERRORS, DataError

NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_BYTES = 1 << 31


def is_array(data: bytes, channels: int) -> bool:
    """Whether these bytes are read here: any `.npy`, and a TIFF where it is not grey or RGB that is wanted."""
    return data.startswith(NPY) or (data.startswith(TIFF) and channels not in (1, 3))


def channels_of(data: bytes) -> int | None:
    """Channels of an image that only this file reads, from its header; None for other images."""
    if data.startswith(NPY):
        return _layout(data)[0][2]
    if data.startswith(TIFF):
        shape = _tiff_shape(data)
        return shape[2] if shape[2] > 4 else None
    return None


def form(data: bytes) -> str:
    """NPY or TIFF."""
    return "NPY" if data.startswith(NPY) else "TIFF"


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the header. DataError: damaged, or no image [H, W, C] or [H, W]."""
    shape = _layout(data)[0] if data.startswith(NPY) else _tiff_shape(data)
    return shape[:2]


def pixels(data: bytes) -> np.ndarray:
    """[H, W, C], uint8 or uint16. DataError: damaged, truncated, another type."""
    if data.startswith(NPY):
        shape, dtype, start = _layout(data)
        if len(data) - start < math.prod(shape) * dtype.itemsize:
            raise DataError(f"the array is truncated: its {len(data)} bytes do not hold {shape} of {dtype}")
        values = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
        return values if dtype.isnative else values.astype(dtype.newbyteorder("="))
    try:
        values = tifffile.imread(io.BytesIO(data), key=0)
    except FORMAT_ERRORS as error:
        raise DataError(f"the TIFF image cannot be decoded ({error})") from None
    return _checked(values, _tiff_shape(data))


def with_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    """The values in 8 or 16 bits, where 65535 stands for 255."""
    if pixels.dtype == np.uint16 and bits == 8:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype == np.uint8 and bits == 16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return pixels


def _layout(data: bytes) -> tuple[tuple[int, int, int], np.dtype, int]:
    """Shape, type, and start of the values of a `.npy`."""
    stream = io.BytesIO(data[: 1 << 16])
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=4096)
    except FORMAT_ERRORS as error:
        raise DataError(f"the .npy header is damaged ({error})") from None
    if fortran and len(shape) > 1:
        raise DataError("the .npy array is in Fortran order. Save it with numpy.ascontiguousarray")
    return _image_shape(shape), _known(dtype), stream.tell()


def _tiff_shape(data: bytes) -> tuple[int, int, int]:
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            shape, axes = page.shape, page.axes
    except FORMAT_ERRORS as error:
        raise DataError(f"the TIFF header is damaged ({error})") from None
    if axes == "SYX":  # the channels one after the other
        shape = (*shape[1:], shape[0])
    return _image_shape(shape)


def _checked(values: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    _known(values.dtype)
    if values.ndim == 3 and values.shape != shape:
        values = values.transpose(1, 2, 0)
    return np.ascontiguousarray(values.reshape(shape))


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) > MAX_BYTES:
        raise DataError(f"the array has the shape {tuple(shape)}; an image is [height, width, channels]")
    return shape[0], shape[1], shape[2] if len(shape) == 3 else 1


def _known(dtype: np.dtype) -> np.dtype:
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise DataError(f"the array is of {dtype}; uint8 and uint16 are read")
    return dtype
