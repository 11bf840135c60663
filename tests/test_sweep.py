"""Sweeps: every trial once, in a folder of its own, however often the sweep is killed."""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from pydantic import ValidationError

from mae.errors import ConfigError
from tasks.search.config import SweepConfig
from tasks.search.figures import draw_importances, draw_trials
from tasks.search.study import open_study, refuse_other_study
from tasks.search.sweep import _words
from tasks.search.trials import TrialFailed, _wait
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


@pytest.mark.slow
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
    pruning = {"prune_by": "knn/top1", "prune_after": 2}  # the higher the better, and the loss the lower
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


def test_equal_settings_run_once_and_where_the_sweep_was_started(tmp_path: Path) -> None:
    """A metric to prune by that no trial logs is said."""
    changes = {"sampler": "tpe", "n_trials": 4, "space": {"optim.base_lr": [0.001, 0.002]}, "prune_by": "knn/top-1"}
    words = command(tmp_path, launch=STAND_IN, **changes)
    done = completed([words[0], str(ROOT / words[1]), *words[2:], "sweep.sweeps=here"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    rows = table(tmp_path / "here")
    ran = [row["trial"] for row in rows if not row["reason"]]
    assert len(rows) == 4 and len(ran) <= 2 and all(row["state"] == "complete" for row in rows)
    assert all(row["reason"] in [f"same settings as {name}" for name in ran] for row in rows if row["trial"] not in ran)
    for rate in ("0.001", "0.002"):
        assert len({row["val/loss"] for row in rows if row["optim.base_lr"] == rate}) == 1
    for name in ran:
        assert (tmp_path / "here" / "rates" / name / "started_in.txt").read_text() == str(tmp_path)
    assert "logged no knn/top-1, so that it prunes no trial: sweep.prune_by takes one of knn/top1" in done.stdout


def test_study_of_another_objective_direction_or_settings_is_refused(tmp_path: Path) -> None:
    fields = FIELDS | {"sweeps": str(tmp_path), "objective": "val/dice", "settings": ["epochs=2", "data.workers=1"]}
    fields |= {"prune_by": "knn/top1"}

    def open_with(**changes: Any) -> optuna.Study:
        return open_study(SweepConfig.model_validate(fields | changes))

    open_with()
    open_with(settings=["data.workers=8", "epochs=2", "trainer=gpu"], prune_by=None, n_trials=9)
    for changes, name in (
        ({"objective": "knn/top1"}, "objective (val/dice)"),
        ({"direction": "minimize"}, "direction (maximize)"),
        ({"settings": ["epochs=3"]}, "settings (['epochs=2'])"),
        ({"evaluation": ["probe.fit=lars"]}, "evaluation ([])"),
        ({"prune_by": "linear/top1"}, "prune_by (knn/top1)"),
        ({"space": {"optim.base_lr": [1.0]}}, "space ("),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"was begun with another {name}")):
            open_with(**changes)


@pytest.mark.parametrize(
    ("storage", "contents"), [("nonsense", b""), ("postgresql://user:pa55@127.0.0.1/x", b""), (None, b"damaged" * 999)]
)
def test_study_that_cannot_be_opened_raises_config_error(tmp_path: Path, storage: str | None, contents: bytes) -> None:
    (tmp_path / "rates").mkdir()
    (tmp_path / "rates" / "study.db").write_bytes(contents)
    fields = FIELDS | {"sweeps": str(tmp_path), "storage": storage}
    with pytest.raises(ConfigError, match=r"^the study cannot be opened in .* choose another sweep\.sweeps"):
        open_study(SweepConfig.model_validate(fields))
    with pytest.raises(ConfigError, match="keeps nothing"):
        open_study(SweepConfig.model_validate(fields | {"storage": "sqlite://"}))


def test_older_study_goes_on_unless_it_was_pruned_the_wrong_way() -> None:
    older = optuna.create_study(direction="maximize")
    older.set_user_attr(
        "space", {"optim.base_lr": str(SweepConfig.model_validate(FIELDS).distributions["optim.base_lr"])}
    )
    trial = older.ask(SweepConfig.model_validate(FIELDS).distributions)
    trial.report(0.5, 1)
    with pytest.raises(ConfigError, match=r"prune_by \(train/loss, in the direction of the objective\)"):
        refuse_other_study(SweepConfig.model_validate(FIELDS | {"prune_by": "train/loss"}), older)
    refuse_other_study(SweepConfig.model_validate(FIELDS | {"prune_by": "knn/top1"}), older)


def test_reason_of_a_failed_trial_is_the_error_of_its_last_start(tmp_path: Path) -> None:
    log = tmp_path / "trial-0000.log"
    log.write_text("error: the start before\n")
    program = "echo Traceback; echo data.errors.DataError: x is truncated; exit 1"
    for code, reason in (
        (program, "data.errors.DataError: x is truncated"),
        ("exit 3", "exit code 3"),
        ("kill -9 $$", "killed by SIGKILL, as for want of memory"),
    ):
        begin = log.stat().st_size
        with open(log, "ab") as file, pytest.raises(TrialFailed, match=f"^{reason}$"):
            _wait(subprocess.Popen(["sh", "-c", code], stdout=file, stderr=file), str(log), begin)


def test_values_of_a_space_reach_the_programs_as_they_are() -> None:
    values = ["x/a=b", "x/c d,e", "~/x", None, [0.2, 1.0]]
    config = SweepConfig.model_validate(FIELDS | {"space": {"data.path": values}})
    trials = [
        optuna.create_trial(value=0.0, params={"data.path": value}, distributions=config.distributions)
        for value in cast(list, config.space["data.path"])
    ]
    read = [OverridesParser.create().parse_override(word).value() for trial in trials for word in _words(trial)]
    assert read == values


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


def ranged(**values: Any) -> dict[str, Any]:
    return {"sampler": "tpe", "n_trials": 2, "space": {"optim.base_lr": values}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    {
        "losses that do not compare": (
            {"objective": "val/loss", "space": {"model.mask_ratio": [0.6, 0.75]}},
            "cannot rank trials that differ in model.mask_ratio",
        ),
        "a range in a grid": ({"space": {"optim.base_lr": {"low": 0.1, "high": 1.0}}}, "takes values in space"),
        "no end": ({"sampler": "tpe"}, "set n_trials"),
        "losses that do not compare, for pruning": (
            {"prune_by": "train/loss", "space": {"model.patch_size": [4, 8]}},
            "prune_by=train/loss cannot rank trials that differ in model.patch_size",
        ),
        "worst is best": ({"objective": "val/loss"}, "direction=maximize would call the worst val/loss the best"),
        "accuracy minimised": ({"direction": "minimize"}, "would call the worst linear/top1 the best"),
        "no logarithm": (ranged(low=0.0, high=1e-3, log=True), "`low > 0` must hold for `log=True`"),
        "reversed": (ranged(low=1e-2, high=1e-3), r"`low <= high` must hold, but got .low=0.01, high=0.001"),
        "step between whole numbers": (ranged(low=1, high=3, step=0.5), "step=0.5 is none: write 1.0"),
        "step of nothing": (ranged(low=1, high=3, step=0), "`step > 0` must hold"),
        "step past the end": (ranged(low=0.1, high=1.0, step=0.4), "the last value is 0.9, set it"),
        "a share of whole numbers": (ranged(low=0, high=1), "write 0.0 and 1.0, or list"),
        "neither list nor range": (
            ranged() | {"space": {"optim.base_lr": 1e-3}},
            "neither a list of values nor a range",
        ),
        "no value": ({"space": {"optim.base_lr": []}}, "neither a list of values nor a range"),
        "unknown part of a range": (ranged(low=1.0, hihg=2.0), "not set: high"),
        "parent as a name": ({"name": ".."}, "names no folder of its own"),
        "twice": ({"settings": ["optim.base_lr=1"]}, "in both space and settings"),
        "twice with a plus": ({"settings": ["+optim.base_lr=1"]}, "in both space and settings"),
        "a folder for all": ({"settings": ["name=mine"]}, "name in space or settings is the sweep's to set"),
        "another probe": ({"evaluation": ["probe=knn"]}, "probe in evaluation is the sweep's to set"),
        "a script of one's own": ({"launch": ["sbatch", "mine.sh"]}, "mine.sh is no option of sbatch"),
        "an option in two words": ({"launch": ["sbatch", "-p", "gpu"]}, "write an option and its value as one word"),
        "the sweep's option": ({"launch": ["sbatch", "--array=1-2"]}, "--array is the sweep's to set for the job"),
        "no metric": ({"objective": "loss"}, "objective=loss is no metric: write PROBE/METRIC"),
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


def test_sweep_figures_draw_trials_of_any_settings(tmp_path: Path) -> None:
    floats, rates = FloatDistribution(0, 1), FloatDistribution(1e-4, 1e-1, log=True)
    kinds = CategoricalDistribution((None, "a", True))
    trials = [
        create_trial(
            value=0.1,
            params={"a": 0.5, "b": 1e-3, "c": None},
            distributions={"a": floats, "b": rates, "c": kinds},
        ),
        create_trial(value=0.3, params={"a": 0.5, "b": 1e-1}, distributions={"a": floats, "b": rates}),
        create_trial(value=float("inf"), params={"a": 0.5}, distributions={"a": floats}),
    ]
    for some in (trials, trials[:1] * 2):
        draw_trials(some, "val/loss", True, tmp_path / "lines.png")
    draw_importances({"a": 0.25, "b": 0.75}, "val/loss", tmp_path / "bars.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("lines.png", "bars.png"))
