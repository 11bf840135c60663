"""What a path to be packed is: a folder of images, tars, or a CSV list."""

import glob
import os
from pathlib import Path

from data.csv_list import find_listed
from data.errors import DataError
from data.folder import find_images
from data.sample import Source
from data.splits import COMPRESSED, NAMES
from data.tar_samples import find_samples

TARS = (".tar", *COMPRESSED)


def open_source(path: str) -> Source:
    """The samples of a path. DataError: it is none of the sources, or one that cannot be packed."""
    if path.endswith(TARS) or (not os.path.exists(path) and ("{" in path or glob.has_magic(path))):
        return find_samples(path)
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist. Check the path, and that the folder it is in is mounted.")
    if os.path.isdir(path):
        return find_samples(path) if _has_tars(Path(path)) else find_images(Path(path))
    if path.lower().endswith(".csv"):
        return find_listed(Path(path))
    raise DataError(
        f"{path} is not a folder of images, nor tars, nor a CSV list. "
        "Give a folder, a .tar, a glob of tars in quotes, or a .csv with the header path[,label]."
    )


def _has_tars(folder: Path) -> bool:
    """Whether tars lie in a folder or in those of its sub-folders that are splits."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file() and entry.name.endswith(TARS):
                return True
            if entry.name.lower() in NAMES and entry.is_dir() and any(n.endswith(TARS) for n in os.listdir(entry)):
                return True
    return False
