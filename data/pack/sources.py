"""Opens the path to be packed: a folder of images, tars, or a CSV list."""

import glob
import os
from collections.abc import Collection
from pathlib import Path

from data.errors import DataError
from data.index.passed_over import PassedOver
from data.index.splits import COMPRESSED, find_shards, unpacked_name
from data.pack.csv_list import find_listed
from data.pack.image_folder import Tree, make_samples, walk
from data.pack.sample import Source
from data.pack.tar_samples import find_samples

TARS = (".tar", *COMPRESSED)
BOOKKEEPING = (".idx", ".idx.bin", "manifest.json", "bad_files.txt")  # what is written beside tars


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
    passed_over = PassedOver() if passed_over is None else passed_over
    tree = walk(Path(path), leave_out, passed_over) if os.path.isdir(path) else None
    if tree and (tar := _first_above(tree.others, TARS)):
        return _open_tars(path, tar, tree, classes, image, passed_over)
    if path.endswith(TARS) or (not os.path.exists(path) and ("{" in path or glob.has_magic(path))):
        return find_samples(path, classes, image, passed_over)
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist. Check the path, and that the folder it is in is mounted.")
    if image is not None:
        raise DataError(f"--image {image} is for tars, whose samples may have several images. Leave it out.")
    if tree:
        return make_samples(tree, classes, passed_over)
    if path.lower().endswith(".csv"):
        return find_listed(Path(path), classes, group_by)
    raise DataError(
        f"{path} is not a folder of images, nor tars, nor a CSV list. "
        "Give a folder, a .tar, a glob of tars in quotes, or a .csv with the header path[,label]."
    )


def _open_tars(
    path: str, tar: str, tree: Tree, classes: list[str] | None, image: str | None, passed_over: PassedOver
) -> Source:
    """Returns the samples of the tars in a folder; counts all that lies beside them."""
    if picture := _first_above(tree.images):
        raise DataError(
            f"{path} holds both tars ({tar}) and images ({picture}). "
            "Name the tars with a glob, or move them out of the folder of images."
        )
    source = find_samples(path, classes, image, passed_over)
    used = {os.path.relpath(shard, path) for shard in find_shards(path)}
    beside = (file for file in (*tree.others, *tree.images) if unpacked_name(file) not in used)
    passed_over.add("files beside the tars", *(file for file in beside if not file.endswith(BOOKKEEPING)))
    return source


def _first_above(files: list[str], endings: tuple[str, ...] = ("",)) -> str | None:
    """Returns a file with such an ending in a folder or in one of its sub-folders, which may be classes or splits."""
    return next((file for file in files if file.lower().endswith(endings) and file.count("/") < 2), None)
