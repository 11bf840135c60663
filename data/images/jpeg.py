"""JPEG: parses the header, decodes only the rows that a crop needs, at 1/1 to 1/8 of the size; never turns by EXIF."""

import math
import struct
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from data.errors import FORMAT_ERRORS

ORIENTATION = 0x0112
SOI, EOI, SOS, APP1 = 0xD8, 0xD9, 0xDA, 0xE1
BARE = (0x01, *range(0xD0, 0xD8))  # markers without a segment: TEM and the restart markers
SEQUENTIAL = (0xC0, 0xC1)  # baseline and extended: one pass over the rows from top to bottom
PROGRESSIVE = 0xC2
BLOCK = 8
BUFFER_BYTES = 1 << 27  # of the largest buffer that a process keeps for decoded pixels


class JPEG(NamedTuple):
    """Header of a JPEG that simplejpeg decodes: Huffman-coded, 8 bits, one or three components."""

    height: int  # as stored, before the EXIF orientation
    width: int
    orientation: int  # EXIF, 1 … 8
    frame: int  # first byte of the frame header; precision, height and width follow at + 4
    rows: int  # height of a minimum coded unit (MCU)
    one_pass: bool  # sequential and interleaved: the rows are coded once, from top to bottom


def parse(data: bytes) -> JPEG | None:
    """Returns the header of such a JPEG; None for anything else, and for damaged headers."""
    frame, orientation, position = None, 1, 2
    if data[:2] != b"\xff\xd8":
        return None
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF or marker in BARE:
            position += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4])
        if marker == SOS:
            return _header(data, frame, orientation, components=data[position + 4 : position + 5])
        if marker in (SOI, EOI) or length < 2:
            return None
        if marker in SEQUENTIAL or marker == PROGRESSIVE:
            frame = position
        elif marker == APP1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = read_orientation(partial(_load_exif, data[position + 4 : position + 2 + length]))
        position += 2 + length
    return None


def _header(data: bytes, frame: int | None, orientation: int, components: bytes) -> JPEG | None:
    if frame is None or len(components) != 1:
        return None
    precision, height, width, count = struct.unpack_from(">BHHB", data, frame + 4)
    factors = data[frame + 11 : frame + 10 + 3 * count : 3]  # sampling factors: horizontal << 4 | vertical
    if precision != BLOCK or count not in (1, 3) or not height or not width or len(factors) != count:
        return None
    # A single component is never interleaved: its MCU is one block, whatever its sampling factor.
    rows = BLOCK * (max(factor & 15 for factor in factors) if count == 3 else 1)
    one_pass = data[frame + 1] in SEQUENTIAL and components[0] == count
    return JPEG(height, width, orientation, frame, rows, one_pass)


def _load_exif(segment: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(segment)
    return exif


def read_orientation(load: Callable[[], Image.Exif]) -> int:
    """Returns the EXIF orientation 1 … 8 in what `load` reads; 1 if there is none or it is invalid."""
    try:
        with warnings.catch_warnings(action="ignore"):
            turn = load().get(ORIENTATION, 1)
    except FORMAT_ERRORS:
        return 1
    return turn if turn in range(1, 9) else 1


_memory = np.empty(1 << 20, np.uint8)


def _scratch(*shape: int) -> np.ndarray:
    """Returns the buffer for one image. New memory for each costs a small image a sixth of its time, in page faults."""
    global _memory
    size = math.prod(shape)
    if size > BUFFER_BYTES:
        return np.empty(shape, np.uint8)
    if size > len(_memory):
        _memory = np.empty(size, np.uint8)
    return _memory[:size].reshape(shape)


def decode(data: bytes, header: JPEG, colours: str, bottom: int, scale: int = 1) -> np.ndarray:
    """Decodes the stored image down to row `bottom` at least, at 1/scale of its size by smaller inverse DCTs.

    scale    1, 2, 4 or 8
    returns  uint8 [rows, ⌈width / scale⌉, channels], rows ≥ ⌈bottom / scale⌉, equal to those of a full decode;
             overwritten by the next call

    Raises ValueError if these rows are damaged or missing; does not look at what follows them.
    """
    # One MCU more than asked for, since chroma is interpolated between rows.
    height = (-(-bottom // header.rows) + 1) * header.rows
    if header.one_pass and height < header.height:
        # Tell the decoder that the image ends early. It will complain about the bytes that follow.
        shorter = bytearray(data)
        struct.pack_into(">H", shorter, header.frame + 5, height)
    else:
        shorter, height = data, header.height
    rows, columns = -(-height // scale), -(-header.width // scale)
    pixels = _scratch(rows, columns, 1 if colours == "GRAY" else 3)
    try:
        simplejpeg.decode_jpeg(shorter, colours, min_height=rows, min_width=columns, buffer=pixels)
    except ValueError as error:
        # The message names the first fault. If that is the bytes after the rows, the rows are intact.
        if "extraneous bytes before marker 0xd" not in str(error):
            raise
    return pixels
