"""A run that is killed on two ranks and goes on with one, and then with three, sees what an uninterrupted one sees."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from mae.run.checkpoint_files import checkpoints
from tests.processes import SMALL, Process, finish, processes_of, start, wait_for_checkpoint

STEPS = 110


def words(log: Path, runs: Path, root: Path, name: str, micro_batch: int, *overrides: str, ranks: int) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    settings = (
        *SMALL,
        f"runs={runs}",
        f"data.root={root}",
        f"name={name}",
        "global_batch=50",
        f"micro_batch={micro_batch}",
        f"max_steps={STEPS}",
        "val_every=null",
        "checkpoint.every_steps=5",
        "precision=32-true",
        "data.lanes=2",
        "data.workers=1",
    )
    return [*launcher, "-m", "tests.logged_run", str(log), *settings, *overrides]


def seen(log: Path) -> list[tuple]:
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def kill_all(process: Process) -> None:
    """SIGKILL to torchrun, its ranks and their loader workers."""
    for pid in processes_of(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    finish(process, None)


@pytest.mark.slow
def test_resume_on_two_one_three_ranks_sees_the_same_samples_and_masks(tmp_path: Path, built_in: Path) -> None:
    finish(start(words(tmp_path / "whole.jsonl", tmp_path, built_in, "whole", 50, ranks=1)))
    whole = seen(tmp_path / "whole.jsonl")
    assert len(whole) == STEPS * 50 and len({(step, key) for step, key, _, _ in whole}) == len(whole)

    log = tmp_path / "pieces.jsonl"
    kept: list[tuple] = []
    for micro_batch, ranks, until in ((12, 2, 10), (24, 1, 50), (8, 3, None)):
        log.unlink(missing_ok=True)
        process = start(words(log, tmp_path, built_in, "pieces", micro_batch, ranks=ranks))
        if until:
            wait_for_checkpoint(process, tmp_path / "pieces", step=until)
            kill_all(process)
            reached = int(checkpoints(tmp_path / "pieces")[0].stem.removeprefix("step-"))
            assert until <= reached < STEPS
        else:
            finish(process)
            reached = STEPS
        kept += [row for row in seen(log) if row[0] < reached]  # What came after the checkpoint is seen again.
    assert sorted(kept) == sorted(whole)
