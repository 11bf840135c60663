"""Runs whose learning rate is constant: carried on past their end."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from mae.distributed.launch import Topology
from mae.run.checkpoint_files import checkpoint_path, checkpoints
from tasks.train import train
from tests.processes import SMALL, bit_equal, losses, state
from tests.test_experiments import compose

WSD = ("optim.schedule=wsd", "optim.warmup_steps=2", "optim.min_lr=1e-5", "data.workers=0", "precision=32-true")


class Rates(pl.Callback):
    """Notes the learning rate of each update, and that of the schedule."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.seen.append((optimizer.param_groups[0]["lr"], module.lr(trainer.global_step)))


def trained(runs: Path, root: Path, name: str, *overrides: str, callback: pl.Callback | None = None) -> Path:
    config = compose(f"runs={runs}", f"data.root={root}", f"name={name}", *SMALL, *WSD, "val_every=null", *overrides)
    torch.set_num_threads(1)
    train(config, Topology(), [callback] if callback else [])
    return config.run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    """wsd runs of 10 steps (cool-down after 8) and of 20 (after 16)."""
    folder = tmp_path_factory.mktemp("wsd")
    trained(folder, built_in, "short", "max_steps=10")
    trained(folder, built_in, "long", "max_steps=20", "checkpoint.every_steps=4", "checkpoint.keep=9")
    return folder


def test_checkpoint_before_the_cool_down_stays_and_carries_the_run_on_as_a_longer_one(
    runs: Path, built_in: Path, capfd
) -> None:
    assert [path.name for path in checkpoints(runs / "short")] == ["step-00000010.ckpt", "step-00000008.ckpt"]
    before = checkpoint_path(runs / "short", 8)
    further = trained(runs, built_in, "further", f"resume={before}", "max_steps=20", "checkpoint.keep=1")
    assert_same_run_after(8, further, runs / "long")
    assert [path.name for path in checkpoints(further)] == ["step-00000020.ckpt", "step-00000016.ckpt"]
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "as in a run of this length from the beginning: the cool-down begins after step 16" in said


def test_run_that_is_lengthened_after_its_end_takes_its_first_step_at_the_rate_that_is_said(
    tmp_path: Path, built_in: Path, capfd
) -> None:
    trained(tmp_path, built_in, "once", "max_steps=4")
    rates = Rates()
    trained(tmp_path, built_in, "once", "max_steps=8", callback=rates)
    assert [made for made, _ in rates.seen] == [said for _, said in rates.seen]
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert f"{rates.seen[0][1]:.3g} at step 5, after" in said


def assert_same_run_after(step: int, one: Path, other: Path) -> None:
    """Two runs end with bit-equal parameters and optimiser states, and logged the same losses after a step."""
    later = {key: value for key, value in losses(other).items() if int(key[0]) > step}
    assert losses(one) == later
    assert bit_equal(state(one), state(other))
