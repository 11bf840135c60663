"""file_name of COCO's entries → images of the source, where that is certain."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError

Parts = tuple[str, ...]


def match_images(
    file: Path, entries: Sequence[Mapping[str, Any]], origins: Sequence[str]
) -> tuple[dict[int, int], str]:
    """Returns the number of the entry of each image that has one, and a note if extensions differ.

    The path of an image below the source is compared with file_name: whole, then by their ends where one of them has
    folders in front that the other lacks, then likewise without extensions. Backslashes count as slashes.
    Raises DataError if a name fits several images, or an image has several entries.
    """
    names: list[str] = [entry["file_name"] for entry in entries]
    matched: dict[int, int] = {}
    new: dict[int, int] = {}
    for split, by_end in ((_parts, False), (_parts, True), (_stem_parts, True)):
        find, new = _finder(origins, split, by_end), {}
        for entry in sorted(set(range(len(names))) - set(matched.values())):
            fits = find(names[entry])
            if len(fits) > 1:
                raise DataError(
                    f"--masks {file}: {names[entry]} fits several images of the source, {origins[fits[0]]} and "
                    f"{origins[fits[1]]}. Give the folder that the names are in, or names with their folders."
                )
            if not fits or fits[0] in matched:  # another name fits that image better
                continue
            if (other := new.setdefault(fits[0], entry)) != entry:
                raise DataError(
                    f"--masks {file} has two entries for the image {origins[fits[0]]}: {names[other]} (id "
                    f"{entries[other]['id']}) and {names[entry]} (id {entries[entry]['id']}). Merge them, or give the "
                    "folder that the names are in."
                )
        matched |= new
    for image, entry in new.items():  # of the last form
        first = f"{names[entry]} is taken for {origins[image]}"
        return matched, f"{len(new)} images have another extension in {file} ({first})"
    return matched, ""


def _finder(origins: Sequence[str], split: Callable[[str], Parts], by_end: bool) -> Callable[[str], list[int]]:
    """Returns a function that finds the images which a file_name fits.

    by_end  compare the ends of the paths, as long as the shorter one is; else the whole paths
    """
    paths = [split(origin) for origin in origins]
    images: dict[Any, list[int]] = {}
    for image, path in enumerate(paths):
        images.setdefault(path[-1] if by_end else path, []).append(image)

    def find(name: str) -> list[int]:
        path = split(name)
        return [image for image in images.get(path[-1] if by_end else path, ()) if _same_end(path, paths[image])]

    return find


def _parts(path: str) -> Parts:
    """Returns the folders and the name of a path, which may be that of another machine."""
    parts = unicodedata.normalize("NFC", path).replace("\\", "/").split("/")
    return tuple(part for part in parts if part not in ("", ".", "..")) or (path,)


def _stem_parts(path: str) -> Parts:
    *folders, name = _parts(path)
    return (*folders, name.rpartition(".")[0] or name)


def _same_end(one: Parts, other: Parts) -> bool:
    """Returns whether the longer path ends in the shorter."""
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]
