"""Packs samples into shuffled shards with an index and a manifest."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.atomic import replace_file
from data.index.passed_over import PassedOver
from data.pack.assemble import assemble, check_bad
from data.pack.plan import WORK, PackPlan, begin_pack, check_out, hash_keys, hold
from data.pack.sample import Samples
from data.pack.writer import ShardJob, find_record, write_shard
from data.parallel import run

MAX_BAD = 100
QUALITY = 90
SHARD_SIZE = 1000
Part = tuple[int, int]


def pack(
    samples: Samples,
    out: Path,
    *,
    name: str,
    classes: list[str],
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    shorter_side: int | None = None,
    quality: int = QUALITY,
    jobs: int = 1,
    max_bad: int = MAX_BAD,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Packs the samples, in an order drawn from the seed, into OUT/NAME-000000.tar … and returns the manifest.

    Written as OUT.partial, from which a call with the same arguments resumes, and renamed when complete. Equal samples,
    seed and settings give equal bytes whatever the number of processes. Images that do not decode are left out and
    listed, in the manifest and in bad_files.txt.

    Raises DataError if OUT exists, if OUT.partial holds another pack, or if more than max_bad images, or all, do not
    decode.
    """
    check_out(out, overwrite)
    kept = quality if shorter_side else None
    plan = PackPlan(name, seed, shard_size, shorter_side, kept, len(samples), classes, hash_keys(samples))
    with hold(out):
        write_shards(plan, samples, out, None, jobs, max_bad, overwrite)
        return assemble(plan, out, max_bad=max_bad)[""]


def write_shards(
    plan: PackPlan,
    samples: Samples,
    out: Path,
    part: Part | None,
    jobs: int,
    max_bad: int,
    overwrite: bool,
    passed_over: PassedOver | None = None,
    split_of: np.ndarray | None = None,
) -> None:
    """Writes the shards of the plan, or of one part of it, that are not finished yet; within `hold`.

    split_of  [samples] split of each sample of a source that is divided (data/pack/divide.py)
    """
    folder = begin_pack(plan, out, shared=part is not None, overwrite=overwrite)
    with replace_file(folder / WORK / "passed_over.json", "w") as file:
        json.dump((passed_over or PassedOver()).to_json(), file)
    shards, contents = plan.shards, plan.contents(split_of)
    mine = range(part[0] - 1, len(shards), part[1]) if part else range(len(shards))
    records = {number: find_record(folder, shards[number], plan.digest) for number in mine}
    left = [number for number, record in records.items() if record is None]
    if len(left) < len(mine):
        print(f"resuming in {folder}: {len(mine) - len(left)} of {len(mine)} shards are finished", file=sys.stderr)
    bad = [entry for record in records.values() if record for entry in record.bad]
    check_bad(bad, max_bad)
    total = sum(len(contents[number]) for number in left)
    todo = _shard_jobs(plan, samples, folder, part, {shards[number]: contents[number] for number in left})
    try:
        with run(write_shard, todo, max(1, min(jobs, len(left))), "packing", total) as (written, bar):
            for record in written:
                for entry in record.bad:
                    bar.say(f"unreadable: {entry['file']}: {entry['reason']}")
                bad += record.bad
                check_bad(bad, max_bad)
    except KeyboardInterrupt:
        print(f"interrupted; repeat the command to resume in {folder}", file=sys.stderr)
        raise


def _shard_jobs(
    plan: PackPlan, samples: Samples, folder: Path, part: Part | None, contents: dict[str, np.ndarray]
) -> Iterator[ShardJob]:
    part_name = f"{part[0]}/{part[1]}" if part else ""
    for shard, numbers in contents.items():
        yield ShardJob(folder, plan, shard, [samples[number] for number in numbers.tolist()], part_name)
