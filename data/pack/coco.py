"""COCO annotations → the records that SA-1B keeps beside each image.

1 read    instances.json → entries of images, and the objects of each       here
2 match   file_name → image of the source                                   coco_names.py
3 check   objects with a pixel on their image; the others are passed over   here
4 build   the record of an image, in the process that packs it              coco_record.py
"""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import track

from data.errors import DataError
from data.images.decode import image_size
from data.images.masks import require_pycocotools
from data.index.passed_over import PassedOver
from data.pack.coco_names import match_images
from data.pack.coco_record import Entry, Unusable, build_record, read_shape, stated_size, whole_number
from data.pack.sample import LazySamples, Read, Sample, Source

QUICK = 10_000  # images whose objects are checked without a progress bar


def with_masks(source: Source, file: Path, passed_over: PassedOver | None = None) -> Source:
    """Returns the images that have objects in COCO's instances.json, each with a record of them.

    passed_over  counts what is not packed: images, entries of images, objects by reason (crowds among them)

    Raises DataError if the file cannot be read as COCO instances, if it is not certain which image an entry is of, if
    no object can be used, if an image has another .json beside it, or if pycocotools is missing.
    """
    require_pycocotools()
    left_out = PassedOver()
    entries, objects = _load(file, left_out)
    samples = source.samples
    origins = [sample.origin for sample in samples]
    matched, renamed = match_images(file, entries, origins)
    found: list[tuple[int, Entry, list[Entry]]] = []  # image, its entry, its objects
    pairs = track(sorted(matched.items()), "reading masks", console=Console(stderr=True), disable=len(matched) < QUICK)
    for image, number in pairs:
        entry = entries[number]
        if usable := _usable_objects(entry, objects.get(number, []), samples[image].read, left_out):
            found.append((image, entry, usable))
    absent = [entries[number]["file_name"] for number in sorted(objects.keys() - set(matched.values()))]
    if not found:
        _refuse(file, entries, objects, left_out, absent, origins)
    for image, *_ in found:
        if "json" in (extension.lower() for extension, _ in samples[image].others):
            raise DataError(
                f"{origins[image]} has a .json beside it, and --masks would add another. Move those files elsewhere."
            )
    bare = sorted(matched.keys() - {image for image, *_ in found})
    unnamed = (origin for image, origin in enumerate(origins) if image not in matched)
    left_out.add("images that the annotations do not name", *unnamed)
    left_out.add("images without an object in the annotations", *(origins[image] for image in bare))
    left_out.add("annotated images that are not in the source", *absent)
    if passed_over is not None:
        passed_over.update(left_out)

    def make(number: int) -> Sample:
        image, entry, usable = found[number]
        sample = samples[image]
        return sample._replace(others=(*sample.others, ("json", partial(build_record, entry, usable, sample.read))))

    note = "; ".join(filter(None, (source.note, renamed)))
    return source._replace(samples=LazySamples(len(found), make), note=note)


def _load(file: Path, left_out: PassedOver) -> tuple[list[Entry], dict[int, list[Entry]]]:
    """Returns the entries of images, and the objects of each by its number."""
    try:
        contents = json.loads(file.read_bytes())
        entries, numbers = _number_entries(contents["images"], file)
        objects: dict[int, list[Entry]] = {}
        for annotation in contents["annotations"]:
            image = annotation.get("image_id")
            number = numbers.get(_identity(image))
            if whole_number(annotation.get("iscrowd")):
                left_out.add("crowds", _name(annotation))
            elif number is None:
                left_out.add("objects of images that have no entry", f"image_id {image!r}")
            else:
                objects.setdefault(number, []).append(annotation)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"--masks {file} cannot be read as COCO instances ({type(error).__name__}: {error}): JSON with images (id, "
            "file_name) and annotations (image_id, segmentation) is wanted."
        ) from None
    return entries, objects


def _number_entries(images: Iterable[Entry], file: Path) -> tuple[list[Entry], dict[str | None, int]]:
    """Returns the entries of images, each once, and their numbers by their ids."""
    entries: list[Entry] = []
    numbers: dict[str | None, int] = {}
    for image in images:
        name, identity = image.get("file_name", image.get("coco_url")), _identity(image["id"])  # LVIS has URLs
        if not isinstance(name, str) or not name or identity is None:
            raise ValueError(f"an image has the file_name {name!r} and the id {image['id']!r}")
        if (number := numbers.setdefault(identity, len(entries))) == len(entries):
            entries.append(image | {"file_name": name})
        elif entries[number]["file_name"] != name:
            raise DataError(
                f"--masks {file} has two images of the id {identity}, {entries[number]['file_name']} and {name}: "
                "whose the annotations are is not certain. Give each image an id of its own."
            )
    return entries, numbers


def _identity(value: Any) -> str | None:
    """Returns an id as text, so that 7, 7.0 and "7" are the same; None for what is no id."""
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else None


def _name(annotation: Entry) -> str:
    return f"annotation {annotation.get('id')!r}"


def _usable_objects(entry: Entry, objects: list[Entry], read: Read, left_out: PassedOver) -> list[Entry]:
    """Returns the objects that have a pixel on the image; counts the others."""
    if not objects:
        return []
    height, width = stated_size(entry)
    if height is None or width is None:
        try:
            height, width = image_size(read())
        except (DataError, OSError):
            return objects  # The image is reported when its turn to be packed comes.
    usable = []
    for annotation in objects:
        try:
            _, pieces = read_shape(annotation.get("segmentation"), height, width)
        except Unusable as reason:
            left_out.add(f"objects {reason}", _name(annotation))
        else:
            usable.append(annotation)
            if pieces:
                reason = "polygons of fewer than three points in objects with others"
                left_out.add(reason, _name(annotation), count=pieces)
    return usable


def _refuse(
    file: Path,
    entries: list[Entry],
    objects: dict[int, list[Entry]],
    left_out: PassedOver,
    absent: list[str],
    origins: Sequence[str],
) -> NoReturn:
    """Raises DataError, which says why no image of the source has an object."""
    if not objects and not left_out:
        raise DataError(f"--masks {file} has no annotations: there is nothing to segment.")
    if not objects:
        ids = f"the first image has the id {entries[0]['id']!r}" if entries else "there are no images"
        raise DataError(
            f"--masks {file} has no object that belongs to an image: its annotations are {left_out}, and {ids}. Crowds "
            "do not count. Export instances, with the image_id of their image."
        )
    if len(absent) == len(objects):
        raise DataError(
            f"--masks {file} names none of the {len(origins)} images of the source; the first file_name with objects "
            f"is {absent[0]}, the first image {origins[0]}. Give the folder that the names are in."
        )
    raise DataError(
        f"--masks {file} has no usable object on the images of the source: left out are {left_out}. Export masks as "
        "polygons or run lengths."
    )
