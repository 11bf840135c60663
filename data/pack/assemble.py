"""Turns the shards of a plan into a data set: checks them, writes the manifest, renames the folder."""

import contextlib
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from data.atomic import publish, replace_file
from data.errors import DataError
from data.index import index_file
from data.index.build import build
from data.index.index import ShardIndex
from data.pack.plan import DIVISION, WORK, PackPlan, partial_folder, replaced_folder
from data.pack.writer import Record, find_record

MAX_NAMED = 5  # missing shards in an error


def check_bad(bad: list[dict[str, str]], max_bad: int) -> None:
    """Raises DataError if more images could not be decoded than may be skipped."""
    if len(bad) > max_bad:
        raise DataError(
            f"{len(bad)} images cannot be decoded, more than --max-bad {max_bad}; the last is {bad[-1]['file']}: "
            f"{bad[-1]['reason']}. Repeat the command with a higher --max-bad to resume; or repair them, remove the "
            "unfinished .partial folder, and pack again."
        )


def assemble(
    plan: PackPlan, out: Path, *, max_bad: int, verify: bool = False, jobs: int = 1
) -> dict[str, dict[str, Any]]:
    """Renames OUT.partial to OUT with a manifest in each part, and returns split -> manifest, with "" for a whole.

    verify  read all shards, which other machines may have written, and compare them with their recorded SHA-256

    Raises DataError if a shard is missing or damaged, or if too many images, or all of a part, do not decode.
    """
    folder = partial_folder(out)
    records = _find_records(plan, folder)
    check_bad([entry for record in records for entry in record.bad], max_bad)
    splits = {split: [x for x in records if os.path.dirname(x.tar) == split] for split in plan.splits or [""]}
    for split, mine in splits.items():
        _refuse_nothing_usable(plan, split, mine, folder)
    if verify:
        _verify_checksums(folder, [record for record in records if record.samples], jobs)
    manifests = {split: _complete_split(plan, folder, split, mine) for split, mine in splits.items()}
    for leftover in folder.rglob("*.tmp"):  # Writers that were killed leave them.
        leftover.unlink()
    _replace_folder(folder, out)
    shutil.rmtree(out / WORK)
    return manifests


def _refuse_nothing_usable(plan: PackPlan, split: str, records: list[Record], folder: Path) -> None:
    """Raises DataError, and removes OUT.partial, if no image of a part, or of the whole, decodes."""
    if any(record.samples for record in records):
        return
    shutil.rmtree(folder)
    bad = next((entry for record in records for entry in record.bad), None)
    first = f"{bad['file']}: {bad['reason']}" if bad else "there is none"
    of = f"{plan.splits[split]} images of the part {split}" if split else f"{plan.samples} images"
    raise DataError(f"none of the {of} can be used ({first}). Check the source.")


def _complete_split(plan: PackPlan, folder: Path, split: str, records: list[Record]) -> dict[str, Any]:
    """Writes bad_files.txt and the manifest of a part, or of the whole, and returns the manifest."""
    bad = [entry for record in records for entry in record.bad]
    if bad:
        with replace_file(folder / split / "bad_files.txt", "w", errors="surrogateescape") as file:
            file.writelines(f"{entry['file']}\t{entry['reason']}\n" for entry in bad)
    manifest = _build_manifest(plan, folder, split, records, bad)
    # A byte of a name that is not UTF-8 becomes \udce9, which JSON has for it.
    with replace_file(folder / split / "manifest.json", "w", errors="backslashreplace") as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def _find_records(plan: PackPlan, folder: Path) -> list[Record]:
    """Returns the records of all shards. Raises DataError if some are missing."""
    records, missing, shards = [], [], plan.shards
    for number, shard in enumerate(shards):
        record = find_record(folder, shard, plan.digest)
        records.append(record) if record else missing.append(number)
    if not missing:
        return records
    names = ", ".join(shards[number] for number in missing[:MAX_NAMED]) + (" …" if len(missing) > MAX_NAMED else "")
    counts = {int(record.part.partition("/")[2]) for record in records if record.part}
    of = ""
    if len(counts) == 1:
        count = counts.pop()
        parts = sorted({number % count + 1 for number in missing})
        of = f" of --part {', '.join(f'{part}/{count}' for part in parts)}"
    raise DataError(
        f"{folder} lacks {len(missing)} of the {len(shards)} shards{of}: {names}. "
        "Repeat those parts; or repeat the command without --part and --merge, which packs what is missing."
    )


def _verify_checksums(folder: Path, shards: list[Record], jobs: int) -> None:
    def sha256(record: Record) -> str:
        with open(folder / record.tar, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(jobs) as pool:  # Hashing releases the GIL.
        found = track(pool.map(sha256, shards), "verifying", len(shards), console=Console(stderr=True))
        for record, digest in zip(shards, found, strict=True):
            if digest != record.sha256:
                raise DataError(
                    f"{folder / record.tar} is damaged: its sha256 is {digest[:16]}…, on record {record.sha256[:16]}…. "
                    "Remove it and repeat its part."
                )


def _build_manifest(
    plan: PackPlan, folder: Path, split: str, records: list[Record], bad: list[dict[str, str]]
) -> dict[str, Any]:
    shards = [record for record in records if record.samples]
    tars = [str(folder / record.tar) for record in shards]
    files = [index_file.load(tar) or build(tar) for tar in tars]
    return {
        "name": f"{plan.name}-{split}" if split else plan.name,
        "samples": sum(record.samples for record in shards),
        "bytes": sum(record.bytes for record in shards),
        "fingerprint": ShardIndex(files).fingerprint,
        "seed": plan.seed,
        "shorter_side": plan.shorter_side,
        "quality": plan.quality,
        "reencoded": sum(record.reencoded for record in records),
        "classes": plan.classes,
        **_maps(plan),
        "shards": [
            {
                "file": os.path.basename(record.tar),
                "samples": record.samples,
                "bytes": record.bytes,
                "sha256": record.sha256,
            }
            for record in shards
        ],
        "bad": bad,
        # What is passed over belongs to no part: the first one counts it.
        "passed_over": _passed_over(folder) if split == next(iter(plan.splits), "") else {},
        **({"divided_by": {name: getattr(plan, name) for name in DIVISION}} if split else {}),
    }


def _maps(plan: PackPlan) -> dict[str, Any]:
    """Returns what the manifest says of maps beside the images; nothing if there are none."""
    found: dict[str, Any] = {}
    if plan.label_maps:
        names = {"classes": plan.label_classes} if plan.label_classes else {}
        void = {"void": plan.void} if plan.void is not None else {}
        extension = {"extension": plan.label_maps[0]} if plan.label_maps[0] else {}
        found["label_maps"] = {**extension, **names, **void}
    if plan.depth_maps:
        found["depth_maps"] = {"extension": plan.depth_maps[0]}
    return found


def _passed_over(folder: Path) -> dict[str, Any]:
    """Returns what of the source is not packed; {} for a pack that an earlier version has begun."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads((folder / WORK / "passed_over.json").read_text())
    return {}


def _replace_folder(partial: Path, out: Path) -> None:
    """Gives the complete folder its final name, and only then removes the folder that had it."""
    old = replaced_folder(out)
    if old.exists() and not out.exists():
        publish(old, out)  # A replacement was interrupted between its two renames.
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        publish(out, old)
    publish(partial, out)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(old)
