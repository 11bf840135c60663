"""A run that was stopped in any way goes on as if nothing had happened."""

import os
import random
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import mae
from mae.distributed.launch import Topology
from mae.distributed.stop import Stopped
from mae.errors import CheckpointError, ConfigError
from mae.run.checkpoint_files import checkpoint_path, newest_valid, verify
from mae.run.checkpoint_writer import write_checkpoint
from mae.run.folder import starting_point
from tasks.train import train
from tests.processes import (
    SMALL,
    STEPS_PER_EPOCH,
    assert_same_run,
    command,
    kill,
    losses,
    run,
    start,
    wait_for_checkpoint,
)
from tests.test_experiments import compose

STEPS = 60


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted_run")
    run(command(runs, built_in, f"max_steps={STEPS}", "name=whole"))
    return runs / "whole"


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("workers", "every", "where"),
    [
        (0, STEPS_PER_EPOCH // 2 + 5, "mid-epoch"),
        pytest.param(2, STEPS_PER_EPOCH, "edge", marks=slow),
        pytest.param(2, STEPS_PER_EPOCH // 2 + 5, "mid-epoch", marks=slow),
        pytest.param(0, STEPS_PER_EPOCH, "edge", marks=slow),
    ],
)
def test_killed_run_resumes_to_the_uninterrupted_run(
    tmp_path: Path, built_in: Path, uninterrupted_run: Path, workers: int, every: int, where: str
) -> None:
    words = command(
        tmp_path,
        built_in,
        f"max_steps={STEPS}",
        "name=killed",
        f"data.workers={workers}",
        f"checkpoint.every_steps={every}",
    )
    process = start(words)
    wait_for_checkpoint(process, tmp_path / "killed")
    delay = random.Random(f"{workers} {where}").uniform(0, 0.2)
    time.sleep(delay)
    kill(process)
    newest = newest_valid(tmp_path / "killed")
    assert newest is not None
    step = int(newest.stem.removeprefix("step-"))
    assert (step % STEPS_PER_EPOCH == 0) == (where == "edge"), f"killed {delay:.3f} s after a checkpoint, at {step}"
    assert step < STEPS
    output = run(words)
    assert newest.name in output.replace("\n", "")
    assert_same_run(tmp_path / "killed", uninterrupted_run)


@pytest.mark.slow
def test_torn_checkpoint_is_skipped_with_a_warning(tmp_path: Path, built_in: Path, uninterrupted_run: Path) -> None:
    words = command(tmp_path, built_in, f"max_steps={STEPS}", "name=torn", "checkpoint.every_steps=8")
    process = start(words)
    wait_for_checkpoint(process, tmp_path / "torn", step=16)
    kill(process)
    newest = newest_valid(tmp_path / "torn")
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    assert "was probably cut off" in run(words).replace("\n", " ")
    assert_same_run(tmp_path / "torn", uninterrupted_run)


class Recorder(pl.Callback):
    """Notes (step, key) of every sample, and has the process signalled at one step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.seen: list[tuple[int, str]] = []
        self.stop_at = stop_at

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.seen += [(trainer.global_step, key) for key in batch["keys"]]
        if trainer.global_step == self.stop_at and batch_idx % trainer.accumulate_grad_batches == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def record(tmp_path: Path, root: Path, name: str, micro_batch: int, stop_at: int | None = None) -> Recorder:
    config = compose(
        f"runs={tmp_path}",
        f"data.root={root}",
        *SMALL,
        f"name={name}",
        "max_steps=30",
        "data.workers=0",
        "precision=32-true",
        f"micro_batch={micro_batch}",
    )
    torch.set_num_threads(1)  # two that share a busy core wait for each other: 20 times as long
    recorder = Recorder(stop_at)
    before = signal.getsignal(signal.SIGTERM)
    try:
        train(config, Topology(rank=0, ranks=1, devices=1, nodes=1), [recorder])
    except Stopped as stop:
        assert stop.exit_code == 143 and stop_at is not None
    assert signal.getsignal(signal.SIGTERM) == before, "a process that has trained can no longer be ended"
    return recorder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> tuple[Path, Recorder]:
    """A run with accumulation 2 that is not stopped, and what it saw."""
    runs = tmp_path_factory.mktemp("recorded")
    return runs / "whole", record(runs, built_in, "whole", 32)


@pytest.mark.parametrize("later", [pytest.param(64, marks=slow), 16], ids=["accumulation 1", "accumulation 4"])
def test_resume_with_another_accumulation_sees_the_same_samples(
    tmp_path: Path, built_in: Path, recorded: tuple[Path, Recorder], later: int
) -> None:
    """Accumulation 2, stopped in the middle of the first epoch, carried on into the second."""
    folder, whole = recorded
    first = record(tmp_path, built_in, "stopped", 32, stop_at=12)
    second = record(tmp_path, built_in, "stopped", later)
    assert {step for step, _ in first.seen} == set(range(13))
    assert {step for step, _ in second.seen} == set(range(13, 30))
    assert sorted(first.seen + second.seen) == sorted(whole.seen)
    # The same images under the same masks: the losses agree but for the order of summation.
    one, other = losses(folder), losses(tmp_path / "stopped")
    assert one.keys() == other.keys()
    assert all(float(one[key]) == pytest.approx(float(other[key]), rel=1e-5) for key in one)


def test_run_stopped_at_its_validation_step_keeps_the_validation(tmp_path: Path, built_in: Path) -> None:
    record(tmp_path, built_in, "whole", 64)
    first = record(tmp_path, built_in, "stopped", 64, stop_at=19)  # validated after step 20
    record(tmp_path, built_in, "stopped", 64)
    assert {step for step, _ in first.seen} == set(range(20))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def finished(tmp_path: Path, root: Path, *overrides: str) -> tuple[list[str], Path]:
    words = command(tmp_path, root, "name=done", "max_steps=4", "data.workers=0", *overrides)
    run(words)
    return words, checkpoint_path(tmp_path / "done", 4)


def test_finished_run_is_replaced_only_with_overwrite(tmp_path: Path, built_in: Path) -> None:
    words, final = finished(tmp_path, built_in)
    before = final.stat().st_mtime_ns
    assert "is finished" in run(words).replace("\n", " ")
    assert final.stat().st_mtime_ns == before
    assert "step 4, and max_steps or epochs make 3 steps" in run([*words, "max_steps=3"], code=2).replace("\n", " ")
    assert "two runs would be mixed" in run([*words, "resume=never"], code=2).replace("\n", " ")
    assert final.stat().st_mtime_ns == before
    run([*words, "resume=never", "overwrite=true"])
    assert final.stat().st_mtime_ns > before


def test_starting_point_is_the_newest_checkpoint_that_resume_allows(tmp_path: Path) -> None:
    """Own checkpoints win over given ones that are older; a warm start is no matter of resuming."""
    own, other = tmp_path / "own", tmp_path / "other"
    for path in (checkpoint_path(own, 20), checkpoint_path(other, 10), checkpoint_path(other, 30)):
        write_checkpoint({"mae": {"step": 0}}, path)
    assert starting_point(own, "auto", False) == checkpoint_path(own, 20)
    assert starting_point(tmp_path / "new", "auto", False) is None
    assert starting_point(own, "never", True) is None
    assert starting_point(own, str(checkpoint_path(other, 10)), False) == checkpoint_path(own, 20)
    assert starting_point(own, str(checkpoint_path(other, 30)), False) == checkpoint_path(other, 30)
    for given in (other, other / "checkpoints"):
        assert starting_point(tmp_path / "new", str(given), False) == checkpoint_path(other, 30)
    with pytest.raises(ConfigError, match="two runs would be mixed"):
        starting_point(own, "never", False)
    with pytest.raises(ConfigError, match="goes with resume=never"):
        starting_point(own, "auto", True)
    with pytest.raises(CheckpointError, match="does not exist"):
        starting_point(own, str(tmp_path / "absent.ckpt"), False)


def test_warm_start_takes_the_weights_and_yields_to_an_own_checkpoint(tmp_path: Path, built_in: Path) -> None:
    _, final = finished(tmp_path, built_in, "optim.base_lr=1e-9", "optim.weight_decay=0")
    words = command(
        tmp_path, built_in, "name=warm", "max_steps=2", "data.workers=0", "optim.base_lr=1e-9", f"init_from={final}"
    )
    assert "done" in run(words).replace("\n", "")
    # With next to no learning rate the weights are still those of the warm start, not fresh ones.
    warm, source = mae.load(tmp_path / "warm").state_dict(), mae.load(final).state_dict()
    assert all(torch.allclose(warm[key], source[key], atol=1e-6) for key in source)
    longer = run([*words, "max_steps=3"]).replace("\n", "")
    assert "step-00000002.ckpt" in longer


@pytest.mark.parametrize("damage", ["cut", "flipped", "compression"])
def test_damaged_checkpoint_fails_verification_and_is_skipped(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        contents = {"mae": {"step": step}, "state_dict": {"weight": torch.randn(5000)}}
        write_checkpoint(contents, checkpoint_path(tmp_path, step))
    path = checkpoint_path(tmp_path, 2)
    verify(path)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    if damage == "compression":  # of a kind that no zip file has: another exception
        data[data.rindex(b"PK\1\2") + 10] ^= 64
    path.write_bytes(data[: len(data) // 3] if damage == "cut" else data)
    with pytest.raises(CheckpointError):
        verify(path)
    with pytest.warns(UserWarning, match="skipped"):
        assert newest_valid(tmp_path) == checkpoint_path(tmp_path, 1)
    checkpoint_path(tmp_path, 1).write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="all 2 checkpoints"):
        newest_valid(tmp_path)


def test_failed_checkpoint_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    write_checkpoint({"mae": {"step": 1}}, path)
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local"):
        write_checkpoint({"mae": lambda: None}, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
