"""Sweeps: every trial once, in a folder of its own, however often the sweep is killed."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from pydantic import ValidationError

from search.config import SweepConfig
from tests.conftest import ROOT
from tests.test_experiments import REDUCED

RATES = [1e-3, 2e-3, 4e-3, 8e-3]
FIELDS = {
    "name": "s",
    "sweeps": "sweeps",
    "settings": ["experiment=digits_tiny"],
    "evaluation": [],
    "space": {"optim.base_lr": RATES},
    "sampler": "grid",
    "n_trials": None,
    "objective": "linear/top1",
    "direction": "maximize",
    "prune_by": None,
    "prune_after": 0,
    "jobs": 1,
    "launch": [],
    "storage": None,
    "max_failure_rate": 0.5,
    "seed": 0,
}


def command(folder: Path, data: Path, *overrides: str) -> list[str]:
    """sweep.py over four learning rates of four steps each."""
    small = [word for word in REDUCED if not word.startswith("max_steps")]
    settings = [*small, "model.image_size=32", "max_steps=4", "log_every=1", f"data.root={data}", "model.patch_size=8"]
    given = ",".join(f"'{word}'" for word in settings)
    words = ["sampler=grid", "n_trials=null", "prune_by=null", f"sweeps={folder}", f"settings=[{given}]"]
    rates = ",".join(map(str, RATES))
    words += ["objective=val/loss", "direction=minimize", "jobs=2", *overrides]
    space = ["~sweep.space.model.mask_ratio", "sweep.space={optim.base_lr:[" + rates + "]}"]
    return [sys.executable, "sweep.py", "sweep=lr_mask", space[1], space[0], *(f"sweep.{word}" for word in words)]


def study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="lr_mask", storage=f"sqlite:///{folder / 'lr_mask' / 'study.db'}")


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)


def test_a_sweep_that_is_killed_goes_on_and_runs_every_trial_once(tmp_path: Path, built_in: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(command(whole, built_in))
    assert done.returncode == 0, done.stdout + done.stderr

    words = command(killed, built_in)
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    while not list(killed.glob("lr_mask/trial-000?/metrics.csv")):  # somewhere in the first trials
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run(words)
    assert done.returncode == 0, done.stdout + done.stderr

    trials = study(killed).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    assert sorted(trial.params["optim.base_lr"] for trial in trials) == RATES
    assert study(killed).best_params == study(whole).best_params
    assert study(killed).best_value == study(whole).best_value
    with open(killed / "lr_mask" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["complete"] * 4
    assert (killed / "lr_mask" / "parallel_coordinates.png").stat().st_size > 1000


def test_a_trial_that_fails_is_recorded_and_too_many_end_the_sweep(tmp_path: Path, built_in: Path) -> None:
    done = run(command(tmp_path, built_in, "space.global_batch=[100000]", "jobs=1"))
    assert done.returncode == 2
    trials = study(tmp_path).trials
    assert all(trial.state == TrialState.FAIL for trial in trials if trial.state.is_finished())
    assert "global_batch=100000" in trials[0].user_attrs["error"]
    assert "max_failure_rate=0.5" in done.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    {
        "losses that do not compare": (
            {"objective": "val/loss", "space": {"model.mask_ratio": [0.6, 0.75]}},
            "cannot rank trials that differ in model.mask_ratio",
        ),
        "a range in a grid": ({"space": {"optim.base_lr": {"low": 0.1, "high": 1.0}}}, "takes values in space"),
        "no end": ({"sampler": "tpe"}, "set n_trials"),
        "twice": ({"settings": ["optim.base_lr=1"]}, "stands in space and in settings"),
    }.values(),
)
def test_a_sweep_that_cannot_be_is_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        SweepConfig.model_validate(FIELDS | change)


def test_runs_of_a_multirun_have_folders_called_after_what_differs(tmp_path: Path, built_in: Path) -> None:
    words = [*REDUCED, "model.image_size=32", f"data.root={built_in}", "name=grid", "optim.base_lr=0.001,0.002"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folders = sorted(path.name for path in (tmp_path / "sweeps" / "grid").iterdir() if path.is_dir())
    assert folders == ["optim.base_lr=0.001", "optim.base_lr=0.002"]
    assert all((tmp_path / "sweeps" / "grid" / name / "summary.json").is_file() for name in folders)
