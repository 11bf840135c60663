"""Sentences for a path of images where shards are wanted: the command that packs them."""

import contextlib
import os
from shlex import quote

from data.index.splits import ENDINGS, NAMES, split_of
from data.storage.listing import Folder


def no_shard(path: str, file: str) -> str:
    """Returns the sentence for a path that means an image or a list, `file`."""
    source = file if file.lower().endswith(".csv") else os.path.dirname(file) or "."
    what = "images or lists" if path != file else "a list" if source == file else "an image"
    name = os.path.splitext(os.path.basename(os.path.abspath(source)))[0]
    out = os.path.join("datasets", name or "photos")
    verb = "matches" if path != file else "is"
    return (
        f"{path} {verb} {what} and no shard. Pack images with `python -m data.pack {quote(source)} {quote(out)} "
        f"--val 0.05`, and give the path {out}."
    )


def way_to_shards(folder: str, wanted: str | None) -> str:
    """Returns the end of a sentence: the commands that pack the images of a folder, and the path to give then.

    wanted  split that the folder was to give
    """
    if not _holds_images(folder):
        return ", and no image that could be packed. Check the path."
    place = os.path.abspath(folder)
    parent, name = os.path.split(place)
    split = split_of(name)
    out = os.path.join("datasets", (os.path.basename(parent) if split else name) or "photos")
    split = split or (wanted if wanted != "train" else None)
    if _is_inside(os.path.abspath(out), place) or _is_inside(place, os.path.abspath(out)):
        out += "-packed"
    parts = [(child, NAMES[child.lower()]) for child in Folder(folder).folders(NAMES)]
    if split:
        packs = [f"{quote(folder)} {quote(os.path.join(out, split))}"]
    elif parts:
        packs = [f"{quote(os.path.join(folder, child))} {quote(os.path.join(out, part))}" for child, part in parts]
    else:
        packs = [f"{quote(folder)} {quote(out)} --val 0.05"]
    commands = " and ".join(f"`python -m data.pack {words}`" for words in packs)
    return f", but images. Pack them with {commands}, and give the path {out} instead."


def _holds_images(folder: str, levels: int = 3) -> bool:
    """Returns True if there is a file called like an image in a folder, or so many levels below it."""
    inside = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                inside.append(entry.path)
            elif entry.name.lower().endswith(ENDINGS):
                return True
    return levels > 1 and any(_holds_images(path, levels - 1) for path in sorted(inside))


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder
