"""Samples of existing tars, to be packed anew."""

import os
import re
from functools import partial

from data.errors import DataError
from data.index.classes import class_names
from data.index.index import ShardIndex, open_shards
from data.index.naming import read_naming
from data.index.passed_over import BESIDE, PassedOver
from data.index.samples import split_name
from data.index.splits import find_splits
from data.pack.class_list import number_by_name
from data.pack.sample import LazySamples, Sample, Source
from data.storage.listing import Folder
from data.storage.read import read


def find_samples(
    source: str, given: list[str] | None = None, image: str | None = None, passed_over: PassedOver | None = None
) -> Source:
    """Returns the samples of the tars that a path means (see `splits.find_shards`), and the names of their classes.

    given        names of the classes by their new numbers (--classes); without it labels stay as they are, and their
                 names are those of manifest.json
    image        extension of the image of samples with several; the others are kept as side files
    passed_over  counts what is not packed

    Raises DataError if there are no such tars, one is damaged, they are of two splits or number their classes
    differently, or a class is not among those given.
    """
    if os.path.isdir(source) and len(found := find_splits(Folder(source))) > 1:
        name, tars = next(iter(found.items()))
        raise DataError(
            f"{source} holds the parts {' and '.join(found)}. Pack each on its own, with a folder or a glob as the "
            f"source: the part {name} begins with {tars[0]}."
        )
    index = open_shards(source, image=image)
    if passed_over is not None:
        passed_over.update(index.passed_over.but(BESIDE))
    classes = class_names(index.shards)
    numbers = None if given is None else _renumber(source, index, classes, given)
    samples = LazySamples(len(index), partial(_make_sample, index, numbers))
    remark = _remark_on_labels(index)
    return Source(samples, classes if given is None else given, remark, read_naming(index.shards))


def _remark_on_labels(index: ShardIndex) -> str:
    """Says how to get labels where each tar has the name of a class, as those of ImageNet have; else ""."""
    for shard, end in zip(index.shards, index.ends, strict=True):
        stem = os.path.basename(shard).removesuffix(".tar")
        if not re.match(re.escape(stem) + "[_/-]", index.key(end - 1).removeprefix("./")):
            return ""
    if len(index.shards) == 1 or (index.labels >= 0).any():
        return ""
    return (
        f"no sample has a label: if each of the {len(index.shards)} tars is a class, unpack each into a folder of its "
        "name, and pack the folder that holds these"
    )


def _renumber(source: str, index: ShardIndex, names: list[str], given: list[str]) -> dict[int, int]:
    """Returns label -> number in the list that is given, by name; labels without names are numbers in it already.

    Raises DataError if a label has no place in the list, or there are no labels.
    """
    labels = sorted({int(label) for label in index.labels if label >= 0})
    if not labels:
        raise DataError(f"{source} has no label to be numbered by --classes. Leave it out.")
    if labels[-1] >= (end := len(names or given)):
        what = "its manifest.json" if names else "--classes"
        raise DataError(f"{source} has the label {labels[-1]}, and {what} ends at {end - 1}. Extend it.")
    if not names:
        return {label: label for label in labels}
    numbers = number_by_name(given, [names[label] for label in labels], source)
    return {label: numbers[names[label]] for label in labels}


def _make_sample(index: ShardIndex, numbers: dict[int, int] | None, number: int) -> Sample:
    """Returns a sample of an index: its image, and all other members as side files; a label by its new number."""
    shard, offset, size = index.locate(number)
    tar, key, extension, others = index.shards[shard], "", "", []
    label = None if numbers is None else numbers.get(index.label(number))
    for member in index.members(number):
        if member.offset == offset:
            key, extension = split_name(member.name)
        elif label is None or split_name(member.name)[1].lower() != "cls":
            others.append((split_name(member.name)[1], partial(read, tar, member.offset, member.size)))
    return Sample(key, extension, label, f"{tar}/{key}.{extension}", partial(read, tar, offset, size), tuple(others))
