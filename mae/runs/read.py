"""Reads how one run stands. A damaged file is named, and the rest of its run is shown."""

import json
import os
import time
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from mae.errors import first_sentence
from mae.run.lease import NAME as LEASE
from mae.run.lease import parse_lease, read_lease
from mae.runs.best import Best, BestValues
from mae.runs.find import newest_checkpoint
from mae.runs.metrics_tail import Values, read_tail

State = Literal["running", "finished", "stopped", "failed", "ended"]
SCORES = {"knn/top1": "online kNN", "val/top1": "validation", "val/last_iou": "mask IoU"}  # in metrics.csv
PROBES = ("linear", "attentive", "knn", "classify")  # results in eval/, on the images of the run
SPEED = "perf/images_per_s"
METRICS = {"train/loss": 1, "val/loss": 1, SPEED: 10}  # and how many of their newest values
BEST = dict.fromkeys(SCORES, 1) | {"val/loss": -1}
KILLED = "without a word: killed, or its machine went down. The same command resumes it"
UNRECORDED = "before its last step; why is not recorded, as by versions before ended.json. The same command resumes it"
TIME_LIMIT = "trainer.max_time was over. The same command resumes it"


class Derived(BaseModel):
    total_steps: int
    global_batch: int


class Summary(BaseModel):
    step: int
    total_steps: int | None = None


class LastWord(BaseModel):
    state: Literal["stopped", "failed"]
    sentence: str
    host: str = ""
    job: str | None = None


class Result(BaseModel):
    trained: dict[str, Any]


LAST_WORD = "ended.json"
Shape = TypeVar("Shape", bound=BaseModel)


@dataclass
class Run:
    """How a run stands.

    state         running; finished; stopped: by a signal or its time limit, saved; failed: with its sentence;
                  ended: before its last step, without a word
    sentence      why it is not running and not finished
    host, job     where it runs, or ran last; `job` is SLURM's
    step          the last that was logged or saved
    train_loss, val_loss  newest values, of any size
    score         share of 1: the highest of the results in eval/ and the values in metrics.csv
    scored_by     what has measured it
    score_step    at which step of the run, if it stands in metrics.csv
    best_val_loss, best_val_loss_step  the lowest, and at which step
    images_per_s  median of the last rows
    age_seconds   since it last wrote something other than its lease, by the clocks of its file system and this machine
    seconds_left  of a running run, at that speed
    damaged       a sentence for each file that cannot be read
    """

    name: str
    path: str
    state: State = "ended"
    sentence: str | None = None
    host: str | None = None
    job: str | None = None
    step: int = 0
    total_steps: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    score: float | None = None
    scored_by: str | None = None
    score_step: int | None = None
    best_val_loss: float | None = None
    best_val_loss_step: int | None = None
    images_per_s: float | None = None
    age_seconds: float | None = None
    seconds_left: float | None = None
    damaged: list[str] = field(default_factory=list)


def read_run(name: str, path: Path, alive: bool, values: BestValues) -> Run:
    """Reads a run folder.

    alive   whether the run is under way (`mae.runs.signs_of_life`)
    values  of BEST, as far as they were read before
    """
    run, alive = Run(name, str(path)), alive and (path / LEASE).exists()  # it may have ended since
    derived = _read(path / "derived.json", Derived, run.damaged)
    summary = _read(path / "summary.json", Summary, run.damaged)
    word = _read(path / LAST_WORD, LastWord, run.damaged)
    newest, best = _read_metrics(run, path / "metrics.csv", values)
    checkpoint = newest_checkpoint(path)
    if derived is not None:
        run.total_steps = derived.total_steps
    run.step = max(run.step, checkpoint[0] if checkpoint else 0, summary.step if summary else 0)
    _set_state(run, path, alive, word, summary)
    run.train_loss, run.val_loss = (newest.get(loss, [None])[0] for loss in ("train/loss", "val/loss"))
    if "val/loss" in best:
        run.best_val_loss, run.best_val_loss_step = best["val/loss"]
    evaluated = [(_score(path / "eval" / f"{probe}.json", run.damaged), probe, None) for probe in PROBES]
    scores = [(score, title, step) for score, title, step in evaluated if score is not None and isfinite(score)]
    scores += [(best[metric].value, title, best[metric].step) for metric, title in SCORES.items() if metric in best]
    if scores:
        run.score, run.scored_by, run.score_step = max(scores, key=lambda score: score[0])
    if speeds := [speed for speed in newest.get(SPEED, []) if isfinite(speed) and speed > 0]:
        run.images_per_s = median(speeds)
        if run.state == "running" and derived is not None:
            run.seconds_left = max(0, derived.total_steps - run.step) * derived.global_batch / run.images_per_s
    written = [path / name for name in ("environment.json", "metrics.csv", "summary.json", LAST_WORD)]
    written += [checkpoint[1]] if checkpoint else []
    written += [path / LEASE] if not alive else []
    if times := [changed for changed in map(_changed, written) if changed is not None]:
        run.age_seconds = time.time() - max(times)
    return run


def _set_state(run: Run, path: Path, alive: bool, word: LastWord | None, summary: Summary | None) -> None:
    """Sets state, sentence and place. The word of an earlier start is gone: each start removes it."""
    lease = parse_lease(read_lease(path))
    run.host, run.job = (lease.get(key) or getattr(word, key, None) or None for key in ("host", "job"))
    total = summary and (summary.total_steps or run.total_steps or summary.step)
    if alive:
        run.state = "running"
    elif word is not None:
        run.state, run.sentence = word.state, word.sentence
    elif os.path.exists(path / LAST_WORD):
        run.state, run.sentence = "failed", f"with a sentence that could not be written whole ({LAST_WORD})"
    elif summary is not None and total is not None:
        run.state, run.sentence = ("finished", None) if summary.step >= total else ("stopped", TIME_LIMIT)
    else:
        run.sentence = KILLED if (path / LEASE).exists() else UNRECORDED


def _read_metrics(run: Run, path: Path, values: BestValues) -> tuple[Values, dict[str, Best]]:
    """Returns the newest values of METRICS and the best of BEST, and sets the step."""
    try:
        run.step, newest, lines = read_tail(path, METRICS)
        best = values.look(path)
    except FileNotFoundError:
        return {}, {}
    except OSError as error:
        run.damaged.append(f"{path.name} cannot be read ({error.strerror})")
        return {}, {}
    if lines:
        run.damaged.append(f"{path.name}: {lines} of its last lines cannot be read")
    return newest, best


def _read(path: Path, shape: type[Shape], damaged: list[str]) -> Shape | None:
    """Returns a JSON file of ours; None if there is none, or it is damaged, which is noted."""
    try:
        return shape.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        damaged.append(f"{path.name} is damaged: {first_sentence(error)}")
    except OSError as error:
        damaged.append(f"{path.name} cannot be read ({error.strerror})")
    return None


def _score(path: Path, damaged: list[str]) -> float | None:
    """Returns the top-1 accuracy in a result of eval.py."""
    result = _read(path, Result, damaged)
    top1 = result.trained.get("top1") if result is not None else None
    return float(top1) if isinstance(top1, int | float) else None


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def as_json(runs: list[Run], passed_over: int, unreadable: list[str]) -> str:
    """Returns all fields of the runs as one line of JSON; numbers that are not finite are null."""
    rows = [
        {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in vars(run).items()}
        for run in runs
    ]
    return json.dumps({"runs": rows, "passed_over": passed_over, "unreadable": unreadable}, allow_nan=False)
