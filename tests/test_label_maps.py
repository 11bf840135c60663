"""Maps of classes and depths are read as numbers, whatever their colours."""

import io

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.images.label_maps import read_classes, read_depths

VALUES = np.array([[0, 1, 2], [3, 200, 255]], np.uint8)


def saved(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def test_classes_of_grey_palette_and_array_are_their_numbers() -> None:
    coloured = Image.fromarray(VALUES).convert("P")  # Pascal VOC's maps have a palette
    coloured.putpalette([(7 * part) % 256 for part in range(768)])
    coloured.putdata(VALUES.flatten().tolist())
    for data in (saved(Image.fromarray(VALUES)), saved(coloured), array(VALUES)):
        assert np.array_equal(read_classes(data), VALUES)


def test_classes_of_16_bits_keep_them() -> None:
    values = VALUES.astype(np.uint16) * 200
    for data in (saved(Image.fromarray(values)), array(values), array(values.astype(">u2"))):
        found = read_classes(data)
        assert found.dtype.itemsize == 2 and np.array_equal(found, values)


def test_depths_are_metres_and_0_where_nothing_was_measured() -> None:
    millimetres = np.array([[0, 1500], [65535, 10]], np.uint16)
    assert read_depths(saved(Image.fromarray(millimetres)), 1e-3) == pytest.approx(millimetres / 1000)
    metres = np.array([[np.nan, 1.5], [np.inf, -1.0]], np.float32)
    assert read_depths(array(metres), 1e-3).tolist() == [[0, 1.5], [0, 0]]


def test_pictures_of_colours_and_real_numbers_are_no_classes() -> None:
    with pytest.raises(DataError, match="picture of colours"):
        read_classes(saved(Image.fromarray(VALUES).convert("RGB")))
    with pytest.raises(DataError, match="its map is of float32, and classes are uint8 or uint16"):
        read_classes(array(np.ones((2, 2), np.float32)))
    with pytest.raises(DataError, match=r"of uint8 \[2, 2, 2\], and a map is \[height, width\]"):
        read_classes(array(np.ones((2, 2, 2), np.uint8)))
    with pytest.raises(DataError, match="cannot be decoded"):
        read_classes(b"\x93NUMPYxx")
