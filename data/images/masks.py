"""Instance masks in SA-1B's format: the record beside each image, run-length codes, and the pixels of a mask frame.

A record is JSON: {"image": {...}, "annotations": [{"segmentation": {"size": [height, width], "counts": RLE}, ...}]}.
Masks belong to the upright image, as viewers and labelling tools show it.
"""

import json
from importlib.util import find_spec
from typing import Any

import numpy as np

from data.errors import DataError

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

    Raises DataError if it is not a record, has no mask, or its masks have another shape.
    """
    try:
        codes = [annotation["segmentation"] for annotation in json.loads(data)["annotations"]]
        sizes = {tuple(code["size"]) for code in codes if code["counts"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"its .json is no SA-1B record ({type(error).__name__}: {error}): annotations with a segmentation of size "
            "and counts are wanted. Polygons become such records with `python -m data.pack … --masks`."
        ) from None
    if not codes:
        raise DataError("its .json has no annotations: there is nothing to segment")
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

    Raises DataError if the counts are not run lengths, or do not fill the mask.
    """
    from pycocotools import mask

    coco: Any = mask
    try:
        if isinstance(code["counts"], list):
            code = coco.frPyObjects(code, *code["size"])
        return coco.decode(code).astype(bool)
    except (ValueError, TypeError) as error:
        raise DataError(f"a mask in its .json cannot be decoded ({error})") from None


def nearest(length: int, inside: int, stride: int, mirrored: bool = False) -> np.ndarray:
    """Returns, along one side, the pixel of the photograph below the centre of each cell of the mask frame, int64.

    length    of the photograph, which takes the first `inside` pixels of the image frame
    stride    pixels of the image frame per cell of the mask frame
    """
    cells = int(np.ceil(inside / stride - 0.5))  # whose centres lie on the photograph
    pixels = ((np.arange(cells) + 0.5) * stride * length / inside).astype(np.int64)
    return length - 1 - pixels if mirrored else pixels
