"""Maps beside photographs: a class or a depth for each pixel."""

import io

import numpy as np

from data.errors import FORMAT_ERRORS, DataError
from data.images import pil
from data.images.arrays import NPY

# PIL's modes of one whole number per pixel; of a palette the numbers are the classes, whatever its colours.
MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I;16N", "I")


def read_classes(data: bytes) -> np.ndarray:
    """Decodes a map of classes: uint8 or uint16 [height, width].

    Raises DataError if it is no .npy, PNG or the like of one unsigned number of 8 or 16 bits per pixel.
    """
    values = _values(data)
    if values.dtype == np.int32 and values.min() >= 0 and values.max() < 1 << 16:  # 16 bits, as PIL may open them
        values = values.astype(np.uint16)
    if values.dtype not in (np.uint8, np.uint16):
        raise DataError(f"its map is of {values.dtype}, and classes are uint8 or uint16")
    return values


def read_depths(data: bytes, unit: float) -> np.ndarray:
    """Decodes a map of depths: float32 [height, width] in metres, 0 where nothing was measured.

    unit  metres of 1 in a map of whole numbers; real numbers in .npy are metres

    Raises DataError as `read_classes` does.
    """
    values = _values(data)
    metres = values.astype(np.float32) * (1 if values.dtype.kind == "f" else unit)
    return np.where(np.isfinite(metres) & (metres > 0), metres, 0).astype(np.float32)


def _values(data: bytes) -> np.ndarray:
    """Returns the numbers [height, width] of a map as they are stored."""
    if data.startswith(NPY):
        try:
            values = np.load(io.BytesIO(data), allow_pickle=False)
        except FORMAT_ERRORS as error:
            raise DataError(f"its map cannot be decoded ({error})") from None
        values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
        if values.ndim != 2 or values.dtype.kind not in "uif":
            raise DataError(f"its map is of {values.dtype} {list(values.shape)}, and a map is [height, width]")
        return values.astype(values.dtype.newbyteorder("="))
    values = _picture(data)
    return values.astype(np.uint8) if values.dtype == bool else values.astype(values.dtype.newbyteorder("="))


def _picture(data: bytes) -> np.ndarray:
    """Returns the numbers of a map that is stored as a picture."""
    try:
        with pil.opened(data) as image:
            kind, mode = image.format, image.mode
            values = np.asarray(image) if kind != "JPEG" and mode in MODES else None
    except DataError as error:
        raise DataError(f"its map cannot be decoded: {error}") from None
    if kind == "JPEG":
        raise DataError("its map is a JPEG, whose compression changes the numbers: save it as PNG")
    if values is None:
        raise DataError(
            f"its map is a picture of colours (PIL's mode {mode}), and a map has one number per pixel: save the "
            "numbers, not their colours"
        )
    return values
