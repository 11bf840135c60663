"""Images of a folder with their classes and side files, to be packed.

1 walk     the files below the folder: images and others
2 match    other files → the images that they are named after
3 number   sub-folders → classes
"""

import os
import re
from collections.abc import Collection, Container, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError
from data.index.passed_over import PassedOver
from data.index.samples import CLUTTER, IMAGES, IN_CLUTTER
from data.index.splits import split_of
from data.pack.class_list import number_by_name
from data.pack.sample import LazySamples, Sample, Source
from data.storage.read import require_readable


class Tree(NamedTuple):
    """Files below a folder, by their paths in it."""

    root: Path
    images: list[str]
    others: list[str]
    folders: set[str]  # sub-folders of the root, empty ones included


def find_images(
    source: Path,
    given: list[str] | None = None,
    passed_over: PassedOver | None = None,
    leave_out: Collection[Path] = (),
) -> Source:
    """Returns the images below a folder with their side files, and the names of its classes.

    leave_out  folders inside it that are not looked into, such as OUT

    Raises DataError if there is no folder, or one cannot be listed, and as `make_samples` does.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder. Give a folder of images, flat or with one sub-folder per class.")
    passed_over = PassedOver() if passed_over is None else passed_over
    return make_samples(walk(source, leave_out, passed_over), given, passed_over)


def make_samples(tree: Tree, given: list[str] | None, passed_over: PassedOver) -> Source:
    """Returns the images with their side files, and the names of the classes.

    given        names of the classes by their numbers (--classes); else the sub-folders in alphabetical order, empty
                 ones included; a flat folder has none
    passed_over  counts the files named after no image

    A file a.EXTENSION beside a.jpg is kept as a side file of that image. Raises DataError if there is no image, if
    sub-folders are splits, no classes that are given, or have images beside them, or if an image has two labels.
    """
    source, images = tree.root, tree.images
    folders = sorted({path.partition("/")[0] for path in images if "/" in path})
    splits = [] if given is not None else [name for name in folders if split_of(name)]
    _check_layout(tree, folders, splits)
    sides, ignored, like_sides = _match_side_files(images, tree.others)
    passed_over.add("files that are neither images nor named after one", *ignored)
    label = next((path for side in sides.values() for name, path in side if name.lower() == "cls"), None)
    if folders and label:
        raise DataError(
            f"{source / label} would give its image a second label beside that of the sub-folder. "
            "Remove the .cls files, or put the images into one flat folder."
        )
    if given is not None and not (folders or label):
        raise DataError(f"{source} has no sub-folder or .cls file to be numbered by --classes. Leave it out.")
    empty = tree.folders - {path.partition("/")[0] for path in tree.others}
    classes, labels = _number_classes(source, folders, empty, given)

    def read(path: str) -> partial[bytes]:
        return partial(read_file, f"{source}/{path}")

    def make(number: int) -> Sample:
        path = images[number]
        others = tuple((extension, read(side)) for extension, side in sides.get(number, ()))
        label = labels.get(path.partition("/")[0])
        return Sample(key_of_path(path), path.rpartition(".")[2].lower(), label, path, read(path), others)

    remarks = list(_remark_on_folders(tree, folders, classes, labels, given))
    if splits:
        remarks.append(
            f"the folder {splits[0]} is taken for a class as the {len(folders) - 1} beside it, not for a part"
        )
    if like_sides:
        remarks.append(
            f"{len(like_sides)} images are named after another one, such as {like_sides[0]}, and packed as samples of "
            "their own: move them elsewhere if they are label maps"
        )
    return Source(LazySamples(len(images), make), classes, "; ".join(remarks))


def _check_layout(tree: Tree, folders: list[str], splits: list[str]) -> None:
    """Raises DataError if it is unclear what the sub-folders with images are, or if there is no image.

    splits  sub-folders that are named like a split; a single one among other classes may be vehicles on rails
    """
    source = tree.root
    if len(splits) > 1 or (splits and len(folders) < 3):
        raise DataError(
            f"{source} has the sub-folder {splits[0]}, which is a split and no class. Pack each part on its own: "
            f"`python -m data.pack {source / splits[0]} OUT/{split_of(splits[0])}`, and so on; if it is a class, name "
            "all classes by --classes."
        )
    if not tree.images:
        raise DataError(
            f"{source} holds no image among its {len(tree.others)} files: none ends in "
            f"{', '.join('.' + extension for extension in IMAGES)}. Check the path."
        )
    if folders and (loose := next((path for path in tree.images if "/" not in path), None)):
        raise DataError(
            f"{source} holds both class folders ({folders[0]}) and images beside them ({loose}). "
            "Move those into a class folder, or pack them apart."
        )


def _remark_on_folders(
    tree: Tree, folders: list[str], classes: list[str], labels: dict[str, int], given: list[str] | None
) -> Iterator[str]:
    """Yields what may not be meant: packing one level too high, classes without an image."""
    if len(folders) == 1 and given is None:
        yield (
            f"all images have one class, {folders[0]}: if the folders in it are the classes, pack "
            f"{tree.root / folders[0]}"
        )
    if deep := sum(path.count("/") > 1 for path in tree.images):
        yield f"{deep} images lie deeper in the folder of their class: names of folders in it are not used"
    if folders and (empty := len(classes) - len(labels)):
        yield f"{empty} of {len(classes)} classes have no image in {tree.root}"


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
    """Returns the contents of a file. Raises DataError if it is too large for one member of a tar."""
    with open(path, "rb") as file:
        require_readable(path, os.fstat(file.fileno()).st_size)
        return file.read()


def walk(source: Path, leave_out: Collection[Path], passed_over: PassedOver) -> Tree:
    """Returns the files below a folder, sorted. Links to folders are followed last, and no folder is entered twice.

    passed_over  counts hidden files, folders of thumbnails, links that lead back, special files

    Raises DataError if a folder cannot be listed.
    """
    images: list[str] = []
    others: list[str] = []
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
            elif folder and entry.name in (*CLUTTER, "lost+found"):
                passed_over.add(IN_CLUTTER, path)
            elif folder:
                if not (left_out and Path(entry).resolve() in left_out):
                    (links if entry.is_symlink() else folders).append(path)
            elif not regular:
                passed_over.add("special files", path)
            else:
                (images if Path(path).suffix[1:].lower() in IMAGES else others).append(path)
    return Tree(source, sorted(images, key=lambda path: path.split("/")), sorted(others), top)


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


def _match_side_files(
    images: list[str], others: list[str]
) -> tuple[dict[int, list[tuple[str, str]]], list[str], list[str]]:
    """Returns (extension, path) of the side files of each image, the files that belong to none, and images alike.

    The last are images called as the side file of another one would be: a.seg.png beside a.jpg.
    """
    dotted = [path for path in images if "." in os.path.splitext(path.rpartition("/")[2])[0]]
    numbers = {os.path.splitext(path)[0]: number for number, path in enumerate(images)} if others or dotted else {}
    sides: dict[int, list[tuple[str, str]]] = {}
    ignored: list[str] = []
    for path in others:
        if stem := _stem_among(path, numbers):
            sides.setdefault(numbers[stem], []).append((re.sub(r"\s", "_", path[len(stem) + 1 :]), path))
        else:
            ignored.append(path)
    return sides, ignored, [path for path in dotted if _stem_among(os.path.splitext(path)[0], numbers)]


def _stem_among(path: str, stems: Container[str]) -> str:
    """Returns the longest of the stems that a path begins with up to a dot: a.b of a.b.json, else a; else ""."""
    folder, slash, name = path.rpartition("/")
    words = name.split(".")
    candidates = (folder + slash + ".".join(words[:cut]) for cut in range(len(words) - 1, 0, -1))
    return next((stem for stem in candidates if stem in stems), "")
