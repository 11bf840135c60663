"""`.npy` and TIFF images with any number of channels: [H, W, C] or [H, W], uint8 or uint16."""

import io
import math

import numpy as np
import tifffile

from data.errors import FORMAT_ERRORS, DataError

NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_VALUES = 1 << 31


def is_array(data: bytes, channels: int) -> bool:
    """Returns whether this module reads the image: any `.npy`, and a TIFF unless 1 or 3 channels are wanted."""
    return data.startswith(NPY) or (data.startswith(TIFF) and channels not in (1, 3))


def channels_of(data: bytes) -> int | None:
    """Returns the channels of an image that only this module reads, from its header; None for other images."""
    if data.startswith(NPY):
        return _layout(data)[0][2]
    if data.startswith(TIFF):
        shape = _tiff_shape(data)
        return shape[2] if shape[2] > 4 else None
    return None


def image_size(data: bytes) -> tuple[int, int]:
    """Returns (height, width) from the header. Raises DataError if it is damaged or not that of an image."""
    shape = _layout(data)[0] if data.startswith(NPY) else _tiff_shape(data)
    return shape[:2]


def pixels(data: bytes) -> np.ndarray:
    """Returns [H, W, C], uint8 or uint16. Raises DataError if the image is damaged, truncated or of another type."""
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
    shape = _tiff_shape(data)
    _check_type(values.dtype)
    if values.ndim == 3 and values.shape != shape:
        values = values.transpose(1, 2, 0)
    return np.ascontiguousarray(values.reshape(shape))


def with_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Converts pixels to 8 or 16 bits; 65535 corresponds to 255."""
    if pixels.dtype == np.uint16 and bits == 8:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype == np.uint8 and bits == 16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return pixels


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
    return _image_shape(shape), _check_type(dtype), stream.tell()


def _tiff_shape(data: bytes) -> tuple[int, int, int]:
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            shape, axes = page.shape, page.axes
    except FORMAT_ERRORS as error:
        raise DataError(f"the TIFF header is damaged ({error})") from None
    if axes == "SYX":  # planar: one page per channel
        shape = (*shape[1:], shape[0])
    return _image_shape(shape)


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) > MAX_VALUES:
        raise DataError(f"the array has the shape {tuple(shape)}; an image is [height, width, channels]")
    return shape[0], shape[1], shape[2] if len(shape) == 3 else 1


def _check_type(dtype: np.dtype) -> np.dtype:
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise DataError(f"the array is of {dtype}; uint8 and uint16 are read")
    return dtype
