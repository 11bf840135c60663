"""--label-maps and --depth-maps: a folder of maps → the map of each image, as KEY.seg.png and KEY.depth.png.

1 list    the maps in the folder, by their paths without extension
2 match   the path of an image, as it is or without its leading folders, to one of them
3 check   each map as its image is packed: numbers of the right kind, as large as the image
"""

import hashlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from data.errors import DataError
from data.images.decode import image_size
from data.images.label_maps import read_classes, read_depths
from data.index.passed_over import PassedOver
from data.pack.sample import LazySamples, Read, Sample, Source

Kind = Literal["label", "depth"]
MEMBERS: Mapping[Kind, str] = {"label": "seg", "depth": "depth"}  # KEY.seg.png, KEY.depth.npy
FORMATS = (".png", ".npy", ".tif", ".tiff")


class Maps(NamedTuple):
    """What a pack records of its maps: extension of the members, hash of names and sizes of the files."""

    extension: str
    digest: str


def with_maps(
    source: Source, kind: Kind, folder: Path, renamed: str | None, passed_over: PassedOver
) -> tuple[Source, Maps]:
    """Returns the images that have a map in the folder, each with it beside, and what the plan records of the maps.

    renamed      OLD=NEW: text in the paths of images → that in its place in those of maps
    passed_over  counts images without a map, and maps without an image

    Raises DataError if there is no map for any image, or if two images would share one.
    """
    files = _list_maps(folder, kind)
    old, new = _split(renamed, kind)
    found: list[tuple[int, str]] = []
    owners: dict[str, str] = {}
    for number, sample in enumerate(source.samples):
        path = os.path.splitext(sample.origin.replace(old, new) if old else sample.origin)[0]
        name = next((name for name in _suffixes(path) if name in files), None)
        if name is None:
            passed_over.add(f"images without a {kind} map", sample.origin)
            continue
        if name in owners:
            raise DataError(
                f"{owners[name]} and {sample.origin} would share the map {folder / files[name]}. Arrange the maps in "
                "the same sub-folders as the images."
            )
        owners[name] = sample.origin
        found.append((number, files[name]))
    if not found:
        first = source.samples[0].origin if len(source.samples) else "none"
        raise DataError(
            f"--{kind}-maps {folder} has a map for none of the {len(source.samples):,} images; the first image is "
            f"{first}, the first map {next(iter(files.values()))}. Give the folder that holds the same names, or say "
            f"how they differ with --{kind}-name OLD=NEW."
        )
    passed_over.add(f"{kind} maps without an image", *(files[name] for name in files if name not in owners))
    extensions = sorted({os.path.splitext(file)[1].lower() for _, file in found})
    if len(extensions) > 1:
        raise DataError(
            f"--{kind}-maps {folder} has maps of several kinds ({', '.join(extensions)}). Convert them to one, so that "
            f"one setting names all of them."
        )
    extension = MEMBERS[kind] + extensions[0]
    digest = hashlib.sha256()
    for number, file in found:
        digest.update(os.fsencode(f"{source.samples[number].key}\0{file}\0{os.path.getsize(folder / file)}\n"))

    def make(row: int) -> Sample:
        number, file = found[row]
        sample = source.samples[number]
        if extension in (name.lower() for name, _ in sample.others):
            raise DataError(f"{sample.origin} has a .{extension} beside it already. Move those files elsewhere.")
        read = partial(_read_checked, folder / file, kind, sample.read)
        return sample._replace(others=(*sample.others, (extension, read)))

    return source._replace(samples=LazySamples(len(found), make)), Maps(extension, digest.hexdigest())


def _read_checked(file: Path, kind: Kind, image: Read) -> bytes:
    """Reads a map. Raises DataError if it is none of its kind, or not as large as its image."""
    try:
        data = file.read_bytes()
        size = (read_classes(data) if kind == "label" else read_depths(data, unit=1.0)).shape
    except (OSError, DataError) as error:
        raise DataError(f"its map {file}: {error}") from None
    if size != (wanted := tuple(image_size(image()))):
        raise DataError(f"its map {file} has {size[0]}x{size[1]} pixels and the image {wanted[0]}x{wanted[1]}")
    return data


def _list_maps(folder: Path, kind: Kind) -> dict[str, str]:
    """Returns path without extension → path in the folder, of all maps below it, in the order of their names."""
    if not folder.is_dir():
        raise DataError(f"--{kind}-maps {folder} is no folder. Check the path.")
    found = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, extension = os.path.splitext(os.path.relpath(os.path.join(parent, name), folder))
            if extension.lower() in FORMATS and not name.startswith("."):
                found[stem] = stem + extension
    if not found:
        raise DataError(f"--{kind}-maps {folder} holds no map: no file in it ends in {', '.join(FORMATS)}.")
    return found


def _split(renamed: str | None, kind: Kind) -> tuple[str, str]:
    if renamed is None:
        return "", ""
    old, equals, new = renamed.partition("=")
    if not old or not equals:
        raise DataError(f"--{kind}-name {renamed} is not OLD=NEW, such as leftImg8bit=gtFine_labelTrainIds.")
    return old, new


def _suffixes(path: str) -> list[str]:
    """Returns a path, and the same without its first folder, without its first two …"""
    parts = path.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]
