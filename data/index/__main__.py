"""Indexes tars that other programs wrote, so that their samples can be read by position.

python -m data.index SHARDS…                    local tars, or tars behind a URL
python -m data.index --unpack OUT SHARDS…       unpack .tar.gz first
"""

import argparse
import gzip
import os
import sys
import tarfile
import zlib
from pathlib import Path
from typing import IO

from data.atomic import replace_file
from data.errors import DataError, command
from data.index.index import ShardIndex, build_indexes, with_progress
from data.index.index_file import tie_error
from data.index.splits import COMPRESSED, list_shards, unpacked_name
from data.index.tar import BLOCK
from data.storage.claim import claim
from data.storage.credentials import hide

CHUNK = 1 << 20
# Images hardly compress, and zeros by a factor of a thousand: what grows more than this is no shard.
MAX_GROWTH, ALWAYS_ALLOWED = 100, 1 << 30


def unpack(packed: str, out: str | Path) -> str:
    """Unpacks a .tar.gz into the folder `out`; returns the path of the tar. One that is there already is compared.

    Raises DataError if it is damaged or no tar, grows beyond all measure, does not fit on the disk, or if the folder
    holds another file of that name. Then nothing is left behind.
    """
    tar = Path(out) / unpacked_name(os.path.basename(packed))
    try:
        with claim(str(tar)), gzip.open(packed) as source:
            if tar.exists():
                _require_same(source, tar, packed)
            else:
                with replace_file(tar) as target:
                    _copy(source, target, packed)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{packed} is no complete gzip file ({error}). Copy or download it again.") from None
    except OSError as error:
        raise DataError(
            f"{packed} cannot be unpacked to {tar} ({error.strerror}). Check the path, the free space and the "
            "permissions."
        ) from None
    return str(tar)


def _copy(source: gzip.GzipFile, target: IO[bytes], packed: str) -> None:
    limit, written = max(ALWAYS_ALLOWED, MAX_GROWTH * os.path.getsize(packed)), 0
    while chunk := source.read(CHUNK):
        if not written:
            _require_header(chunk, packed)
        written += len(chunk)
        if written > limit:
            raise DataError(
                f"{packed} would unpack to more than {limit:,} bytes, as no shard of images does. Check what it is; if "
                "it is in order, unpack it with gunzip."
            )
        target.write(chunk)
    if not written:
        raise DataError(f"{packed} holds nothing. Copy or download it again.")


def _require_header(chunk: bytes, packed: str) -> None:
    try:
        tarfile.TarInfo.frombuf(chunk[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if any(chunk[:BLOCK]):  # an empty archive has zeros there
            raise DataError(f"{packed} holds no tar archive ({error}). Check what it is.") from None


def _require_same(source: gzip.GzipFile, tar: Path, packed: str) -> None:
    """Raises DataError unless a tar holds what is unpacked from `source`."""
    with open(tar, "rb") as there:
        while (chunk := source.read(CHUNK)) or there.peek(1):
            if chunk != there.read(len(chunk) or 1):
                raise DataError(
                    f"{tar} is there already, and is not what {packed} holds. Move it, or choose another OUT."
                )


def _require_distinct_names(packed: list[str]) -> None:
    """Raises DataError if two archives would be unpacked to one file."""
    seen: dict[str, str] = {}
    for path in packed:
        name = unpacked_name(os.path.basename(path))
        if (other := seen.setdefault(name, path)) != path:
            raise DataError(f"{other} and {path} would both become {name}. Unpack them into two folders.")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.index", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="tars, globs, or folders of tars; local or URLs")
    parser.add_argument("--unpack", metavar="OUT", help="first unpack .tar.gz into this folder")
    parser.add_argument("--strict", action="store_true", help="end with exit code 2 if anything in them is not used")
    arguments = parser.parse_args(words)
    shards = [hide(shard) for shard in arguments.shards]
    if arguments.unpack:
        folders = [sorted(map(str, Path(path).iterdir())) if os.path.isdir(path) else [path] for path in shards]
        found = [path for folder in folders for path in folder]
        packed = [path for path in found if path.endswith(COMPRESSED)]
        if not packed:
            raise DataError(f"there is no .tar.gz or .tgz in {', '.join(shards)}. Leave out --unpack.")
        _require_distinct_names(packed)
        names = {unpacked_name(path) for path in packed}
        if others := [path for path in found if path.endswith(".tar") and path not in names]:
            print(f"{len(others)} tars are unpacked already and not copied, such as {others[0]}", file=sys.stderr)
        os.makedirs(arguments.unpack, exist_ok=True)
        shards = [unpack(path, arguments.unpack) for path in with_progress(packed, "unpacking", len(packed))]
    files = list(build_indexes(list_shards(shards)).values())
    index = ShardIndex(files)
    print(f"{len(index.shards)} shards, {len(index)} samples, fingerprint {index.fingerprint[:16]}")
    print(f"indexes in {', '.join(sorted({os.path.dirname(text) for text in index.texts}))}")
    if error := next(filter(None, map(tie_error, files)), None):
        if arguments.strict:
            raise error
        print(f"undecided: {error}")
    if index.passed_over:
        print(f"passed over: {index.passed_over}")
    if arguments.strict:
        index.passed_over.refuse()


if __name__ == "__main__":
    command(main)
