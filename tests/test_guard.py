"""Steps that are not finite leave no trace in the weights; a full disk leaves none in the checkpoints."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from mae.callbacks.skip_non_finite import SkipNonFinite
from mae.distributed.launch import Topology
from mae.distributed.stop import Stopped
from mae.errors import RunEnded
from mae.run.checkpoint_files import checkpoints, newest_valid, read_own
from mae.run.checkpoint_writer import write_checkpoint
from mae.run.metrics import read_metrics
from tasks.train import train
from tests.poisoned_run import Poison
from tests.processes import SMALL, bit_equal, command, losses, run, state
from tests.test_experiments import compose
from tests.test_resume import Recorder

ALONE = Topology(rank=0, ranks=1, devices=1, nodes=1)
STEPS = ("max_steps=16", "val_every=null", "data.workers=0", "precision=32-true", "checkpoint.every_steps=4")


def train_small(runs: Path, root: Path, name: str, callbacks: Sequence[pl.Callback], *overrides: str) -> None:
    torch.set_num_threads(1)
    settings = (*SMALL, *STEPS, f"runs={runs}", f"data.root={root}", f"name={name}", *overrides)
    train(compose(*settings), ALONE, callbacks)


def skipped(folder: Path) -> dict[str, str]:
    """step -> steps skipped until then, as it stands in metrics.csv."""
    return {row["step"]: row["guard/skipped"] for row in read_metrics(folder / "metrics.csv") if "guard/skipped" in row}


@pytest.mark.parametrize(
    ("spread", "overrides"),
    [(True, "micro_batch=32"), pytest.param(False, "optim.grad_clip=0.5", marks=pytest.mark.slow)],
    ids=["gradient, accumulated", "loss alone, clipped"],
)
def test_non_finite_step_leaves_the_weights_and_counts_as_a_step(
    tmp_path: Path, built_in: Path, spread: bool, overrides: str
) -> None:
    clean, seen, poison = Recorder(), Recorder(), Poison({0, 5, 6, 15}, spread=spread)
    train_small(tmp_path, built_in, "clean", [clean], overrides)
    train_small(tmp_path, built_in, "poisoned", [seen, poison], overrides)
    assert seen.seen == clean.seen
    learnt = poison.learnt
    unchanged = {step for step in range(1, 16) if learnt[step] == learnt[step - 1]}
    assert unchanged == {5, 6, 15} and len(set(learnt)) == 13
    steps = {float(entry["step"]) for entry in state(tmp_path / "poisoned")["optimiser"][0]["state"].values()}
    assert steps == {12.0}
    rates = {key: value for key, value in losses(tmp_path / "poisoned").items() if key[1] == "train/lr"}
    assert rates.items() <= losses(tmp_path / "clean").items()
    expected = {str(step + 1): str(sum(bad <= step for bad in (0, 5, 6, 15))) for step in range(16)}
    assert skipped(tmp_path / "poisoned") == expected
    assert json.loads((tmp_path / "poisoned" / "summary.json").read_text())["skipped_steps"] == 4


@pytest.mark.slow
def test_run_stopped_among_non_finite_steps_resumes_bit_equal(tmp_path: Path, built_in: Path) -> None:
    bad = {4, 5, 6, 9}
    train_small(tmp_path, built_in, "whole", [Poison(bad)])
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 6"):
        train_small(tmp_path, built_in, "stopped", [Poison(bad), Recorder(stop_at=5)])
    train_small(tmp_path, built_in, "stopped", [Poison(bad)])
    assert bit_equal(state(tmp_path / "stopped"), state(tmp_path / "whole"))
    # The key of earlier versions, whose checkpoints shall keep their count.
    assert list(read_own(checkpoints(tmp_path / "stopped")[0])["callbacks"]) == ["Guard"]
    assert skipped(tmp_path / "stopped") == skipped(tmp_path / "whole")


class Late(pl.Callback):
    """Lets the host learn of a step after the next one, as on a GPU."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        (guard,) = [callback for callback in trainer.callbacks if isinstance(callback, SkipNonFinite)]
        guard.delay = 1


@pytest.mark.parametrize("late", [[], pytest.param([Late()], marks=pytest.mark.slow)], ids=["at once", "a step later"])
def test_ten_non_finite_steps_in_a_row_end_the_run(tmp_path: Path, built_in: Path, late: list[pl.Callback]) -> None:
    message = r"of 10 steps in a row, 4 to 13, was not finite; the last good checkpoint is .*step-00000012.ckpt"
    with pytest.raises(RunEnded, match=message) as end:
        train_small(tmp_path, built_in, "lost", [*late, Poison(range(3, 100))], "max_steps=40")
    assert end.value.exit_code == 2
    word = json.loads((tmp_path / "lost" / "ended.json").read_text())
    assert (word["state"], word["sentence"]) == ("failed", str(end.value))
    for path in checkpoints(tmp_path / "lost"):
        assert all(tensor.isfinite().all() for tensor in state(tmp_path / "lost")["model"].values()), path
    # Starting it again is no way around.
    with pytest.raises(RunEnded, match="of 10 steps in a row, 4 to 13"):
        train_small(tmp_path, built_in, "lost", [*late, Poison(range(3, 100))], "max_steps=40")


def test_step_not_finite_on_one_rank_is_skipped_by_all_ranks(tmp_path: Path, built_in: Path) -> None:
    words = command(tmp_path, built_in, *STEPS, "max_steps=40", "name=pair", ranks=2)
    at = words.index("train.py")
    log = tmp_path / "learnt.jsonl"
    bad = [2, 5, *range(20, 40)]
    poisoned = [*words[:at], "-m", "tests.poisoned_run", json.dumps(bad), "1", str(log), *words[at + 1 :]]
    output = run(poisoned, code=1)  # torchrun's own code; its ranks end with 2
    assert output.count("error: the loss or gradient of 10 steps in a row, 21 to 30") == 1
    assert "exitcode  : 2" in output
    ranks: tuple[list[str], list[str]] = ([], [])
    for rank, _, learnt in map(json.loads, log.read_text().splitlines()):
        ranks[rank].append(learnt)
    assert ranks[0] == ranks[1] and len(ranks[0]) == 30
    assert {step for step in range(1, 30) if ranks[0][step] == ranks[0][step - 1]} == {2, 5, *range(20, 30)}


@pytest.fixture(params=["disk", pytest.param("file size", marks=pytest.mark.slow)])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Callable[[bool], list[str]]]]:
    """A folder, and what takes the room for a checkpoint (True) or gives it back: words before a command."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "file size":
        yield folder, lambda full: ["prlimit", "--fsize=60000"] if full else []
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")

    def fill(full: bool, leave: int = 60_000) -> list[str]:
        (folder / "ballast").write_bytes(b"")
        disk = os.statvfs(folder)
        (folder / "ballast").write_bytes(bytes(disk.f_bavail * disk.f_frsize - leave if full else 0))
        return []

    yield folder, fill
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_full_disk_refuses_the_start_and_keeps_the_previous_checkpoint(built_in: Path, small) -> None:
    """Two ranks, of which one writes; both end."""
    runs, fill = small
    words = command(runs, built_in, *STEPS, "name=large", "checkpoint.every_steps=16", ranks=2)
    run([*words, "max_steps=4"])
    (before,) = checkpoints(runs / "large")
    contents = before.read_bytes()
    assert len(contents) > 100_000
    output = run([*fill(True), *words, "max_steps=8"], code=1)
    (said,) = [line for line in output.splitlines() if line.startswith("error: ")]
    # A full disk is seen before the first step, a limit on the size of files when the checkpoint is written.
    no_room = r"has room for .* GB, and the next checkpoint takes .* GB\. Make room"
    no_write = r"cannot be written \(.*\)\. Make room for checkpoints"
    assert re.search(no_room if (runs / "ballast").exists() else no_write, said)
    assert "exitcode  : 2" in output
    assert json.loads((runs / "large" / "ended.json").read_text())["sentence"] in said
    assert list(before.parent.iterdir()) == [before] and before.read_bytes() == contents
    run([*fill(False), *words, "max_steps=8"])
    assert newest_valid(runs / "large") == before.with_name("step-00000008.ckpt")


@pytest.mark.parametrize("small", ["disk"], indirect=True)
@pytest.mark.slow
@pytest.mark.parametrize("until", [pytest.param(12, id="last"), pytest.param(20, id="between")])
def test_disk_that_fills_up_ends_the_run_and_keeps_the_previous_checkpoint(built_in: Path, small, until: int) -> None:
    """There is room for the checkpoint of step 8 and none for that of step 12. Two ranks, of which one writes."""
    runs, fill = small
    words = command(runs, built_in, *STEPS, "name=large", "checkpoint.every_steps=4", ranks=2)
    run([*words, "max_steps=4"])
    (before,) = checkpoints(runs / "large")
    output = run([*fill(True, leave=int(1.7 * before.stat().st_size)), *words, f"max_steps={until}"], code=1)
    (said,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "step-00000012.ckpt cannot be written (" in said and "step-00000008.ckpt is whole" in said
    assert "exitcode  : 2" in output
    assert json.loads((runs / "large" / "ended.json").read_text())["sentence"] in said
    assert {path.name for path in before.parent.iterdir()} == {before.name, "step-00000008.ckpt"}
    run([*fill(False), *words, "max_steps=12"])
    assert newest_valid(runs / "large") == before.with_name("step-00000012.ckpt")


def test_files_not_named_like_checkpoints_are_ignored(tmp_path: Path) -> None:
    """A stale `last.ckpt`, a renamed copy or a half-written file never wins over the newest step."""
    for name in ("step-00000001.ckpt", "last.ckpt", "last-v1.ckpt", "step-00000002-v1.ckpt", "step-00000009.ckpt.tmp"):
        write_checkpoint({"mae": {"step": 1}}, tmp_path / "checkpoints" / name)
    assert newest_valid(tmp_path) == tmp_path / "checkpoints" / "step-00000001.ckpt"
