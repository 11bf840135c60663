"""A run whose machines or ranks go away and come back sees what an uninterrupted one sees."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mae.run.checkpoint_files import checkpoints
from mae.run.folder import read_mapping
from tests.conftest import ROOT
from tests.processes import SMALL, Process, finish, losses, processes_of, start, state, wait_for_checkpoint
from tests.slurm_cluster import free_ports
from tests.test_sampling import random_losses

STEPS = 80


def words(log: Path, runs: Path, root: Path, name: str, micro_batch: int, *overrides: str) -> list[str]:
    """Returns the words after `python` or torchrun: a run that notes what it sees."""
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
    return ["-m", "tests.logged_run", str(log), *settings, *overrides]


def seen(log: Path) -> list[tuple]:
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def kill_all(process: Process) -> None:
    """SIGKILL to torchrun, its ranks and their loader workers: as a machine dies."""
    for pid in processes_of(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    finish(process, None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    """A run of one process; `whole.jsonl` beside it says what it has seen."""
    runs = tmp_path_factory.mktemp("whole")
    finish(start([sys.executable, *words(runs / "whole.jsonl", runs, built_in, "whole", 50)]))
    rows = seen(runs / "whole.jsonl")
    assert len(rows) == STEPS * 50 and len({(step, key) for step, key, _, _ in rows}) == len(rows)
    return runs / "whole"


def seen_in_pieces(tmp_path: Path, built_in: Path, *overrides: str) -> list[tuple]:
    """Returns what a run sees that is killed on two ranks, then on one, and ends on three."""
    log = tmp_path / "pieces.jsonl"
    kept: list[tuple] = []
    for micro_batch, ranks, until in ((12, 2, 10), (24, 1, 50), (8, 3, None)):
        log.unlink(missing_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        given = words(log, tmp_path, built_in, "pieces", micro_batch, *overrides)
        process = start([sys.executable, *launcher, *given])
        if until:
            wait_for_checkpoint(process, tmp_path / "pieces", step=until)
            kill_all(process)
            reached = int(checkpoints(tmp_path / "pieces")[0].stem.removeprefix("step-"))
            assert until <= reached < STEPS
        else:
            finish(process)
            reached = STEPS
        kept += [row for row in seen(log) if row[0] < reached]  # What came after the checkpoint is seen again.
    return kept


@pytest.mark.slow
def test_resume_on_two_one_three_ranks_sees_the_same_samples_and_masks(
    tmp_path: Path, built_in: Path, whole: Path
) -> None:
    assert sorted(seen_in_pieces(tmp_path, built_in)) == sorted(seen(whole.with_suffix(".jsonl")))


@pytest.mark.slow
def test_resume_on_two_one_three_ranks_chooses_the_same_samples(tmp_path: Path, built_in: Path) -> None:
    """By a table with a loss for each digit: about 700 of the 1,438 in an epoch, 14 steps."""
    sampling, losses = random_losses(built_in, tmp_path / "losses.npy")
    finish(start([sys.executable, *words(tmp_path / "whole.jsonl", tmp_path, built_in, "whole", 50, *sampling)]))
    rows_of_whole = seen(tmp_path / "whole.jsonl")
    assert len({(step, key) for step, key, _, _ in rows_of_whole}) == STEPS * 50
    chosen = (read_mapping(tmp_path / "whole" / "derived.json") or {})["data"]["sampling"]["images"]
    assert 600 < chosen == round(losses.astype(float).sum()) < 800
    epochs = [{key for step, key, _, _ in rows_of_whole if step // (chosen // 50) == epoch} for epoch in range(5)]
    assert {len(keys) for keys in epochs} == {chosen // 50 * 50} and len(set.union(*epochs)) > 1.5 * chosen
    assert sorted(seen_in_pieces(tmp_path, built_in, *sampling)) == sorted(rows_of_whole)


def starts(run: Path) -> list[tuple[int, int]]:
    """Returns the ranks and the first step of each start."""
    begun = (read_mapping(run / "environment.json") or {}).get("starts", [])
    return [(each["ranks"], each["step"]) for each in begun]


def wait_until(condition: Callable[[], bool], agents: list[Process]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        ended = next((agent for agent in agents if agent.poll() is not None), None)
        assert ended is None, finish(ended, None)  # pyright: ignore[reportArgumentType]
        assert time.monotonic() < deadline, "waited 180 s"
        time.sleep(0.02)


def documented_store(port: int) -> list[str]:
    """Returns the command in docs/clusters.md for a store outside of the machines that train, at another port."""
    (program,) = re.findall(r'python -c "(from .*TCPStore.*)"', (ROOT / "docs" / "clusters.md").read_text())
    return [sys.executable, "-c", program.replace("29500", str(port))]


@pytest.mark.slow
def test_machines_that_die_and_join_shrink_and_grow_the_run(tmp_path: Path, built_in: Path, whole: Path) -> None:
    """A torchrun for each machine: of two the one with rank 0 dies, then one joins, then another.

    The first restart uses up what `staying` may fail. `slow` looks for new machines every two seconds, and may not
    fail.
    """
    run, log = tmp_path / "run", tmp_path / "run.jsonl"
    (port,) = free_ports(1)

    def agent(restarts: int, *options: str) -> Process:
        torchrun = ["--nnodes=1:3", "--nproc-per-node=1", f"--max-restarts={restarts}", "--rdzv-backend=c10d"]
        torchrun += ["--rdzv-id=elastic", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", *options]
        torchrun += ["--rdzv-conf=is_host=false,last_call_timeout=8,keep_alive_interval=2,keep_alive_max_attempt=4"]
        launcher = [sys.executable, "-m", "torch.distributed.run", *torchrun]
        return start([*launcher, *words(log, tmp_path, built_in, "run", 8)], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    slowly = log.with_suffix(".slow")
    slowly.touch()
    store = subprocess.Popen(documented_store(port))
    try:
        dying = agent(1)
        wait_until(lambda: bool(processes_of(dying)), [dying])
        staying = agent(1)
        wait_for_checkpoint(dying, run, step=10)
        kill_all(dying)
        wait_until(lambda: starts(run)[-1][0] == 1, [staying])
        wait_for_checkpoint(staying, run, step=starts(run)[-1][1] + 5)
        slow = agent(0, "--monitor-interval=2")
        wait_until(lambda: starts(run)[-1][0] == 2, [staying, slow])
        wait_for_checkpoint(staying, run, step=starts(run)[-1][1] + 5)
        agents = [staying, slow, agent(0)]
        wait_until(lambda: starts(run)[-1][0] == 3, agents)
        slowly.unlink()
        for each in agents:
            finish(each)
    finally:
        store.kill()
        store.wait()

    assert starts(run)[0] == (2, 0) and starts(run)[1][0] == 1 and starts(run)[1][1] % 5 == 0  # a checkpoint
    assert set(log.read_text().splitlines()) == set(whole.with_suffix(".jsonl").read_text().splitlines())
    for key, loss in losses(whole).items():
        assert float(losses(run)[key]) == pytest.approx(float(loss), abs=1e-5), key
    weights = state(run)["model"]
    for name, value in state(whole)["model"].items():
        others = weights[name]
        if name.endswith("qkv.bias"):  # the gradient of a key's bias is zero: Adam divides rounding by rounding
            value, others = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (value, others))
        assert torch.allclose(value, others, rtol=0, atol=1e-6), name
