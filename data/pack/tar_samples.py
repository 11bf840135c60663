"""Samples of existing tars, to be packed anew."""

import os
from functools import partial

from data.errors import DataError
from data.index.index import ShardIndex, open_shards
from data.index.index_file import split_name
from data.index.splits import find_splits
from data.pack.sample import LazySamples, Sample, Source
from data.storage.listing import Folder
from data.storage.protocols import split_path
from data.storage.read import read


def find_samples(source: str) -> Source:
    """Returns the samples of the tars that a path means (see `splits.find_shards`).

    The classes are those of the manifest, if there is one. Raises DataError if there are no such tars, one is damaged,
    or they are of two splits.
    """
    if os.path.isdir(source) and len(found := find_splits(Folder(source))) > 1:
        name, tars = next(iter(found.items()))
        raise DataError(
            f"{source} holds the parts {' and '.join(found)}. Pack each on its own, with a folder or a glob as the "
            f"source: the part {name} begins with {tars[0]}."
        )
    index = open_shards(source)
    samples = LazySamples(len(index), partial(_make_sample, index))
    return Source(samples, _read_classes({split_path(shard)[0] for shard in index.shards}))


def _make_sample(index: ShardIndex, number: int) -> Sample:
    """Returns a sample of an index: its image, and all other members as side files."""
    shard, offset, size = index.locate(number)
    tar, key, extension, others = index.shards[shard], "", "", []
    for member in index.members(number):
        if member.offset == offset:
            key, extension = split_name(member.name)
        else:
            others.append((split_name(member.name)[1], partial(read, tar, member.offset, member.size)))
    return Sample(key, extension, None, f"{tar}: {key}", partial(read, tar, offset, size), tuple(others))


def _read_classes(folders: set[str]) -> list[str]:
    """Returns the names of the classes from the manifest, if all tars are in one folder that has one."""
    manifest = Folder(next(iter(folders))).manifest() if len(folders) == 1 else None
    classes = (manifest or {}).get("classes", [])
    return classes if isinstance(classes, list) and all(isinstance(name, str) for name in classes) else []
