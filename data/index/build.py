"""Builds the index of a tar, once: from its headers, or from the index that lies beside a remote one."""

import contextlib
import hashlib
import struct
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.index import version_1
from data.index.index_file import HEADER, IndexFile, index_paths, is_complete, open_index, write
from data.index.passed_over import PassedOver
from data.index.samples import IMAGES, Sample, group, read_parts
from data.index.tables import write_index
from data.index.tar import BLOCK, TarBytes, open_local, open_remote, size_and_stamp
from data.storage import remote
from data.storage.cache import DEFAULT, ShardCache
from data.storage.protocols import Missing, is_remote, split_path

PROBES = 8  # tar headers that tell a tar from another one of the same length
ARCHIVES = (".tar", ".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar")


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


def _build(tar: TarBytes) -> IndexFile:
    passed_over = PassedOver()
    samples, firsts = group(tar.path, read_parts(tar, passed_over), passed_over)
    if not firsts and (samples or passed_over):
        raise _no_image(tar.path, samples, passed_over)
    offsets = np.array([image.offset for image, _ in firsts])
    return write_index(tar.path, tar.size, tar.stamp, _probe(tar, offsets), samples, firsts, passed_over)


def _no_image(tar: str, samples: list[Sample], passed_over: PassedOver) -> DataError:
    names = [member.name for sample in samples for member in sample.members.values()]
    archives = [name for name in names if name.lower().endswith(ARCHIVES)]
    if archives and 2 * len(archives) > len(names):
        return DataError(
            f"{tar} holds {len(archives)} archives such as {archives[0]!r} and no image. Unpack it once, with "
            "`tar -xf`; then use what comes out: tars of images as they are, or a folder for `python -m data.pack`."
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
    with contextlib.suppress(OSError, struct.error):  # There is none, or a torn one.
        known, old = Path(index_paths(tar)[0]).read_bytes(), Path(f"{index_paths(tar)[0]}.bin").read_bytes()
        same = known == text and (binary.startswith(version_1.MAGIC_1) or old[HEADER.size :] == binary[HEADER.size :])
        if same and HEADER.unpack_from(old)[2] != stamp:
            return None
    if version_1.is_complete(binary, size):
        return version_1.convert(tar, size, stamp, binary, text)
    if not is_complete(binary, len(binary), size):
        return None
    fields = HEADER.unpack_from(binary)
    header = HEADER.pack(*fields[:2], stamp, *fields[3:])
    path = write(tar, text, header + binary[HEADER.size :])
    return open_index(tar, path, header, binary[HEADER.size :])


def _probe(tar: TarBytes, offsets: np.ndarray) -> bytes:
    """Hashes the tar headers of PROBES images, evenly spaced."""
    digest = hashlib.blake2b(digest_size=8)
    for i in np.linspace(0, len(offsets) - 1, PROBES).astype(int) if len(offsets) else ():
        digest.update(tar.pread(BLOCK, int(offsets[i]) - BLOCK))
    return digest.digest()
