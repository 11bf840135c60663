"""Runs whose learning rate is constant: carried on past their end, and cooled down in branches."""

import json
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from mae.distributed.launch import Topology
from mae.errors import CheckpointError, ConfigError
from mae.run.checkpoint_files import checkpoint_path, checkpoints
from mae.runs.best import BestValues
from mae.runs.read import read_run
from tasks.branch import resolve_branch
from tasks.config import TrainConfig
from tasks.train import train
from tests.processes import SMALL, bit_equal, command, losses, run, state
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
    runs: Path, tmp_path: Path, built_in: Path, capfd
) -> None:
    shutil.copytree(runs / "short", tmp_path / "short")
    rates = Rates()
    trained(tmp_path, built_in, "short", "max_steps=12", callback=rates)
    assert [made for made, _ in rates.seen] == [said for _, said in rates.seen]
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert f"{rates.seen[0][1]:.3g} at step 11, after" in said


def test_branch_is_the_shorter_run_with_a_folder_and_an_origin_of_its_own(runs: Path, built_in: Path, capfd) -> None:
    words = (f"init_from={runs / 'long'}@8", "max_steps=null", "epochs=99")
    with pytest.raises(Killed):
        trained(runs, built_in, "branch", *words, callback=Kill(9))
    branch = trained(runs, built_in, "branch", *words)
    assert_same_run_after(8, branch, runs / "short")
    origin = f"{runs / 'long'}@8"
    assert json.loads((branch / "summary.json").read_text())["branch"] == origin
    assert yaml.safe_load((branch / "config.yaml").read_text())["branch"] == origin
    assert json.loads((branch / "environment.json").read_text())["starts"][0]["step"] == 8
    assert read_run("branch", branch, alive=False, values=BestValues({})).total_steps == 10
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "2 steps, to step 10 = 8 / (1 - 0.2), all cool-down, whatever epochs= says; 1 s at the speed" in said


@pytest.mark.slow
def test_branch_carries_muon_and_the_average_on(tmp_path: Path, built_in: Path) -> None:
    words = ("optim=muon", "task.ema=0.9", *WSD)
    trained(tmp_path, built_in, "short", "max_steps=10", *words)
    trained(tmp_path, built_in, "long", "max_steps=20", "checkpoint.every_steps=4", "checkpoint.keep=9", *words)
    branch = trained(tmp_path, built_in, "branch", *words, f"init_from={tmp_path / 'long'}@8", "max_steps=null")
    assert any(name.startswith("average.") for name in state(branch)["model"])
    assert_same_run_after(8, branch, tmp_path / "short")


@pytest.mark.slow
def test_branch_under_fsdp_carries_muon_and_the_average_on(tmp_path: Path, built_in: Path) -> None:
    words = [f"runs={tmp_path}", *WSD, "val_every=null", "optim=muon", "task.ema=0.9", "trainer.strategy=fsdp"]
    words += ["checkpoint.every_steps=8", "checkpoint.keep=9"]
    run(command(tmp_path, built_in, *words, "max_steps=10", "name=short", ranks=2))
    run(command(tmp_path, built_in, *words, "max_steps=20", "name=long", ranks=2))
    origin = f"init_from={tmp_path / 'long'}@8"
    run(command(tmp_path, built_in, *words, origin, "max_steps=null", "name=branch", ranks=2))
    assert_same_run_after(8, tmp_path / "branch", tmp_path / "short")


@pytest.mark.slow
def test_branch_on_two_ranks_has_the_losses_of_one(runs: Path, built_in: Path) -> None:
    words = (*WSD, "val_every=null", f"init_from={runs / 'long'}@8", "max_steps=null", "name=two")
    run(command(runs, built_in, *words, ranks=2))
    one, two = losses(runs / "short"), losses(runs / "two")
    assert two.keys() == {key for key in one if int(key[0]) > 8}
    assert all(float(value) == pytest.approx(float(one[key]), abs=1e-5) for key, value in two.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init_from=RUN@7"], r"there is no checkpoint of this step\. There are 4, 8, 12, 16, 20$"),
        (["init_from=RUN@20"], r"not of the constant part, .*: the learning rate is 0\.01 of its peak\. The run has"),
        (["init_from=RUN@8", "name=long"], "begins a folder of its own, and this is the run's"),
        (
            ["init_from=RUN@8", "name=short"],
            r"short is no branch, and init_from=.*@8 is another run: set another name=",
        ),
        (["init_from=RUN@8", "optim.schedule=cosine"], "branches a cool-down off, and optim.schedule=cosine has none"),
        (["init_from=RUN@8", "resume=x.ckpt"], "both say where to begin"),
        (["init_from=RUN@12", "max_steps=14"], "cools down after step 11, and the branch begins after step 12"),
        (
            ["init_from=RUN@8", "model.mask_ratio=0.5", "optim.cooldown=0.1"],
            r"run: model\.mask_ratio \(0\.75 in the checkpoint, 0\.5 now\)\. Resume with",
        ),
        (["init_from=RUN@8x"], "does not exist"),
    ],
)
def test_branch_that_cannot_be_is_refused_in_a_sentence(runs: Path, built_in: Path, words: list[str], said) -> None:
    words = [word.replace("RUN", str(runs / "long")) for word in words]
    with pytest.raises((ConfigError, CheckpointError), match=said):
        trained(runs, built_in, "refused", "max_steps=null", *words)
    assert not (runs / "refused" / "config.yaml").exists()


def test_folder_of_a_branch_is_resumed_as_that_branch_alone(runs: Path, built_in: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cooled"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000004.ckpt").touch()
    stored = {"model": {}, "optim": {}, "global_batch": 1, "branch": f"{runs / 'long'}@4", "init_from": "weights.pth"}
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))

    def resolved(*words: str) -> TrainConfig:
        return resolve_branch(compose(f"runs={tmp_path}", "name=cooled", "optim.schedule=wsd", *words))

    same = resolved(f"init_from={runs / 'long'}@4")
    assert (same.branched, same.init_from) == ((runs / "long", 4), "weights.pth")
    with pytest.raises(
        ConfigError, match=r"is a branch of .*@4, from which its length follows: resume it with init_from="
    ):
        resolved()
    with pytest.raises(ConfigError, match=r"is a branch of .*@4, and init_from=.*@8 is another run"):
        resolved(f"init_from={runs / 'long'}@8")
    weights = tmp_path / "weights@4"
    weights.touch()
    assert resolved(f"init_from={weights}", "name=other").branch is None


def assert_same_run_after(step: int, one: Path, other: Path) -> None:
    """Two runs end with bit-equal parameters and optimiser states, and logged the same losses after a step."""
    later = {key: value for key, value in losses(other).items() if int(key[0]) > step}
    assert losses(one) == later
    assert bit_equal(state(one), state(other))


class Kill(pl.Callback):
    """Ends the program's run at a step, as a kill would: nothing is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise Killed


class Killed(BaseException):
    pass
