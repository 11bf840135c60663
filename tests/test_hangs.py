"""A run that hangs writes the stacks of its ranks, says for which one the others wait, and comes back."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from mae.callbacks.hang_verdict import judge
from mae.callbacks.hang_watch import HangWatch
from mae.callbacks.throughput import LoopTimer
from mae.run.metrics import read_metrics
from tests.processes import assert_same_run, command, finish, ranks_of, run, start, wait_for_checkpoint

LENGTH = ("max_steps=30", "checkpoint.every_steps=5", "val_every=20", "data.workers=1", "precision=32-true")


def signs(*counts: int, talks: int = 7, limit: float = 600) -> list[list]:
    """Returns signs of ranks that have waited 700 s; the limit is that of rank 0."""
    return [
        [talks, count, 700, limit if rank == 0 else 600, f"backward of {rank}"] for rank, count in enumerate(counts)
    ]


BEFORE = signs(8, 8, 8, talks=1)


@pytest.mark.parametrize(
    ("now", "speaker", "sentence"),
    [
        ([*signs(8, 8), BEFORE[2]], 0, "rank 2, without a sign of life, last seen in backward of 2"),
        (signs(8, 6, 8), 0, "rank 1, for 700 s in backward of 1"),
        (signs(6, 8, 6), 1, "rank 0, 2, for 700 s in backward of 0"),
        (signs(8, 8, 8), 0, "all 3 ranks, for 700 s in backward of 0"),
        (BEFORE, 1, "rank 0, which holds the store of the process group and does not answer"),
    ],
    ids=["silent", "behind", "two behind", "together", "store"],
)
def test_verdict_names_the_ranks_that_are_waited_for(now: list[list], speaker: int, sentence: str) -> None:
    assert json.loads(judge(BEFORE, now, 3)) == [speaker, f"the run hangs: it waits for {sentence}"]


def test_verdict_waits_for_a_rank_within_its_own_limit() -> None:
    assert judge(BEFORE, signs(6, 8, 8, limit=3600), 3) == ""


def test_limit_follows_the_median_within_a_step_after_the_first(tmp_path: Path) -> None:
    timer = LoopTimer()
    watch = HangWatch(tmp_path, 600, 3600, timer)
    timer.start("run_training_batch")
    assert watch.limit == 3600  # compiles
    timer.stop("run_training_batch")
    timer.start("save_checkpoint")
    assert watch.limit == 3600
    timer.stop("save_checkpoint")
    timer.start("run_training_batch")
    assert watch.limit == 600
    timer.batches.extend([50, 60, 5000])
    assert watch.limit == 20 * 55


def start_of_two(runs: Path, root: Path, *settings: str, places: list | None = None, restarts: int = 1):
    """Starts two ranks under torchrun; with `places` those of tests.hanging_run."""
    words = command(runs, root, *LENGTH, *settings, ranks=2)
    words.insert(words.index("--standalone"), f"--max-restarts={restarts}")
    if places is not None:
        at = words.index("train.py")
        words[at : at + 1] = ["-m", "tests.hanging_run", json.dumps(places)]
    return start(words, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted_run")
    run(command(runs, built_in, *LENGTH, "name=whole", ranks=2))
    return runs / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_stopped_rank_is_named_and_the_run_comes_back(
    tmp_path: Path, built_in: Path, uninterrupted_run: Path, stopped: int
) -> None:
    process = start_of_two(tmp_path, built_in, "name=stopped", "hang.step=3")
    folder = tmp_path / "stopped"
    wait_for_checkpoint(process, folder, step=10)
    begun = time.monotonic()
    os.kill(ranks_of(process)[stopped], signal.SIGSTOP)  # and never SIGCONT

    while not list((folder / "hangs").glob("*.txt")):
        assert process.poll() is None and time.monotonic() - begun < 60
        time.sleep(0.05)
    found, rows = time.monotonic() - begun, len(read_metrics(folder / "metrics.csv"))
    while len(read_metrics(folder / "metrics.csv")) == rows:
        assert process.poll() is None and time.monotonic() - begun < 200
        time.sleep(0.05)
    print(f"rank {stopped}: found after {found:.1f} s, training again after {time.monotonic() - begun:.1f} s")

    output = finish(process)
    assert f"error: the run hangs: it waits for rank {stopped}, " in output
    (stacks,) = (folder / "hangs").iterdir()
    assert stacks.name.endswith(f"-rank-0000{1 - stopped}.txt")
    assert "in fit\n" in stacks.read_text()  # the stack of the main thread too
    assert_same_run(folder, uninterrupted_run)


@pytest.mark.slow
def test_slow_first_step_data_validation_and_save_do_not_end_the_run(
    tmp_path: Path, built_in: Path, uninterrupted_run: Path
) -> None:
    places = [["step", 1, 0, 6], ["data", 1, 7, 6], ["validation", 1, 20, 6], ["save", 0, 25, 6]]
    output = finish(start_of_two(tmp_path, built_in, "name=slow", "hang.step=2", places=places, restarts=0))
    assert output.count("stands still") == len(places)
    assert not (tmp_path / "slow" / "hangs").exists()
    assert_same_run(tmp_path / "slow", uninterrupted_run)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["step", "library"])
def test_rank_that_hangs_in_a_call_is_named(tmp_path: Path, built_in: Path, place: str) -> None:
    process = start_of_two(tmp_path, built_in, "name=call", "hang.step=2", places=[[place, 1, 7, 600]], restarts=0)
    output = finish(process, code=1)
    assert "error: the run hangs: it waits for rank 1, " in output
    written = {path.name[-9:-4]: path.read_text() for path in (tmp_path / "call" / "hangs").iterdir()}
    assert "in _pass\n" in (written["00001"] if place == "step" else output)  # while a library keeps the interpreter
