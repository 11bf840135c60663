"""COCO annotations → the records that SA-1B keeps beside each image.

1 read    instances.json → entries of images, and the objects of each
2 match   file_name → image of the source, by as much of their paths as both have
3 check   each object has a shape with a pixel on its image; what is left out is counted by reason
4 build   the record of an image, in the process that packs it
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from data.errors import DataError
from data.images.decode import TURNS, image_size, read_header
from data.images.masks import RLE, decode, encode, require_pycocotools
from data.pack.sample import LazySamples, Read, Sample, Source

Entry = dict[str, Any]
Parts = tuple[str, ...]
# pycocotools walks along an outline pixel by pixel, also outside of the image: 10^9 of them end no more.
LONGEST_OUTLINE, FARTHEST = 1e6, 1e7  # pixels


class _Unusable(Exception):
    """An object that cannot become a mask; the message is the reason by which it is counted."""


def with_masks(source: Source, file: Path) -> Source:
    """Returns the images that have objects (crowds do not count) in COCO's instances.json, each with a record.

    The note says what was left out: images, entries of images, and objects by reason. Raises DataError if the file
    cannot be read as COCO instances, if it is not certain which image an entry is of, if no object can be used, if an
    image has another .json beside it, or if pycocotools is missing.
    """
    require_pycocotools()
    entries, objects, left_out = _load(file)
    samples = source.samples
    origins = [sample.origin for sample in samples]
    matched, renamed = match_images(file, entries, origins)
    numbers, found, usable = [], [], []
    for number in sorted(matched):
        entry = entries[matched[number]]
        on_image = _check_objects(entry, objects.get(matched[number], []), samples[number].read, left_out)
        if on_image:
            numbers.append(number)
            found.append(entry)
            usable.append(on_image)
    absent = [entries[number] for number in sorted(objects.keys() - set(matched.values()))]
    if not found:
        _refuse(file, entries, objects, left_out, absent, origins)
    for number in numbers:
        if "json" in (extension.lower() for extension, _ in samples[number].others):
            raise DataError(
                f"{origins[number]} has a .json beside it, and --masks would add another. Move those files elsewhere."
            )

    def make(number: int) -> Sample:
        sample = samples[numbers[number]]
        read = partial(build_record, found[number], usable[number], sample.read)
        return sample._replace(others=(*sample.others, ("json", read)))

    unnamed = [origin for number, origin in enumerate(origins) if number not in matched]
    bare = len(matched) - len(found)
    notes = [
        source.note,
        f"{len(unnamed)} images that {file} does not name are left out (first: {unnamed[0]})" if unnamed else "",
        f"{bare} images without objects in {file} are left out" if bare else "",
        f"{len(absent)} images with objects in {file} are not in the source (first: {absent[0]['file_name']})"
        if absent
        else "",
        f"objects left out: {_counted(left_out)}" if left_out else "",
        renamed,
    ]
    return Source(LazySamples(len(found), make), source.classes, "; ".join(filter(None, notes)))


def _load(file: Path) -> tuple[list[Entry], dict[int, list[Entry]], Counter[str]]:
    """Returns the entries of images, the objects of each by its number, and what was left out, by reason."""
    try:
        contents = json.loads(file.read_bytes())
        entries: list[Entry] = []
        by_id: dict[str | None, int] = {}
        for image in contents["images"]:
            name, identity = image["file_name"], _identity(image["id"])
            if not isinstance(name, str) or not name or identity is None:
                raise ValueError(f"an image has the file_name {name!r} and the id {image['id']!r}")
            if (before := by_id.get(identity)) is None:
                by_id[identity] = len(entries)
                entries.append(image)
            elif entries[before]["file_name"] != name:
                raise DataError(
                    f"--masks {file} has two images of the id {identity}, {entries[before]['file_name']} and {name}: "
                    "whose the annotations are is not certain. Give each image an id of its own."
                )
        objects: dict[int, list[Entry]] = {}
        left_out: Counter[str] = Counter()
        for annotation in contents["annotations"]:
            number = by_id.get(_identity(annotation.get("image_id")))
            if _whole(annotation.get("iscrowd")):
                left_out["crowds"] += 1
            elif number is None:
                left_out[f"of images that have no entry (image_id {annotation.get('image_id')!r} …)"] += 1
            else:
                objects.setdefault(number, []).append(annotation)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--masks {file} cannot be read as COCO instances ({type(error).__name__}: {error}): JSON with images (id, "
            "file_name) and annotations (image_id, segmentation) is wanted."
        ) from None
    orphans = [reason for reason in left_out if reason.startswith("of images")]
    if len(orphans) > 1:  # one reason, whose example is the first
        left_out[orphans[0]] = sum(left_out.pop(reason) for reason in orphans)
    return entries, objects, left_out


def _identity(value: Any) -> str | None:
    """Returns an id as text, so that 7, 7.0 and "7" are the same; None for what is no id."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return str(int(value)) if value == value and abs(value) < 2**63 and int(value) == value else None


def _whole(value: Any) -> int | None:
    """Returns a whole number that may be written as text or with a point; None if there is none."""
    text = _identity(value) if not isinstance(value, bool) else str(int(value))
    return int(float(text)) if text and text.replace(".", "", 1).isdigit() else None


def match_images(file: Path, entries: Sequence[Entry], origins: Sequence[str]) -> tuple[dict[int, int], str]:
    """Returns the number of the entry of each image that has one, and a note if extensions differ.

    The path of an image below the source is compared with file_name: whole, then by their ends where one of them has
    folders in front that the other lacks, then likewise without extensions. Backslashes count as slashes.
    Raises DataError if a name fits several images, or an image has several entries.
    """
    matched: dict[int, int] = {}
    names: list[str] = [entry["file_name"] for entry in entries]
    left, renamed = range(len(names)), ""
    for form, by_end in ((_parts, False), (_parts, True), (_stem_parts, True)):
        paths = [form(origin) for origin in origins]
        ends: dict[Any, list[int]] = {}
        for number, path in enumerate(paths):
            ends.setdefault(path[-1] if by_end else path, []).append(number)
        new: dict[int, int] = {}
        for entry in left:
            name = form(names[entry])
            fits = ends.get(name[-1] if by_end else name, [])
            fits = [number for number in fits if _same_end(name, paths[number])]
            if len(fits) > 1:
                raise DataError(
                    f"--masks {file}: {names[entry]} fits several images of the source, {origins[fits[0]]} and "
                    f"{origins[fits[1]]}. Give the folder that the names are in, or names with their folders."
                )
            if not fits or fits[0] in matched:  # another name fits that image better
                continue
            if (other := new.setdefault(fits[0], entry)) != entry:
                raise DataError(
                    f"--masks {file} has two entries for the image {origins[fits[0]]}: {names[other]} (id "
                    f"{entries[other]['id']}) and {names[entry]} (id {entries[entry]['id']}). Merge them, or give the "
                    "folder that the names are in."
                )
        matched |= new
        left = sorted(set(left) - set(new.values()))
        if form is _stem_parts and new:
            number, entry = next(iter(new.items()))
            renamed = (
                f"{len(new)} images have another extension in {file} ({names[entry]} is taken for {origins[number]})"
            )
    return matched, renamed


def _parts(path: str) -> Parts:
    """Returns the folders and the name of a path, which may be that of another machine."""
    parts = unicodedata.normalize("NFC", path).replace("\\", "/").split("/")
    return tuple(part for part in parts if part not in ("", ".", "..")) or (path,)


def _stem_parts(path: str) -> Parts:
    *folders, name = _parts(path)
    return (*folders, name.rpartition(".")[0] or name)


def _same_end(one: Parts, other: Parts) -> bool:
    """Returns whether the longer path ends in the shorter."""
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]


def _check_objects(entry: Entry, objects: list[Entry], read: Read, left_out: Counter[str]) -> list[Entry]:
    """Returns the objects that have a pixel on the image; counts the others in `left_out`."""
    if not objects:
        return []
    height, width = _stated_size(entry)
    if height is None or width is None:
        try:
            height, width = image_size(read())
        except (DataError, OSError):
            return objects  # The image is reported when its turn to be packed comes.
    usable = []
    for annotation in objects:
        try:
            _, pieces = read_shape(annotation.get("segmentation"), height, width)
        except _Unusable as reason:
            left_out[str(reason)] += 1
        else:
            usable.append(annotation)
            if pieces:
                left_out["polygons of fewer than three points in objects with others"] += pieces
    return usable


def _stated_size(entry: Entry) -> tuple[int | None, int | None]:
    return _whole(entry.get("height")), _whole(entry.get("width"))


def _refuse(
    file: Path,
    entries: list[Entry],
    objects: dict[int, list[Entry]],
    left_out: Counter[str],
    absent: list[Entry],
    origins: Sequence[str],
) -> NoReturn:
    """Raises DataError, which says why no image of the source has an object."""
    if not objects and not left_out:
        raise DataError(f"--masks {file} has no annotations: there is nothing to segment.")
    if not objects:
        ids = f"the first image has the id {entries[0]['id']!r}" if entries else "there are no images"
        raise DataError(
            f"--masks {file} has no object that belongs to an image: its annotations are {_counted(left_out)}, and "
            f"{ids}. Crowds do not count. Export instances, with the image_id of their image."
        )
    if len(absent) == len(objects):
        raise DataError(
            f"--masks {file} names none of the {len(origins)} images of the source; the first file_name with objects "
            f"is {absent[0]['file_name']}, the first image {origins[0]}. Give the folder that the names are in."
        )
    raise DataError(
        f"--masks {file} has no usable object on the images of the source: left out are {_counted(left_out)}. Export "
        "masks as polygons or run lengths."
    )


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())


def build_record(image: Entry, annotations: Sequence[Entry], read: Read) -> bytes:
    """Returns the SA-1B record of one image. `predicted_iou` and `stability_score` are 1: people drew the masks.

    Raises DataError if the upright image has another size than its entry says, or no object with a pixel.
    """
    header = read_header(read())
    height, width = header[:2]
    stated = _stated_size(image)
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
    objects, reason = [], ""
    for number, annotation in enumerate(annotations):
        try:
            mask, _ = read_shape(annotation.get("segmentation"), height, width)
        except _Unusable as error:
            reason = str(error)
        else:
            objects.append(_build_annotation(annotation.get("id", number), mask(), height, width))
    if not objects:
        raise DataError(f"none of its {len(annotations)} objects can be used: the last is one {reason}")
    about = {"image_id": image["id"], "width": width, "height": height, "file_name": image["file_name"]}
    return json.dumps({"image": about, "annotations": objects}).encode()


def read_shape(shape: Any, height: int, width: int) -> tuple[Callable[[], np.ndarray], int]:
    """Returns what draws the mask of a COCO segmentation, bool [height, width], and the number of polygons left out.

    shape  polygons, each x, y, x, y …; one such list alone; or a run-length code

    Raises _Unusable if no pixel of the image is in it.
    """
    from pycocotools import mask

    coco: Any = mask
    if not isinstance(shape, dict | list) or not shape:
        raise _Unusable("without a shape")
    if isinstance(shape, dict):
        if shape.get("size") != [height, width]:
            raise _Unusable("with run lengths of another size than their image")
        try:
            decoded = decode(shape)
        except DataError:
            raise _Unusable("with run lengths that do not fill their image, or cannot be read") from None
        if not decoded.any():
            raise _Unusable("without a pixel on their image")
        return lambda: decoded, 0
    polygons = _polygons(shape)
    whole = [polygon for polygon in polygons if polygon.size >= 6 and polygon.size % 2 == 0]
    if not whole:
        raise _Unusable("without a polygon of three points")
    for polygon in whole:
        corners = polygon.reshape(-1, 2)
        steps = np.abs(corners - np.roll(corners, 1, 0)).max(1)
        # A comparison with NaN is false.
        if not (np.abs(corners).max() < FARTHEST and steps.sum() < LONGEST_OUTLINE):
            raise _Unusable("with a corner that is no number or far outside of their image")
    code: RLE = coco.merge(coco.frPyObjects([polygon.tolist() for polygon in whole], height, width))
    if not coco.area(code):
        raise _Unusable("without a pixel on their image")
    return lambda: coco.decode(code).astype(bool), len(polygons) - len(whole)


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


def _build_annotation(identity: Any, mask: np.ndarray, height: int, width: int) -> Entry:
    from pycocotools import mask as coco

    rows, columns = np.nonzero(mask)
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    segmentation: Any = encode(mask)
    return {
        "id": identity,
        "segmentation": segmentation,
        "bbox": coco.toBbox(segmentation).tolist(),
        "area": len(rows),
        "predicted_iou": 1.0,
        "stability_score": 1.0,
        "point_coords": [[float(columns[nearest]), float(rows[nearest])]],
        "crop_box": [0.0, 0.0, float(width), float(height)],
    }
