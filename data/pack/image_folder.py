"""Images of a folder with their classes and side files, to be packed."""

import os
import re
from functools import partial
from pathlib import Path

from data.errors import DataError
from data.index.samples import IMAGES
from data.index.splits import NAMES
from data.pack.class_list import number_by_name
from data.pack.sample import LazySamples, Sample, Source


def find_images(source: Path, given: list[str] | None = None) -> Source:
    """Returns the images below a folder with their side files, and the names of its classes.

    given  names of the classes by their numbers (--classes); else the sub-folders in alphabetical order, empty ones
           included; a flat folder has none

    A file a.EXTENSION beside a.jpg is kept as a side file of that image. Raises DataError if there is no folder or
    image, if sub-folders are splits, no classes that are given, or have images beside them, or if an image has two
    labels.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder. Give a folder of images, flat or with one sub-folder per class.")
    images, rest = _walk(source)
    folders = sorted({path.partition("/")[0] for path in images if "/" in path})
    if splits := [name for name in folders if name.lower() in NAMES]:
        raise DataError(
            f"{source} has the sub-folder {splits[0]}, which is a split and no class. Pack each part on its own: "
            f"`python -m data.pack {source / splits[0]} OUT/{NAMES[splits[0].lower()]}`, and so on."
        )
    if not images:
        raise DataError(
            f"{source} holds no image among its {len(rest)} files: none ends in "
            f"{', '.join('.' + extension for extension in IMAGES)}. Check the path."
        )
    if folders and (loose := next((path for path in images if "/" not in path), None)):
        raise DataError(
            f"{source} holds both class folders ({folders[0]}) and images beside them ({loose}). "
            "Move those into a class folder, or pack them apart."
        )
    sides, ignored = _match_side_files(images, rest)
    if folders and (
        label := next((path for side in sides.values() for name, path in side if name.lower() == "cls"), None)
    ):
        raise DataError(
            f"{source / label} would give its image a second label beside that of the sub-folder. "
            "Remove the .cls files, or put the images into one flat folder."
        )
    has_labels = folders or any(name.lower() == "cls" for side in sides.values() for name, _ in side)
    if given is not None and not has_labels:
        raise DataError(f"{source} has no sub-folder or .cls file to be numbered by --classes. Leave it out.")
    classes, labels = _number_classes(source, folders, rest, given)
    empty = len(classes) - len(labels) if folders else 0
    notes = [
        f"{ignored} files in {source} are neither images nor named after one, and are left out" if ignored else "",
        f"{empty} of {len(classes)} classes have no image in {source}" if empty else "",
    ]

    def make(number: int) -> Sample:
        path = images[number]
        others = tuple((extension, read(side)) for extension, side in sides.get(number, ()))
        label = labels.get(path.partition("/")[0])
        return Sample(key_of_path(path), path.rpartition(".")[2].lower(), label, path, read(path), others)

    def read(path: str) -> partial[bytes]:
        return partial(read_file, f"{source}/{path}")

    return Source(LazySamples(len(images), make), classes, "; ".join(filter(None, notes)))


def _number_classes(
    source: Path, folders: list[str], rest: list[str], given: list[str] | None
) -> tuple[list[str], dict[str, int]]:
    """Returns the names of the classes, and the number of each sub-folder that has images.

    rest  paths of all other files: a folder that has such files alone is no class

    Raises DataError if a folder is none of the classes that are given.
    """
    if given is not None:
        return given, number_by_name(given, folders, str(source))
    if not folders:
        return [], {}
    occupied = {path.partition("/")[0] for path in rest}
    with os.scandir(source) as entries:
        empty = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")} - occupied
    classes = sorted({*folders, *(name for name in empty if name.lower() not in NAMES)})
    return classes, {name: number for number, name in enumerate(classes) if name in set(folders)}


def key_of_path(path: str) -> str:
    """Returns the path without its extension, dots and spaces in it replaced by `_`.

    webdataset ends a key at its first dot, and the text index separates its fields by spaces.
    """
    return re.sub(r"[.\s]", "_", os.path.splitext(path)[0])


def read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _walk(source: Path) -> tuple[list[str], list[str]]:
    """Returns the paths of the images and of the other files below the folder, sorted, without hidden ones."""
    images, rest = [], []
    for folder, children, names in os.walk(source, followlinks=True):
        children[:] = [child for child in children if not child.startswith(".")]
        place = os.path.relpath(folder, source)
        for name in names:
            if not name.startswith("."):
                path = name if place == "." else f"{place}/{name}"
                (images if Path(name).suffix[1:].lower() in IMAGES else rest).append(path)
    return sorted(images, key=lambda path: path.split("/")), sorted(rest)


def _match_side_files(images: list[str], rest: list[str]) -> tuple[dict[int, list[tuple[str, str]]], int]:
    """Returns (extension, path) of the side files of each image, and the number of files that belong to none."""
    numbers = {os.path.splitext(path)[0]: number for number, path in enumerate(images)} if rest else {}
    sides: dict[int, list[tuple[str, str]]] = {}
    ignored = 0
    for path in rest:
        folder, slash, name = path.rpartition("/")
        words = name.split(".")
        # a.b.json belongs to a.b.jpg where there is one, else to a.jpg.
        for cut in range(len(words) - 1, 0, -1):
            number = numbers.get(folder + slash + ".".join(words[:cut]))
            if number is not None:
                extension = re.sub(r"\s", "_", ".".join(words[cut:]))
                sides.setdefault(number, []).append((extension, path))
                break
        else:
            ignored += 1
    return sides, ignored
