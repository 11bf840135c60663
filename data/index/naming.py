"""What manifest.json says of label maps: names of the classes, and the number that stands for none."""

from collections.abc import Iterable
from typing import NamedTuple

from data.errors import DataError
from data.index.classes import names_in
from data.storage.listing import Folder
from data.storage.protocols import split_path


class Naming(NamedTuple):
    """Names of the classes by number, [] if unknown; the number of no class, and the extension of the maps, if known.

    stated  whether a manifest speaks of label maps, and not of classes alone
    """

    names: list[str]
    void: int | None
    extension: str = ""
    stated: bool = False


def read_naming(shards: Iterable[str]) -> Naming:
    """Returns what the manifests beside the shards say of their label maps.

    `label_maps` of manifest.json has `classes` and `void`; without it they stand in the manifest itself. Where no
    manifest speaks of maps, the longest list of classes. Raises DataError if two folders say different things.
    """
    folders = dict.fromkeys(split_path(shard)[0] or "." for shard in shards)
    found = {folder: _naming(Folder(folder)) for folder in folders}
    stated = {folder: naming for folder, naming in found.items() if naming.stated}
    if not stated:
        return max(found.values(), key=lambda naming: len(naming.names))
    first = next(iter(stated))
    for folder, naming in stated.items():
        if naming != stated[first]:
            raise DataError(
                f"manifest.json of {first} and of {folder} name the classes of label maps differently. Give both the "
                "same `classes` and `void`, or read one of them."
            )
    return stated[first]


def _naming(folder: Folder) -> Naming:
    manifest = folder.manifest() or {}
    block = manifest.get("label_maps")
    if block is not None and not isinstance(block, dict):
        raise DataError(
            f"{folder.file('manifest.json')} has `label_maps` {block!r}, which is no object with `classes` and `void`. "
            "Make it one, or remove it."
        )
    said = manifest if block is None else block
    void = said.get("void")
    if void is not None and (not isinstance(void, int) or isinstance(void, bool) or not 0 <= void < 1 << 16):
        raise DataError(
            f"{folder.file('manifest.json')} has `void` {void!r}, which is no number of 16 bits. Take 0 … 65535."
        )
    extension = str((block or {}).get("extension", ""))
    return Naming(names_in(folder, said), void, extension, block is not None or void is not None)
