"""COCO annotations → the records that SA-1B keeps beside each image."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.images.decode import image_size
from data.images.masks import decode, encode, require_pycocotools
from data.pack.sample import LazySamples, Read, Sample, Source

Entry = dict[str, Any]


def with_masks(source: Source, file: Path) -> Source:
    """Returns the images that have objects (crowds do not count) in COCO's instances.json, each with a record.

    An image is found by its path below the source, or by its file name alone. Raises DataError if the file cannot be
    read as COCO instances, if none of its images is in the source, or if pycocotools is missing.
    """
    require_pycocotools()
    try:
        contents = json.loads(file.read_text())
        images, objects = contents["images"], [a for a in contents["annotations"] if not a.get("iscrowd")]
        annotations: dict[int, list[Entry]] = {}
        for annotation in objects:
            annotations.setdefault(annotation["image_id"], []).append(annotation)
        by_name = {image["file_name"]: image for image in images if image["id"] in annotations}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--masks {file} cannot be read as COCO instances ({type(error).__name__}: {error}): JSON with images (id, "
            "file_name) and annotations (image_id, segmentation) is wanted."
        ) from None
    numbers, found = [], []
    for number, sample in enumerate(source.samples):
        image = by_name.get(sample.origin) or by_name.get(sample.origin.rpartition("/")[2])
        if image is not None:
            numbers.append(number)
            found.append(image)
    if not found:
        first = next(iter(by_name), "none")
        raise DataError(
            f"--masks {file} names none of the {len(source.samples)} images of the source; the first file_name with "
            f"objects is {first}. Give the folder that the names are in."
        )
    left_out = len(source.samples) - len(found)
    note = f"{left_out} images without objects in {file} are left out" if left_out else ""

    def make(number: int) -> Sample:
        sample, image = source.samples[numbers[number]], found[number]
        read = partial(build_record, image, annotations[image["id"]], sample.read)
        return sample._replace(others=(*sample.others, ("json", read)))

    notes = "; ".join(filter(None, (source.note, note)))
    return Source(LazySamples(len(found), make), source.classes, notes)


def build_record(image: Entry, annotations: Sequence[Entry], read: Read) -> bytes:
    """Returns the SA-1B record of one image. `predicted_iou` and `stability_score` are 1: people drew the masks.

    Raises DataError if the upright image has another size than its entry says.
    """
    height, width = image_size(read())
    if (height, width) != (image.get("height", height), image.get("width", width)):
        raise DataError(
            f"it is {height}x{width} upright, and {image['height']}x{image['width']} in the annotations (height x "
            "width): masks have to be those of the image as it is shown"
        )
    objects = [_build_annotation(annotation, height, width) for annotation in annotations]
    about = {"image_id": image["id"], "width": width, "height": height, "file_name": image["file_name"]}
    return json.dumps({"image": about, "annotations": objects}).encode()


def _build_annotation(annotation: Entry, height: int, width: int) -> Entry:
    from pycocotools import mask as coco

    shape = annotation["segmentation"]
    if isinstance(shape, list):  # polygons of one object
        code: Any = coco.merge(coco.frPyObjects(shape, height, width))
        mask = coco.decode(code).astype(bool)
    else:
        mask = decode(shape)
    rows, columns = np.nonzero(mask)
    point: list[list[float]] = []
    if len(rows):
        nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        point = [[float(columns[nearest]), float(rows[nearest])]]
    segmentation: Any = encode(mask)
    return {
        "id": annotation["id"],
        "segmentation": segmentation,
        "bbox": coco.toBbox(segmentation).tolist(),
        "area": len(rows),
        "predicted_iou": 1.0,
        "stability_score": 1.0,
        "point_coords": point,
        "crop_box": [0.0, 0.0, float(width), float(height)],
    }
