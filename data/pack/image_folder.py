"""Images of a folder with their classes and side files, to be packed."""

import os
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path

from data.errors import DataError
from data.index.passed_over import PassedOver
from data.index.samples import CLUTTER, IMAGES, IN_CLUTTER
from data.index.splits import split_of
from data.pack.class_list import number_by_name
from data.pack.sample import LazySamples, Sample, Source


def find_images(
    source: Path,
    given: list[str] | None = None,
    passed_over: PassedOver | None = None,
    leave_out: Collection[Path] = (),
) -> Source:
    """Returns the images below a folder with their side files, and the names of its classes.

    given        names of the classes by their numbers (--classes); else the sub-folders in alphabetical order, empty
                 ones included; a flat folder has none
    passed_over  counts what is not packed: hidden files, links that lead back, files named after no image
    leave_out    folders inside it that are not looked into, such as OUT

    A file a.EXTENSION beside a.jpg is kept as a side file of that image. Raises DataError if there is no folder or
    image, if sub-folders are splits, no classes that are given, or have images beside them, or if an image has two
    labels.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder. Give a folder of images, flat or with one sub-folder per class.")
    passed_over = PassedOver() if passed_over is None else passed_over
    images, rest, top = _walk(source, leave_out, passed_over)
    folders = sorted({path.partition("/")[0] for path in images if "/" in path})
    if splits := [(name, split) for name in folders if (split := split_of(name))]:
        name, split = splits[0]
        raise DataError(
            f"{source} has the sub-folder {name}, which is a split and no class. Pack each part on its own: "
            f"`python -m data.pack {source / name} OUT/{split}`, and so on."
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
    if ignored:
        passed_over.add("files that are neither images nor named after one", *ignored, count=len(ignored))
    classes, labels = _number_classes(source, folders, top - {path.partition("/")[0] for path in rest}, given)
    empty = len(classes) - len(labels) if folders else 0
    deep = sum(path.count("/") > 1 for path in images)
    notes = []
    if len(folders) == 1 and given is None:
        notes.append(
            f"all images have one class, {folders[0]}: if the folders in it are the classes, pack {source / folders[0]}"
        )
    if deep:
        notes.append(f"{deep} images lie deeper in the folder of their class: names of folders in it are not used")
    if empty:
        notes.append(f"{empty} of {len(classes)} classes have no image in {source}")

    def make(number: int) -> Sample:
        path = images[number]
        others = tuple((extension, read(side)) for extension, side in sides.get(number, ()))
        label = labels.get(path.partition("/")[0])
        return Sample(key_of_path(path), path.rpartition(".")[2].lower(), label, path, read(path), others)

    def read(path: str) -> partial[bytes]:
        return partial(read_file, f"{source}/{path}")

    return Source(LazySamples(len(images), make), classes, "; ".join(notes))


def _number_classes(
    source: Path, folders: list[str], empty: set[str], given: list[str] | None
) -> tuple[list[str], dict[str, int]]:
    """Returns the names of the classes, and the number of each sub-folder that has images.

    empty  other sub-folders, without any file

    Raises DataError if a folder is none of the classes that are given.
    """
    if given is not None:
        return given, number_by_name(given, folders, str(source))
    if not folders:
        return [], {}
    classes = sorted({*folders, *(name for name in empty if not split_of(name))})
    return classes, {name: number for number, name in enumerate(classes) if name in set(folders)}


def key_of_path(path: str) -> str:
    """Returns the path without its extension, dots and spaces in it replaced by `_`.

    webdataset ends a key at its first dot, and the text index separates its fields by spaces.
    """
    return re.sub(r"[.\s]", "_", os.path.splitext(path)[0])


def read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _walk(source: Path, leave_out: Collection[Path], passed_over: PassedOver) -> tuple[list[str], list[str], set[str]]:
    """Returns the paths of the images and of the other files below the folder, sorted, and its sub-folders.

    Links to folders are followed last, in alphabetical order, and no folder is entered twice.
    Raises DataError if a folder cannot be listed.
    """
    images: list[str] = []
    rest: list[str] = []
    top: set[str] = set()
    left_out = {path.resolve() for path in leave_out}
    seen = {_identity(folder) for folder in source.resolve().parents}
    folders, links = [""], list[str]()
    while folders or links:
        place = folders.pop() if folders else links.pop(links.index(min(links)))
        if (identity := _identity(source / place)) in seen:
            passed_over.add("links to folders that lead back or are packed already", place)
            continue
        seen.add(identity)
        if place and "/" not in place:
            top.add(place)
        for entry in _entries(source / place):
            path = f"{place}/{entry.name}" if place else entry.name
            folder, regular = _kind(entry)
            if entry.name.startswith("."):
                passed_over.add("hidden files and folders", path)
            elif folder and entry.name in CLUTTER:
                passed_over.add(IN_CLUTTER, path)
            elif folder:
                if not (left_out and Path(entry).resolve() in left_out):
                    (links if entry.is_symlink() else folders).append(path)
            elif not regular:
                passed_over.add("special files", path)
            else:
                (images if Path(path).suffix[1:].lower() in IMAGES else rest).append(path)
    return sorted(images, key=lambda path: path.split("/")), sorted(rest), top


def _identity(folder: Path) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror}), so that its images would be missing. Check its permissions."
        ) from None


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Returns whether an entry is a folder, and whether it is a file; a link that leads nowhere fails as an image."""
    try:
        return entry.is_dir(), entry.is_file() or (entry.is_symlink() and not os.path.exists(entry))
    except OSError:  # links in a circle
        return False, True


def _match_side_files(images: list[str], rest: list[str]) -> tuple[dict[int, list[tuple[str, str]]], list[str]]:
    """Returns (extension, path) of the side files of each image, and the files that belong to none."""
    numbers = {os.path.splitext(path)[0]: number for number, path in enumerate(images)} if rest else {}
    sides: dict[int, list[tuple[str, str]]] = {}
    ignored: list[str] = []
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
            ignored.append(path)
    return sides, ignored
