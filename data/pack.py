"""An image folder becomes shuffled shards with an index and a manifest.

    python -m data.pack IMAGES OUT

IMAGES is flat or has one sub-folder per class. The bytes of the files are kept as they are.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset.writer import ShardWriter

from data import index_file
from data.decode import verify
from data.draw import PACK, key, permutation
from data.errors import DataError, command
from data.folder import Sample, find_images
from data.index import ShardIndex
from data.splits import NAMES

MAX_BAD = 100


def pack(
    samples: list[Sample],
    out: Path,
    *,
    name: str,
    classes: list[str],
    seed: int = 0,
    shard_size: int = 1000,
    shard_bytes: float = 1e12,
    max_bad: int = MAX_BAD,
    overwrite: bool = False,
) -> dict[str, Any]:
    """The manifest of a new folder of shards NAME-000000.tar … with the samples in an order drawn from the seed.

    Written as OUT.partial and renamed when complete. Equal samples, seed and sizes give equal bytes. Images that do not
    decode are left out and listed, in the manifest and in bad_files.txt.

    DataError: OUT exists, more than max_bad images do not decode, none does.
    """
    _check_out(out, overwrite)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        print(f"replacing {partial}, left over by a pack that was interrupted", file=sys.stderr)
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        bad = _write_shards(_shuffled(samples, seed), partial / name, shard_size, shard_bytes, max_bad)
        if len(bad) == len(samples):
            first = f"{bad[0]['file']}: {bad[0]['reason']}" if bad else "there is none"
            raise DataError(f"none of the {len(samples)} images can be decoded ({first}). Check the source folder.")
        manifest = _manifest(partial, name, classes, seed, bad)
        if bad:
            (partial / "bad_files.txt").write_text("".join(f"{entry['file']}\t{entry['reason']}\n" for entry in bad))
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    except DataError:
        shutil.rmtree(partial)
        raise
    _rename(partial, out)
    return manifest


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise DataError(f"{out} exists already. Choose another place, or replace it with --overwrite.")
    if not (out / "manifest.json").exists():
        raise DataError(f"{out} is no packed data set (it has no manifest.json). Remove it yourself if it may go.")


def _shuffled(samples: list[Sample], seed: int) -> list[Sample]:
    return [samples[i] for i in permutation(key(seed, PACK), np.arange(len(samples)))]


def _write_shards(
    samples: list[Sample], prefix: Path, shard_size: int, shard_bytes: float, max_bad: int
) -> list[dict[str, str]]:
    """What could not be decoded, as file and reason, after everything else has been written."""
    bad: list[dict[str, str]] = []
    pattern = str(prefix).replace("%", "%%") + "-%06d.tar"
    # Nothing of the machine, the user or the hour may get into the headers.
    same = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "format": "GNU_FORMAT", "encoder": False}
    with (
        _bar() as bar,
        ShardWriter(pattern, maxcount=shard_size, maxsize=shard_bytes, verbose=0, **same) as writer,
    ):
        task = bar.add_task("packing", total=len(samples), rate="")
        for sample in samples:
            try:
                data = sample.read()
                verify(data)
            except (DataError, OSError) as error:
                bad.append({"file": sample.origin, "reason": str(error)})
                said = f"unreadable: {sample.origin}: {error}"
                bar.console.print(said, markup=False, highlight=False, soft_wrap=True)
                if len(bad) > max_bad:
                    raise DataError(
                        f"{len(bad)} images cannot be decoded, more than --max-bad {max_bad}; the last is "
                        f"{sample.origin}: {error}. Repair or remove them, or raise --max-bad."
                    ) from None
            else:
                label = {} if sample.label is None else {"cls": str(sample.label).encode()}
                writer.write({"__key__": sample.key, sample.extension: data, **label})
            bar.advance(task)
            bar.update(task, rate=f"{bar.tasks[0].completed / max(bar.tasks[0].elapsed or 0, 1e-3):,.0f} images/s")
    return bad


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def _manifest(folder: Path, name: str, classes: list[str], seed: int, bad: list[dict[str, str]]) -> dict[str, Any]:
    """Indexes the shards and describes them."""
    files, shards = [], []
    for tar in sorted(folder.glob("*.tar")):
        files.append(index_file.build(str(tar)))
        with open(tar, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        shards.append({"file": tar.name, "samples": files[-1].samples, "bytes": files[-1].tar_bytes, "sha256": sha256})
    return {
        "name": name,
        "samples": sum(file.samples for file in files),
        "bytes": sum(file.tar_bytes for file in files),
        "fingerprint": ShardIndex(files).fingerprint,
        "seed": seed,
        "classes": classes,
        "shards": shards,
        "bad": bad,
    }


def _rename(partial: Path, out: Path) -> None:
    """The complete folder under its final name; what had that name goes only then."""
    old = out.with_name(f"{out.name}.replaced")
    if old.exists() and not out.exists():
        os.rename(old, out)  # A replacement was interrupted between its two renames.
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
    os.rename(partial, out)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(old)


def default_name(out: Path) -> str:
    """The folder's name, with its parent's where it is only a split: imagenet/train gives imagenet-train."""
    out = out.absolute()
    return f"{out.parent.name}-{out.name}" if out.name.lower() in NAMES and out.parent.name else out.name


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.pack", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of images, flat or with one sub-folder per class")
    parser.add_argument("out", type=Path, help="folder to be created; end it in /train, /val or /test to pack a part")
    parser.add_argument("--name", help="of the shards: NAME-000000.tar (default: the name of OUT)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples (default 0)")
    parser.add_argument("--shard-size", type=_positive, default=1000, metavar="N", help="samples per shard (1000)")
    parser.add_argument("--shard-bytes", type=_positive, default=10**12, metavar="N", help="and bytes at most, about")
    parser.add_argument("--max-bad", type=int, default=MAX_BAD, metavar="N", help=f"images to skip (default {MAX_BAD})")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once the new one is complete")
    arguments = parser.parse_args(words)
    options = vars(arguments)
    source, out, name = options.pop("source"), options.pop("out"), options.pop("name")
    name = name or default_name(out)
    if "/" in name:
        raise DataError(f"--name {name} contains a slash. It is the beginning of file names in OUT, not a path.")
    _check_out(out, arguments.overwrite)
    samples, classes, ignored = find_images(source)
    if ignored:
        print(f"{ignored} files in {source} are no images and are left out", file=sys.stderr)
    manifest = pack(samples, out, name=name, classes=classes, **options)
    bad = f", {len(manifest['bad'])} unreadable left out (bad_files.txt)" if manifest["bad"] else ""
    labels = f", {len(classes)} classes" if classes else ", no labels"
    print(f"{out}: {manifest['samples']} samples in {len(manifest['shards'])} shards{labels}{bad}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


if __name__ == "__main__":
    command(main)
