"""Index of one tar, in two files beside it.

X.idx       NVIDIA DALI's `wds2idx` text, v1.2: a line `v1.2 SAMPLES`, then for each sample one line of
            `EXTENSION OFFSET SIZE NAME` for each of its members. For other programs, and for the keys.
X.idx.bin   to be mapped into memory: a header, notes (JSON), then tables of records: offset and size of an image in the
            tar, start of its sample's line in X.idx, label or -1. The first table has the image of each sample, others
            all images of one extension where samples have several: which table is read is chosen at opening

If the tar's folder is remote or not writable, both lie in a cache folder: $MAE_CACHE or ~/.cache/mae-index.
Indexes of version 1, without notes and further tables, are converted where their text shows that nothing is missing.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.atomic import replace_file
from data.errors import DataError
from data.index.passed_over import BESIDE, PassedOver
from data.index.samples import (
    CLUTTER,
    FIRST,
    IMAGES,
    Part,
    Sample,
    find_image,
    group,
    read_parts,
    say_choice,
    split_name,
)
from data.index.tar import BLOCK, Member, TarBytes, open_local, open_remote, size_and_stamp
from data.storage import remote
from data.storage.cache import DEFAULT, ShardCache, cache_root
from data.storage.protocols import Missing, is_remote, split_path

# Magic, bytes of the tar, its stamp (data/index/tar.py), records of the first table, probe; since version 2 also the
# records of all tables, bytes of the notes, and 1 if they hold something to be said even if no image is chosen.
HEADER = struct.Struct("<8sQqQ8sQQQ")
HEADER_1 = struct.Struct("<8sQqQ8s")
MAGIC, MAGIC_1 = b"maeidx02", b"maeidx01"
RECORD = struct.Struct("<QQQq")
RECORDS = np.dtype([("offset", "<u8"), ("size", "<u8"), ("line", "<u8"), ("label", "<i8")])
PROBES = 8  # tar headers that tell a tar from another one of the same length
MAX_TABLES = 32  # extensions of images among which one can be chosen
END = 10240 + 2 * BLOCK  # bytes of zeros that end a tar, below this
ARCHIVES = (".tar", ".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar")

Record = tuple[int, int, int, int]


class IndexFile(NamedTuple):
    """Index of a tar, where it lies, and its table that is read."""

    tar: str
    text: str  # path of X.idx; X.idx.bin lies beside it
    samples: int
    tar_bytes: int
    stamp: int  # of the state of the tar, see data/index/tar.py
    probe: bytes  # hash of PROBES headers of the tar; of another table than the first one, of its extension too
    start: int  # of the table in X.idx.bin
    notes: dict[str, Any]  # {} unless an image is chosen or there is something to be said

    @property
    def passed_over(self) -> PassedOver:
        """Returns what of the tar is not used."""
        return PassedOver.from_json(self.notes.get("passed_over"))


def load(tar: str, cache: ShardCache = DEFAULT, notes: bool = False) -> IndexFile | None:
    """Returns a tar's index; None if there is none, or only that of another state of the tar.

    notes  read them in any case
    """
    size, stamp = size_and_stamp(tar, cache)
    for text in _index_paths(tar):
        with contextlib.suppress(OSError), open(f"{text}.bin", "rb", buffering=0) as file:
            header, length = file.read(HEADER.size), os.fstat(file.fileno()).st_size
            # Another time means other contents: labels may have been corrected without a change of any length.
            if _is_complete(header, length, size) and HEADER.unpack(header)[2] == stamp:
                wanted = notes or HEADER.unpack(header)[7]
                return _open(tar, text, header, file.read(HEADER.unpack(header)[6]) if wanted else b"")
    for text in _index_paths(tar):
        with contextlib.suppress(OSError):
            binary = Path(f"{text}.bin").read_bytes()
            if _is_complete_1(binary, size) and HEADER_1.unpack_from(binary)[2] == stamp:
                return _convert(tar, size, stamp, binary, Path(text).read_bytes())
    return None


def build(tar: str, cache: ShardCache = DEFAULT) -> IndexFile:
    """Reads the headers of a tar and writes its index. Raises DataError if it is damaged, not a tar, or has no image.

    A tar without any file has an index of no samples. Of a remote tar the first of these that is possible: copies the
    index beside it; downloads its headers by range requests; downloads it into the cache.
    """
    if not is_remote(tar):
        with open_local(tar) as opened:
            return _build(opened)
    if copied := _copy_remote_index(tar, cache):
        return copied
    try:
        return _build(open_remote(tar, cache))
    except remote.NoRanges:
        _, stamp = size_and_stamp(tar, cache)
        cache.forget_other_states(tar, stamp)
        with open_local(tar, cache.fetch(tar), stamp) as opened:
            return _build(opened)


def choose(file: IndexFile, image: str | None) -> IndexFile:
    """Returns the index with the table of the chosen images.

    image  extension of the member that is the image; FIRST: of several the first; None: the only one

    Raises DataError if there are several and none is chosen, or if no sample has the chosen one.
    """
    notes = file.notes
    if image is None and (error := tie_error(file)):
        raise error
    if image in (None, FIRST) or not file.samples:
        return file
    passed_over, tables = file.passed_over, notes["tables"]
    passed_over.counts.pop(BESIDE, None)
    if image not in tables:
        found = ", ".join(f".{name} ({count:,})" for name, (_, count, *_) in tables.items())
        raise DataError(f"{file.tar} has no image that ends in .{image}, only {found}. Set data.image to one of them.")
    row, count, lacking, beside = tables[image]
    if lacking:
        passed_over.add(f"samples without .{image}", lacking[1], count=lacking[0])
    if beside:
        passed_over.add(BESIDE, beside[1], count=beside[0])
    return file._replace(
        samples=count,
        probe=hashlib.blake2b(file.probe + image.encode(), digest_size=8).digest() if row else file.probe,
        start=file.start + row * RECORD.size,
        notes=notes | {"passed_over": passed_over.to_json()},
    )


def tie_error(file: IndexFile) -> DataError | None:
    """Returns the refusal of samples with several images, which says how to choose one; None if there are none."""
    if not file.notes.get("tied"):
        return None
    count, key, images, names = file.notes["tied"]
    return DataError(
        f"{file.tar} has {count:,} samples with more than one image: {key!r} has {images:,}, such as {names[0]!r} and "
        f"{names[1]!r}. {say_choice(split_name(name)[1].lower() for name in names)}"
    )


def encode(
    tar_bytes: int, stamp: int, probe: bytes, first: list[Record], further: list[Record], notes: dict[str, Any]
) -> bytes:
    """Returns the contents of X.idx.bin."""
    told = json.dumps(notes).encode()
    told += b" " * (-len(told) % 8)
    said = int(any(notes.get(name) for name in ("tied", "passed_over")))
    rows = len(first) + len(further)
    header = HEADER.pack(MAGIC, tar_bytes, stamp, len(first), probe, rows, len(told), said)
    return header + told + np.array(first + further, dtype=RECORDS).tobytes()


def _build(tar: TarBytes) -> IndexFile:
    passed_over = PassedOver()
    samples, firsts = group(tar.path, read_parts(tar, passed_over), passed_over)
    if not firsts and (samples or passed_over):
        raise _no_image(tar.path, samples, passed_over)
    offsets = np.array([image.offset for image, _ in firsts])
    return _write_index(tar.path, tar.size, tar.stamp, _probe(tar, offsets), samples, firsts, passed_over)


def _write_index(
    tar: str,
    size: int,
    stamp: int,
    probe: bytes,
    samples: list[Sample],
    firsts: list[tuple[Member, Sample]],
    passed_over: PassedOver,
) -> IndexFile:
    head = f"v1.2 {len(samples)}\n"
    lines, starts, position = [head], {}, len(head)
    for sample in samples:
        line = " ".join(map(_entry, sample.members.values())) + "\n"
        starts[id(sample)] = position
        lines.append(line)
        position += len(line) if line.isascii() else len(line.encode("utf-8", "surrogateescape"))
        if not sample.image_runs:
            names = [member.name for member in sample.members.values()]
            passed_over.add("files without an image of their key", *names, count=len(names))
    first = [(image.offset, image.size, starts[id(sample)], sample.label) for image, sample in firsts]
    further, notes = _tables(first, [sample for sample in samples if sample.image_runs], starts, passed_over)
    binary = encode(size, stamp, probe, first, further, notes)
    path = _write(tar, "".join(lines).encode("utf-8", "surrogateescape"), binary)
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


def _no_image(tar: str, samples: list[Sample], passed_over: PassedOver) -> DataError:
    names = [member.name for sample in samples for member in sample.members.values()]
    archives = [name for name in names if name.lower().endswith(ARCHIVES)]
    if archives and 2 * len(archives) > len(names):
        return DataError(
            f"{tar} holds {len(archives)} archives such as {archives[0]!r} and no image. Unpack it once, with "
            f"`tar -xf`; then use what comes out: tars of images as they are, or a folder for `python -m data.pack`."
        )
    others = f"; passed over: {passed_over}" if passed_over else ""
    return DataError(
        f"{tar} holds no image: none of its {len(names)} files ends in "
        f"{', '.join('.' + extension for extension in IMAGES)}{others}. Check that it is a shard of images."
    )


def _copy_remote_index(tar: str, cache: ShardCache) -> IndexFile | None:
    """Copies the index that lies beside a remote tar.

    Returns None if there is none, its tar has another length, or it stayed what it was when the tar changed.
    """
    folder, name = split_path(tar)
    beside = f"{folder}/{name.removesuffix('.tar')}.idx"
    try:
        binary, text = (remote.contents(url, cache.retry) for url in (f"{beside}.bin", beside))
    except Missing:
        return None
    size, stamp = size_and_stamp(tar, cache)
    with contextlib.suppress(OSError):
        known, old = Path(_index_paths(tar)[0]).read_bytes(), Path(f"{_index_paths(tar)[0]}.bin").read_bytes()
        same = known == text and (binary.startswith(MAGIC_1) or old[HEADER.size :] == binary[HEADER.size :])
        if same and HEADER.unpack_from(old)[2] != stamp:
            return None
    if _is_complete_1(binary, size):
        return _convert(tar, size, stamp, binary, text)
    if not _is_complete(binary, len(binary), size):
        return None
    fields = HEADER.unpack_from(binary)
    header = HEADER.pack(*fields[:2], stamp, *fields[3:])
    path = _write(tar, text, header + binary[HEADER.size :])
    return _open(tar, path, header, binary[HEADER.size :])


def _open(tar: str, text: str, header: bytes, notes: bytes) -> IndexFile:
    _, size, stamp, samples, probe, _, length, _ = HEADER.unpack(header)
    found = json.loads(notes[:length]) if notes else {}
    return IndexFile(tar, text, samples, size, stamp, probe, HEADER.size + length, found)


def _is_complete(header: bytes, length: int, tar_bytes: int) -> bool:
    """Returns whether X.idx.bin, of this length, is complete and belongs to a tar of `tar_bytes`."""
    if len(header) < HEADER.size:
        return False
    magic, described, _, _, _, rows, notes, _ = HEADER.unpack_from(header)
    return (magic, described, length) == (MAGIC, tar_bytes, HEADER.size + notes + rows * RECORD.size)


def _is_complete_1(binary: bytes, tar_bytes: int) -> bool:
    """Returns whether these are the contents of an X.idx.bin of version 1 that belongs to a tar of `tar_bytes`."""
    if len(binary) < HEADER_1.size:
        return False
    magic, described, _, samples, _ = HEADER_1.unpack_from(binary)
    return (magic, described, len(binary)) == (MAGIC_1, tar_bytes, HEADER_1.size + samples * RECORD.size)


def _convert(tar: str, size: int, stamp: int, binary: bytes, text: bytes) -> IndexFile | None:
    """Writes an index of version 1 anew; returns None if its text does not show that it has all of the tar."""
    records = np.frombuffer(binary, RECORDS, offset=HEADER_1.size)
    parts, end = _listed_parts(text, dict(zip(records["line"].tolist(), records["label"].tolist(), strict=True)))
    if not end or size - end >= END:
        return None
    if not is_remote(tar):
        with open_local(tar) as opened:
            if any(opened.pread(END, end)):
                return None
    passed_over = PassedOver()
    samples, firsts = group(tar, parts, passed_over)
    if [image.offset for image, _ in firsts] != records["offset"].tolist():
        return None
    return _write_index(tar, size, stamp, HEADER_1.unpack_from(binary)[4], samples, firsts, passed_over)


def _listed_parts(text: bytes, labels: dict[int, int]) -> tuple[list[Part], int]:
    """Returns the members in X.idx, and where the last one ends in the tar; 0 if there are gaps, or unknown labels.

    labels  of the samples, by the start of their line
    """
    parts: list[Part] = []
    end, position = 0, text.find(b"\n") + 1
    for contents in text[position:].splitlines(keepends=True):
        line = contents.decode("utf-8", "surrogateescape").rstrip("\n")
        members = list(parse_members(line))
        if line != " ".join(map(_entry, members)):
            return [], 0
        for member in members:
            key, extension = split_name(member.name)
            label = labels.get(position, -1) if extension.lower() == "cls" else -1
            gap = member.offset - end != BLOCK
            if gap or (extension.lower() == "cls" and label < 0) or not CLUTTER.isdisjoint(key.split("/")):
                return [], 0
            parts.append(Part(key, extension.lower(), member, label))
            end = member.offset + -(-member.size // BLOCK) * BLOCK
        position += len(contents)
    return parts, end


def _entry(member: Member) -> str:
    return f"{split_name(member.name)[1]} {member.offset} {member.size} {member.name}"


def parse_key(line: str, offset: int) -> str | None:
    """Returns the key of the sample on a line of X.idx, by its member at `offset`; None if that takes `parse_members`.

    Called for every sample of every batch; takes a tenth of the time of `parse_members`.
    """
    before, _, after = line.partition(f" {offset} ")
    end = f".{before.rpartition(' ')[2]}"
    name = after.partition(" ")[2]
    return name.partition(end)[0] if name.count(end) == 1 and (name.endswith(end) or f"{end} " in name) else None


def parse_members(line: str) -> Iterator[Member]:
    """Yields the members of the sample on a line of X.idx.

    Names may contain spaces; a name ends where it ends in its extension.
    """
    for found in re.finditer(r"(\S.*?) (\d+) (\d+) ((?:\S.*?/)?[^./]+\.\1)(?= |$)", line):
        yield Member(found[4], int(found[2]), int(found[3]))


def _probe(tar: TarBytes, offsets: np.ndarray) -> bytes:
    """Hashes the tar headers of PROBES images, evenly spaced."""
    digest = hashlib.blake2b(digest_size=8)
    for i in np.linspace(0, len(offsets) - 1, PROBES).astype(int) if len(offsets) else ():
        digest.update(tar.pread(BLOCK, int(offsets[i]) - BLOCK))
    return digest.digest()


def _index_paths(tar: str) -> list[str]:
    """Returns the possible paths of X.idx: beside a local tar; in the cache folder, by a hash of the tar's folder."""
    folder, base = split_path(tar if is_remote(tar) else os.path.abspath(tar))
    name = base.removesuffix(".tar") + ".idx"
    cached = os.path.join(
        cache_root(), hashlib.sha256(folder.encode("utf-8", "surrogateescape")).hexdigest()[:16], name
    )
    return [cached] if is_remote(tar) else [os.path.join(folder, name), cached]


def _write(tar: str, text: bytes, binary: bytes) -> str:
    """Writes both files and returns the path of X.idx."""
    path, *elsewhere = _index_paths(tar)
    folder = Path(path).parent
    # The superuser may write anywhere, but a folder without any write permission should stay as it is.
    if elsewhere and not (os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222):
        path = elsewhere[0]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for target, contents in ((path, text), (f"{path}.bin", binary)):
        with replace_file(target) as file:
            file.write(contents)
    return path
