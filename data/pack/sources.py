"""Opens the path to be packed: a folder of images, tars, or a CSV list."""

import glob
import os
from collections.abc import Collection
from pathlib import Path

from data.errors import DataError
from data.index.passed_over import PassedOver
from data.index.splits import COMPRESSED, ENDINGS
from data.pack.csv_list import find_listed
from data.pack.image_folder import find_images
from data.pack.sample import Source
from data.pack.tar_samples import find_samples

TARS = (".tar", *COMPRESSED)


def open_source(
    path: str,
    classes: list[str] | None = None,
    image: str | None = None,
    passed_over: PassedOver | None = None,
    leave_out: Collection[Path] = (),
    group_by: str | None = None,
) -> Source:
    """Returns the samples of a path, their labels by `classes` if given.

    image        extension of the image of samples with several, of tars
    passed_over  counts what is not packed
    leave_out    folders that are not looked into
    group_by     column of a list that names the group of each image

    Raises DataError if it is none of the sources, or one that cannot be packed.
    """
    if path.endswith(TARS) or (not os.path.exists(path) and ("{" in path or glob.has_magic(path))):
        return find_samples(path, classes, image, passed_over)
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist. Check the path, and that the folder it is in is mounted.")
    folder = os.path.isdir(path)
    if folder:
        tar, picture = _find_file(path, TARS, leave_out), _find_file(path, ENDINGS, leave_out)
        if tar and picture:
            raise DataError(
                f"{path} holds both tars ({tar}) and images ({picture}). "
                "Name the tars with a glob, or move them out of the folder of images."
            )
        if tar:
            return find_samples(path, classes, image, passed_over)
    if image is not None:
        raise DataError(f"--image {image} is for tars, whose samples may have several images. Leave it out.")
    if folder:
        return find_images(Path(path), classes, passed_over, leave_out)
    if path.lower().endswith(".csv"):
        return find_listed(Path(path), classes, group_by)
    raise DataError(
        f"{path} is not a folder of images, nor tars, nor a CSV list. "
        "Give a folder, a .tar, a glob of tars in quotes, or a .csv with the header path[,label]."
    )


def _find_file(folder: str, endings: tuple[str, ...], leave_out: Collection[Path]) -> str | None:
    """Returns a file with such an ending in a folder or in one of its sub-folders, which may be classes or splits."""
    left_out = {path.resolve() for path in leave_out}
    for pattern in ("*", "*/*"):
        for path in glob.iglob(os.path.join(glob.escape(folder), pattern)):
            named = path.lower().endswith(endings) and not os.path.isdir(path)
            if named and left_out.isdisjoint(Path(path).resolve().parents):
                return path
    return None
