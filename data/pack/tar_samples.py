"""The samples of tars that exist already, ready to be packed anew."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data.errors import DataError
from data.index.index import ShardIndex, open_shards
from data.index.index_file import split_name
from data.index.splits import find_splits
from data.pack.sample import Sample, Source
from data.storage.listing import LocalFolder
from data.storage.read import read


class TarSamples:
    """The samples of an index, made when asked for: their images, and all other members as side files."""

    def __init__(self, index: ShardIndex):
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Sample:
        shard, offset, size = self.index.locate(number)
        tar, key, extension, others = self.index.shards[shard], "", "", []
        for member in self.index.members(number):
            if member.offset == offset:
                key, extension = split_name(member.name)
            else:
                others.append((split_name(member.name)[1], partial(read, tar, member.offset, member.size)))
        return Sample(key, extension, None, f"{tar}: {key}", partial(read, tar, offset, size), tuple(others))


def find_samples(source: str) -> Source:
    """The samples of the tars that a path means (see `splits.find_shards`), and their classes if a manifest names them.

    DataError: no such tars, two splits together, a tar that is damaged.
    """
    if os.path.isdir(source) and len(found := find_splits(LocalFolder(source))) > 1:
        name, tars = next(iter(found.items()))
        raise DataError(
            f"{source} holds the parts {' and '.join(found)}. Pack each on its own, with a folder or a glob as the "
            f"source: the part {name} begins with {tars[0]}."
        )
    index = open_shards(source)
    return Source(TarSamples(index), _classes({os.path.dirname(shard) for shard in index.shards}))


def _classes(folders: set[str]) -> list[str]:
    """The names of the classes by the manifest of the one folder that the tars are in."""
    try:
        manifest = json.loads(Path(*folders, "manifest.json").read_text()) if len(folders) == 1 else {}
    except (FileNotFoundError, ValueError):
        return []
    classes = manifest.get("classes", []) if isinstance(manifest, dict) else []
    return classes if isinstance(classes, list) and all(isinstance(name, str) for name in classes) else []
