"""Samples of a tar → its index: the lines of X.idx, the tables of X.idx.bin, and the notes."""

import itertools
from collections import Counter
from typing import Any

from data.index.index_file import RECORD, IndexFile, Record, encode, entry, write
from data.index.passed_over import BESIDE, PassedOver
from data.index.samples import FIRST, Sample, find_image, split_name
from data.index.tar import Member

MAX_TABLES = 32  # extensions of images among which one can be chosen


def write_index(
    tar: str,
    size: int,
    stamp: int,
    probe: bytes,
    samples: list[Sample],
    firsts: list[tuple[Member, Sample]],
    passed_over: PassedOver,
) -> IndexFile:
    """Writes X.idx and X.idx.bin.

    firsts  the image of each sample of the first table
    """
    head = f"v1.2 {len(samples)}\n"
    lines, starts, position = [head], {}, len(head)
    for sample in samples:
        line = " ".join(map(entry, sample.members.values())) + "\n"
        starts[id(sample)] = position
        lines.append(line)
        position += len(line) if line.isascii() else len(line.encode("utf-8", "surrogateescape"))
        if not sample.image_runs:
            names = [member.name for member in sample.members.values()]
            passed_over.add("files without an image of their key", *names, count=len(names))
    first = [(image.offset, image.size, starts[id(sample)], sample.label) for image, sample in firsts]
    further, notes = _tables(first, [sample for sample in samples if sample.image_runs], starts, passed_over)
    binary = encode(size, stamp, probe, first, further, notes)
    path = write(tar, "".join(lines).encode("utf-8", "surrogateescape"), binary)
    return IndexFile(tar, path, len(first), size, stamp, probe, len(binary) - RECORD.size * len(first + further), notes)


def _tables(
    first: list[Record], samples: list[Sample], starts: dict[int, int], passed_over: PassedOver
) -> tuple[list[Record], dict[str, Any]]:
    """Returns the records of the tables after the first one, and the notes.

    notes["tables"][EXTENSION]  [first row, samples, those without it, images beside it]; of the last two [count, name]
    notes["tied"]               [samples with a tie, key of one, number and names of its images]
    """
    counts = Counter(itertools.chain.from_iterable(sample.images for sample in samples))
    if len(counts) <= 1:
        return [], {"tables": {extension: [0, len(first), None, None] for extension in counts}, **_say(passed_over)}
    further: list[Record] = []
    tables: dict[str, Any] = {}
    several = [sample for sample in samples if len(sample.images) > 1]
    for extension, count in counts.most_common(MAX_TABLES):
        chosen = [(sample.members[extension], sample) for sample in samples if extension in sample.members]
        rows = [(image.offset, image.size, starts[id(sample)], sample.label) for image, sample in chosen]
        row = 0 if rows == first[:count] else len(first) + len(further)
        without = [_image_names(sample)[0] for sample in samples if extension not in sample.members]
        tables[extension] = [row, count, _count(without), _count(_unread(several, extension))]
        further += rows if row else []
    notes: dict[str, Any] = {"tables": tables}
    if tied := [sample for sample in several if sample.tied]:
        names = _image_names(tied[0])
        notes["tied"] = [len(tied), split_name(names[0])[0], len(names), names[:4]]
    elif beside := _count(_unread(several)):
        passed_over.add(BESIDE, beside[1], count=beside[0])
    return further, notes | _say(passed_over)


def _say(passed_over: PassedOver) -> dict[str, Any]:
    return {"passed_over": passed_over.to_json()} if passed_over else {}


def _image_names(sample: Sample) -> list[str]:
    return [sample.members[extension].name for extension in sample.images]


def _unread(samples: list[Sample], image: str = FIRST) -> list[str]:
    """Returns the names of the images of these samples that are not read if this one is; of those without it, none."""
    found = []
    for sample in samples:
        if read := find_image(sample.members, image):
            found += [name for name in _image_names(sample) if name != read.name]
    return found


def _count(names: list[str]) -> list[Any] | None:
    return [len(names), names[0]] if names else None
