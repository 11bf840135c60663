"""Instance masks in SA-1B's format: the record beside each image, run-length codes, and the pixels of a mask frame.

A record is JSON: {"image": {...}, "annotations": [{"segmentation": {"size": [height, width], "counts": RLE}, ...}]}.
Masks belong to the upright image, as viewers and labelling tools show it.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from data.errors import DataError, NoObject
from data.images.decode import MAX_PIXELS

RLE = dict[str, Any]


def require_pycocotools() -> None:
    """Raises DataError if pycocotools is not installed."""
    if find_spec("pycocotools") is None:
        raise DataError(
            "instance masks need the package pycocotools, which is not installed. "
            "Install it with `pip install 'mae-pretrain[sam]'`."
        )


def read_record(data: bytes, size: tuple[int, int]) -> tuple[list[RLE], tuple[int, int]]:
    """Returns the run-length codes of all masks of a record, and their (height, width).

    size  (height, width) of the upright image, which may be a smaller copy of the annotated one

    Raises NoObject if it has no mask, DataError if it is not a record or its masks have another shape.
    """
    try:
        codes = [annotation["segmentation"] for annotation in json.loads(data)["annotations"]]
        sizes = {(int(height), int(width)) for height, width in (code["size"] for code in codes)}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"its .json is no SA-1B record ({type(error).__name__}: {error}): annotations with a segmentation of size "
            "and counts are wanted. Polygons become such records with `python -m data.pack … --masks`."
        ) from None
    if not codes:
        raise NoObject("its .json has no annotations: there is nothing to segment")
    if other := next((found for found in sizes if not _same_shape(found, size)), None):
        raise DataError(
            f"its masks are {other[0]}x{other[1]}, the upright image is {size[0]}x{size[1]} (height x width): masks "
            "have to be those of the image as it is shown, turned as its EXIF orientation says"
        )
    if len(sizes) > 1:
        raise DataError(f"its masks are of several sizes: {sorted(sizes)}")
    return codes, next(iter(sizes), size)


def _same_shape(masks: tuple[int, int], image: tuple[int, int]) -> bool:
    """Returns whether the image is the annotated one, or a smaller copy with sides rounded to pixels."""
    scale = [one / other for one, other in zip(masks, image, strict=True)]
    return masks == image or (min(scale) > 1 and abs(masks[0] - image[0] * scale[1]) <= max(scale))


def encode(mask: np.ndarray) -> RLE:
    """Returns the run-length code of a mask [height, width], ready for JSON."""
    from pycocotools import mask as coco

    code: Any = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode()}


def decode(code: RLE) -> np.ndarray:
    """Returns the mask, bool [height, width], of a run-length code. COCO's crowds have their counts as a list.

    Raises DataError if the counts are not run lengths, or do not fill the mask exactly; without any it is empty.
    """
    runs, (height, width) = _checked_runs(code)
    if len(runs) == 0:
        return np.zeros((height, width), bool)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def area(code: RLE) -> int:
    """Returns the number of pixels of the mask of a run-length code, without decoding it. Raises what `decode` does."""
    runs, _ = _checked_runs(code)
    return int(runs[1::2].sum())


class CodedMasks:
    """Masks of one photograph as run-length codes, decoded when they are asked for: hundreds take little memory.

    codes  of masks of the same size
    size   (height, width)
    areas  int64 [N], pixels of each mask

    Raises DataError if a mask cannot be decoded.
    """

    def __init__(self, codes: Sequence[RLE], size: tuple[int, int]) -> None:
        self.codes, self.size = list(codes), size
        self.areas = np.array([area(code) for code in codes], np.int64)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, number: int) -> np.ndarray:
        """Returns one mask, bool [height, width]."""
        return decode(self.codes[number])

    def stack(self, first: int, stop: int) -> np.ndarray:
        """Returns the masks first … stop - 1, as many as there are: bool [n, height, width]."""
        codes = self.codes[first:stop]
        stacked = np.zeros((len(codes), *self.size), bool)
        for row, code in zip(stacked, codes, strict=True):
            row[:] = decode(code)
        return stacked


def _checked_runs(code: RLE) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the lengths of the runs and (height, width). Raises DataError if they do not fill the mask exactly."""
    try:
        height, width = code["size"]
        if type(height) is not int or type(width) is not int or not 0 < height * width <= MAX_PIXELS:
            raise ValueError(f"its size is {code['size']}")
        runs = run_lengths(code["counts"])
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise DataError(f"a mask in its .json cannot be decoded ({error})") from None
    # pycocotools would leave whatever lay in memory in the rest of the mask.
    if len(runs) and runs.sum() != height * width:
        raise DataError(
            f"a mask in its .json cannot be decoded: its run lengths are of {runs.sum():,} pixels, and a mask of "
            f"{height}x{width} has {height * width:,}"
        )
    return runs, (height, width)


def run_lengths(counts: list[int] | str) -> np.ndarray:
    """Returns the lengths of the runs of a mask read by columns, outside and inside it in turns, int64.

    counts  a list, or COCO's string: characters from "0" on hold 5 bits each, the lowest first, and 32 if the number
            goes on; numbers are signed, and from the fourth on differences from the number two before

    Raises ValueError if they are no run lengths.
    """
    if isinstance(counts, list):
        if any(type(run) is not int for run in counts):
            raise ValueError("counts hold something other than whole numbers")
        runs = np.array(counts, np.int64)
    elif not isinstance(counts, str):
        raise ValueError("counts are neither a list nor text")
    else:
        bits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - ord("0")
        last = np.flatnonzero(bits < 32)  # characters of the numbers
        if bits.min(initial=0) < 0 or bits.max(initial=0) > 63 or bits[-1:].max(initial=0) > 31:
            raise ValueError("counts are no compressed run lengths")
        first = np.append(0, last[:-1] + 1)[: len(last)]
        place = np.arange(len(bits)) - np.repeat(first, last - first + 1)
        if place.max(initial=0) > 6:
            raise ValueError("counts hold a number of more than 32 bits")
        runs = np.add.reduceat(bits % 32 << 5 * place, first) if len(first) else bits
        runs -= (bits[last] % 32 >= 16) * (1 << 5 * (place[last] + 1))
        runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    if runs.min(initial=0) < 0 or runs.max(initial=0) > MAX_PIXELS:
        raise ValueError("counts hold a run that is negative or too long")
    return runs


def nearest(length: int, inside: int, stride: int, mirrored: bool = False) -> np.ndarray:
    """Returns, along one side, the pixel of the photograph below the centre of each cell of the mask frame, int64.

    length    of the photograph, which takes the first `inside` pixels of the image frame
    stride    pixels of the image frame per cell of the mask frame
    """
    cells = int(np.ceil(inside / stride - 0.5))  # whose centres lie on the photograph
    pixels = ((np.arange(cells) + 0.5) * stride * length / inside).astype(np.int64)
    return length - 1 - pixels if mirrored else pixels
