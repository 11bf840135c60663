"""An image and its COCO objects → its record in SA-1B's format."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.errors import DataError
from data.images.decode import TURNS, read_header
from data.images.masks import RLE, decode, encode
from data.pack.sample import Read

Entry = dict[str, Any]
# pycocotools walks along an outline pixel by pixel, also outside of the image: 10^9 of them end no more.
LONGEST_OUTLINE, FARTHEST = 1e6, 1e7  # pixels


class Unusable(Exception):
    """An object that cannot become a mask; the message is the reason by which it is counted."""


def build_record(image: Entry, annotations: Sequence[Entry], read: Read) -> bytes:
    """Returns the SA-1B record of one image. `predicted_iou` and `stability_score` are 1: people drew the masks.

    Raises DataError if the upright image has another size than its entry says, or no object with a pixel.
    """
    header = read_header(read())
    height, width = header[:2]
    stated = stated_size(image)
    if any(said not in (None, true) for said, true in zip(stated, (height, width), strict=True)):
        if TURNS[header.orientation][0] and stated in ((width, height), (width, None), (None, height)):
            raise DataError(
                f"it is {height}x{width} upright (height x width), and the annotations are of the stored pixels, "
                f"before its EXIF orientation {header.orientation} turns them. Turn the image itself and remove the "
                "orientation, or annotate it as it is shown"
            )
        raise DataError(
            f"it is {height}x{width} upright, and {stated[0] or '?'}x{stated[1] or '?'} in the annotations (height x "
            "width): masks have to be those of the image as it is shown"
        )
    objects, reason = [], None
    for number, annotation in enumerate(annotations):
        try:
            code, _ = read_shape(annotation.get("segmentation"), height, width)
        except Unusable as error:
            reason = error
        else:
            objects.append(_build_annotation(annotation.get("id", number), code, height, width))
    if not objects:
        raise DataError(f"none of its {len(annotations)} objects can be used: the last is one {reason}")
    about = {"image_id": image["id"], "width": width, "height": height, "file_name": image["file_name"]}
    return json.dumps({"image": about, "annotations": objects}).encode()


def stated_size(image: Entry) -> tuple[int | None, int | None]:
    """Returns (height, width) of an image as its entry says; 0 and None stand for what is not known."""
    return whole_number(image.get("height")) or None, whole_number(image.get("width")) or None


def whole_number(value: Any) -> int | None:
    """Returns a number from 0 on that may be written as text or with a point; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and number >= 0 else None


def read_shape(shape: Any, height: int, width: int) -> tuple[RLE, int]:
    """Returns the run-length code of a COCO segmentation, and the number of its polygons that are left out.

    shape  polygons, each x, y, x, y …; one such list alone; or a run-length code

    Raises Unusable if no pixel of the image is in it.
    """
    from pycocotools import mask

    coco: Any = mask
    if not isinstance(shape, dict | list) or not shape:
        raise Unusable("without a shape")
    left_out = 0
    if isinstance(shape, dict):
        code = _recode(shape, height, width)
    else:
        polygons = _polygons(shape)
        whole = [polygon for polygon in polygons if polygon.size >= 6 and polygon.size % 2 == 0]
        if not whole:
            raise Unusable("without a polygon of three points")
        if not all(map(_is_near, whole)):
            raise Unusable("with a corner that is no number or far outside of their image")
        left_out = len(polygons) - len(whole)
        code = coco.merge(coco.frPyObjects([polygon.tolist() for polygon in whole], height, width))
    if not coco.area(code):
        raise Unusable("without a pixel on their image")
    return code, left_out


def _recode(code: RLE, height: int, width: int) -> RLE:
    """Returns a run-length code as pycocotools writes it."""
    if code.get("size") != [height, width]:
        raise Unusable("with run lengths of another size than their image")
    try:
        return encode(decode(code))
    except DataError:
        raise Unusable("with run lengths that do not fill their image, or cannot be read") from None


def _polygons(shape: list[Any]) -> list[np.ndarray]:
    """Returns the coordinates of each polygon, [x, y, x, y, …]. Points may be lists of two; what is none is empty."""
    if not isinstance(shape[0], list):
        return [_coordinates(shape)]
    if len(shape) > 2 and all(isinstance(point, list) and len(point) == 2 for point in shape):
        return [_coordinates(shape)]  # one polygon of points
    return [_coordinates(polygon) for polygon in shape]


def _coordinates(polygon: Any) -> np.ndarray:
    try:
        return np.array(polygon, np.float64).ravel()
    except (ValueError, TypeError, OverflowError):
        return np.empty(0)


def _is_near(polygon: np.ndarray) -> bool:
    """Returns whether an outline is short enough to be drawn. A comparison with NaN is false."""
    if not np.abs(polygon).max() < FARTHEST:
        return False
    corners = polygon.reshape(-1, 2)
    return bool(np.abs(corners - np.roll(corners, 1, 0)).max(1).sum() < LONGEST_OUTLINE)


def _build_annotation(identity: Any, code: RLE, height: int, width: int) -> Entry:
    from pycocotools import mask

    coco: Any = mask
    pixels = coco.decode(code)
    rows, columns = np.nonzero(pixels)
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return {
        "id": identity,
        "segmentation": encode(pixels),
        "bbox": coco.toBbox(code).tolist(),
        "area": len(rows),
        "predicted_iou": 1.0,
        "stability_score": 1.0,
        "point_coords": [[float(columns[nearest]), float(rows[nearest])]],
        "crop_box": [0.0, 0.0, float(width), float(height)],
    }
