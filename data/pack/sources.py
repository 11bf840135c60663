"""Opens the path to be packed: a folder of images, tars, or a CSV list."""

import glob
import os
from pathlib import Path

from data.errors import DataError
from data.index.samples import IMAGES
from data.index.splits import COMPRESSED
from data.pack.csv_list import find_listed
from data.pack.image_folder import find_images
from data.pack.sample import Source
from data.pack.tar_samples import find_samples

TARS = (".tar", *COMPRESSED)
ENDINGS = tuple(f".{extension}" for extension in IMAGES)


def open_source(path: str, classes: list[str] | None = None) -> Source:
    """Returns the samples of a path, their labels by `classes` if given.

    Raises DataError if it is none of the sources, or one that cannot be packed.
    """
    if path.endswith(TARS) or (not os.path.exists(path) and ("{" in path or glob.has_magic(path))):
        return find_samples(path, classes)
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist. Check the path, and that the folder it is in is mounted.")
    if os.path.isdir(path):
        tar, image = _find_file(path, TARS), _find_file(path, ENDINGS)
        if tar and image:
            raise DataError(
                f"{path} holds both tars ({tar}) and images ({image}). "
                "Name the tars with a glob, or move them out of the folder of images."
            )
        return find_samples(path, classes) if tar else find_images(Path(path), classes)
    if path.lower().endswith(".csv"):
        return find_listed(Path(path), classes)
    raise DataError(
        f"{path} is not a folder of images, nor tars, nor a CSV list. "
        "Give a folder, a .tar, a glob of tars in quotes, or a .csv with the header path[,label]."
    )


def _find_file(folder: str, endings: tuple[str, ...]) -> str | None:
    """Returns a file with such an ending in a folder or in one of its sub-folders, which may be classes or splits."""
    for pattern in ("*", "*/*"):
        for path in glob.iglob(os.path.join(glob.escape(folder), pattern)):
            if path.lower().endswith(endings) and not os.path.isdir(path):
                return path
    return None
