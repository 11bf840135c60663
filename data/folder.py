"""The images of a folder and their classes, ready to be packed."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError
from data.index_file import IMAGES
from data.splits import NAMES


class Sample(NamedTuple):
    """One image to be packed."""

    key: str
    extension: str
    label: int | None
    origin: str  # what the user knows it by
    read: Callable[[], bytes]


def find_images(source: Path) -> tuple[list[Sample], list[str], int]:
    """The images below a folder, the names of its classes, and the number of files that are no images.

    The classes are the sub-folders in alphabetical order; a flat folder has none. A key is the path within the folder
    without the extension, dots and spaces in it replaced by `_`: webdataset ends a key at its first dot, and the
    text index separates its fields by spaces.

    DataError: no folder, no images, sub-folders that are splits, images beside classes, two files with one key.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder. Give a folder of images, flat or with one sub-folder per class.")
    files, ignored = _walk(source)
    folders = sorted({path.parts[0] for path in files if len(path.parts) > 1})
    if splits := [name for name in folders if name.lower() in NAMES]:
        raise DataError(
            f"{source} has the sub-folder {splits[0]}, which is a split and no class. Pack each part on its own: "
            f"`python -m data.pack {source / splits[0]} OUT/{NAMES[splits[0].lower()]}`, and so on."
        )
    if not files:
        raise DataError(
            f"{source} holds no image among its {ignored} files: none ends in "
            f"{', '.join('.' + extension for extension in IMAGES)}. Check the path."
        )
    if folders and any(len(path.parts) == 1 for path in files):
        loose = next(path for path in files if len(path.parts) == 1)
        raise DataError(
            f"{source} holds both class folders ({folders[0]}) and images beside them ({loose}). "
            "Move those into a class folder, or pack them apart."
        )
    classes = {name: label for label, name in enumerate(folders)}
    samples, origins = [], {}
    for path in files:
        key = "/".join(re.sub(r"[.\s]", "_", part) for part in path.with_suffix("").parts)
        if key in origins:
            raise DataError(
                f"{source / origins[key]} and {source / path} would both get the key {key}, and be read as one sample. "
                "Rename one of them."
            )
        origins[key] = path
        label = classes.get(path.parts[0]) if folders else None
        samples.append(Sample(key, path.suffix[1:].lower(), label, str(path), partial(Path.read_bytes, source / path)))
    return samples, folders, ignored


def _walk(source: Path) -> tuple[list[Path], int]:
    """Paths of the images relative to the folder, sorted, and the number of other files; hidden ones do not count."""
    images, ignored = [], 0
    for folder, children, names in os.walk(source, followlinks=True):
        children[:] = [child for child in children if not child.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            path = Path(folder, name).relative_to(source)
            if path.suffix[1:].lower() in IMAGES:
                images.append(path)
            else:
                ignored += 1
    return sorted(images, key=lambda path: path.parts), ignored
