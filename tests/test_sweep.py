"""Sweeps: every trial once, in a folder of its own, however often the sweep is killed."""

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from pydantic import ValidationError

from tasks.search.config import SweepConfig
from tasks.search.sweep import open_study
from tests.conftest import ROOT
from tests.processes import completed, kill, start
from tests.test_experiments import REDUCED

RATES = [0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01]
FIELDS = {
    "name": "rates",
    "sweeps": "sweeps",
    "settings": [],
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


STAND_IN = [sys.executable, str(ROOT / "tests" / "stand_in_trial.py")]


def command(folder: Path, **changes: Any) -> list[str]:
    """sweep.py with a file of settings: over learning rates, two trials at a time."""
    settings = FIELDS | {"sweeps": str(folder), "objective": "val/loss", "direction": "minimize", "jobs": 2} | changes
    (folder / "sweep").mkdir(parents=True)
    (folder / "sweep" / "rates.yaml").write_text(json.dumps(settings))
    return [sys.executable, "sweep.py", "--config-dir", str(folder), "sweep=rates"]


def study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="rates", storage=f"sqlite:///{folder / 'rates' / 'study.db'}")


def kill_and_start_again(words: list[str], when: Path, pattern: str) -> None:
    """SIGKILL to the sweep once a file is there, then the same command."""
    process = start(words)
    while not list(when.glob(pattern)):
        assert process.poll() is None
        time.sleep(0.02)
    kill(process)
    done = completed(words)
    assert done.returncode == 0, done.stdout + done.stderr


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "rates" / "results.csv") as file:
        return list(csv.DictReader(file))


def test_killed_sweep_resumes_and_runs_each_trial_once(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = completed(command(whole, launch=STAND_IN))
    assert done.returncode == 0, done.stdout + done.stderr
    kill_and_start_again(command(killed, launch=STAND_IN), killed, "rates/trial-0003/metrics.csv")

    trials = study(killed).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * len(RATES)
    assert sorted(trial.params["optim.base_lr"] for trial in trials) == RATES
    assert study(killed).best_params == study(whole).best_params == {"optim.base_lr": 0.003}
    for number in range(len(RATES)):  # no step of a run twice: its first process ended before another began
        steps = (killed / "rates" / f"trial-{number:04d}" / "metrics.csv").read_text().splitlines()[1:]
        assert [int(line.split(",")[0]) for line in steps] == list(range(1, 21))
    assert [row["state"] for row in table(killed)] == ["complete"] * len(RATES)
    assert (killed / "rates" / "parallel_coordinates.png").stat().st_size > 1000


def test_killed_tpe_sweep_resumes_to_its_number_of_trials(tmp_path: Path) -> None:
    words = command(tmp_path, launch=STAND_IN, sampler="tpe", n_trials=5)
    kill_and_start_again(words, tmp_path, "rates/trial-0002/metrics.csv")
    assert [trial.state for trial in study(tmp_path).trials] == [TrialState.COMPLETE] * 5


def test_trial_killed_while_drawing_settings_gets_the_missing_ones(tmp_path: Path) -> None:
    changes = {"sampler": "tpe", "n_trials": 3, "space": {"optim.base_lr": RATES, "model.depth": [1, 2]}}
    words = command(tmp_path, launch=STAND_IN, **changes)
    sweep = SweepConfig.model_validate(json.loads((tmp_path / "sweep" / "rates.yaml").read_text()))
    open_study(sweep).ask({"optim.base_lr": sweep.distributions["optim.base_lr"]})
    begun = study(tmp_path).trials[0].params
    done = completed(words)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = study(tmp_path).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert begun.items() < trials[0].params.items() and trials[0].params.keys() == sweep.space.keys()


def test_trials_far_below_the_others_are_pruned(tmp_path: Path) -> None:
    space = {"optim.base_lr": [0.001, 0.002, 0.003, 0.004, 0.7]}
    pruning = {"prune_by": "knn/top1", "prune_after": 2, "direction": "maximize"}
    done = completed(command(tmp_path, launch=STAND_IN, space=space, jobs=1, **pruning))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["state"] for row in table(tmp_path)] == ["complete"] * 4 + ["pruned"]
    assert table(tmp_path)[-1]["val/loss"] == "" and "with knn/top1" in table(tmp_path)[-1]["reason"]


def test_failed_trials_are_recorded_and_end_the_sweep_above_the_limit(tmp_path: Path) -> None:
    done = completed(
        command(tmp_path, launch=STAND_IN, space={"optim.base_lr": [2.0, 0.001, 3.0, 4.0, 5.0, 6.0]}, jobs=1)
    )
    assert done.returncode == 2
    assert [row["state"] for row in table(tmp_path)] == ["fail", "complete", "fail", "fail"]
    assert table(tmp_path)[0]["reason"] == "error: optim.base_lr=2.0 is too high"
    assert "3 of 4 trials have failed, more than max_failure_rate=0.5" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_sweep_of_real_runs_has_the_scores_of_an_uninterrupted_one(tmp_path: Path, built_in: Path) -> None:
    small = [word for word in REDUCED if not word.startswith("max_steps")]
    settings = [*small, "model.image_size=32", "max_steps=4", "log_every=1", f"data.root={built_in}"]
    rates = RATES[::2]
    changes = {"settings": settings, "objective": "linear/top1", "direction": "maximize"}
    changes |= {"space": {"optim.base_lr": rates}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = completed(command(whole, **changes))
    assert done.returncode == 0, done.stdout + done.stderr
    kill_and_start_again(command(killed, **changes), killed, "rates/trial-0001/metrics.csv")
    values = [sorted((t.params["optim.base_lr"], t.value) for t in study(folder).trials) for folder in (whole, killed)]
    assert len(values[1]) == len(rates) and values[0] == values[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    {
        "losses that do not compare": (
            {"objective": "val/loss", "space": {"model.mask_ratio": [0.6, 0.75]}},
            "cannot rank trials that differ in model.mask_ratio",
        ),
        "a range in a grid": ({"space": {"optim.base_lr": {"low": 0.1, "high": 1.0}}}, "takes values in space"),
        "no end": ({"sampler": "tpe"}, "set n_trials"),
        "twice": ({"settings": ["optim.base_lr=1"]}, "in both space and settings"),
    }.values(),
)
def test_invalid_sweep_raises_validation_error(change: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        SweepConfig.model_validate(FIELDS | change)


def test_multirun_goes_on_after_a_failed_run_in_folders_named_after_what_differs(
    tmp_path: Path, built_in: Path
) -> None:
    words = [*REDUCED, "model.image_size=32", f"data.root={built_in}", "name=grid", "optim.base_lr=0.001,-1,0.002"]
    words.append("logger=tensorboard")
    done = completed([sys.executable, str(ROOT / "train.py"), "-m", *words], tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("failed: optim.base_lr=-1: optim.base_lr=-1: input should be")
    folders = sorted(path.name for path in (tmp_path / "sweeps" / "grid").iterdir() if path.is_dir())
    assert folders == ["optim.base_lr=0.001", "optim.base_lr=0.002"]
    for folder in (tmp_path / "sweeps" / "grid" / name for name in folders):
        assert (folder / "summary.json").is_file()
        assert len(list(folder.rglob("events.out.tfevents.*"))) == 1
