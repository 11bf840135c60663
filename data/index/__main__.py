"""Indexes tars that other programs wrote, so that their samples can be read by position.

python -m data.index SHARDS…                    local tars, or tars behind a URL
python -m data.index --unpack OUT SHARDS…       unpack .tar.gz first
"""

import argparse
import gzip
import os
import shutil
import zlib
from pathlib import Path

from data.atomic import replace_file
from data.errors import DataError, command
from data.index.index import ShardIndex, build_indexes, with_progress
from data.index.splits import COMPRESSED, list_shards, unpacked_name
from data.storage.credentials import hide


def unpack(packed: str, out: str | Path) -> str:
    """Unpacks a .tar.gz into the folder `out`; returns the path of the tar."""
    tar = Path(out) / unpacked_name(os.path.basename(packed))
    try:
        with gzip.open(packed) as source, replace_file(tar) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{packed} is no complete gzip file ({error}). Copy or download it again.") from None
    return str(tar)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.index", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="tars, globs, or folders of tars; local or URLs")
    parser.add_argument("--unpack", metavar="OUT", help="first unpack .tar.gz into this folder")
    arguments = parser.parse_args(words)
    shards = [hide(shard) for shard in arguments.shards]
    if arguments.unpack:
        folders = [sorted(map(str, Path(path).iterdir())) if os.path.isdir(path) else [path] for path in shards]
        packed = [path for folder in folders for path in folder if path.endswith(COMPRESSED)]
        if not packed:
            raise DataError(f"there is no .tar.gz or .tgz in {', '.join(shards)}. Leave out --unpack.")
        os.makedirs(arguments.unpack, exist_ok=True)
        shards = [unpack(path, arguments.unpack) for path in with_progress(packed, "unpacking", len(packed))]
    index = ShardIndex(list(build_indexes(list_shards(shards)).values()))
    print(f"{len(index.shards)} shards, {len(index)} samples, fingerprint {index.fingerprint[:16]}")
    print(f"indexes in {', '.join(sorted({os.path.dirname(text) for text in index.texts}))}")


if __name__ == "__main__":
    command(main)
