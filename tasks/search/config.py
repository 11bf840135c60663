"""The settings of a sweep; conf/sweep/ holds their values."""

import re
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from mae.errors import first_sentence
from mae.models.loss import CHANGES_THE_LOSS
from tasks.config import Name
from tasks.words import in_hydra

Direction = Literal["maximize", "minimize"]
# The last part of a metric's name -> which of two values is the better one.
BETTER: dict[str, Direction] = dict.fromkeys(("loss", "skipped", "memory_gb", "data_wait", "probe_share"), "minimize")
BETTER |= dict.fromkeys(("top1", "top5", "miou", "first_iou", "last_iou", "rankme", "images_per_s", "mfu"), "maximize")
# Settings that decide nothing about the values of a trial.
MACHINE = ("trainer", "launcher", "micro_batch", "blocks", "logger", "data.workers", "data.cache", "data.root")
MACHINE += (
    "log_every",
    "pictures_every",
    "pictures_statistics",
    "profile",
    "checkpoint.every_steps",
    "checkpoint.keep",
)

# Options of sbatch that the sweep sets for the job of each trial, or that would change what the job is.
OPTIONS_OF_THE_SWEEP = ("--output", "--error", "--job-name", "--array", "--open-mode", "--parsable", "--wrap", "--wait")


class Range(BaseModel, frozen=True, extra="forbid"):
    """Numbers from `low` to `high`, whole if both are; `log` draws them by their logarithm."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @model_validator(mode="after")
    def _can_be_drawn(self) -> "Range":
        if self.whole and (self.low, self.high, self.step) == (0, 1, None):
            raise ValueError("whole numbers from 0 to 1 are 0 and 1 alone: write 0.0 and 1.0, or list [0, 1]")
        if self.whole and self.step is not None and self.step != int(self.step):
            raise ValueError(
                f"low={self.low} and high={self.high} draw whole numbers, and step={self.step} is none: "
                f"write {self.low}.0"
            )
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            last = self.distribution().high  # ValueError if nothing can be drawn; a lower one between two steps
        if last != self.high:
            raise ValueError(f"step={self.step} leads past high={self.high}: the last value is {last}, set it")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def distribution(self) -> IntDistribution | FloatDistribution:
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=step)
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)


def _values(given: Any) -> Any:
    """Returns a range, or a list of values; lists and dictionaries among these as Hydra writes them."""
    if isinstance(given, list) and given:
        return [in_hydra(value) if isinstance(value, list | dict) else value for value in given]
    if isinstance(given, Mapping):
        try:
            return Range.model_validate(given)
        except ValidationError as error:
            raise ValueError(first_sentence(error)) from error
    raise ValueError(f"{given} is neither a list of values nor a range {{low: 0.1, high: 1.0}}")


def _named(words: list[str]) -> set[str]:
    return {word.partition("=")[0].lstrip("+~") for word in words}


class SweepConfig(BaseModel, frozen=True, extra="forbid"):
    """The settings of a sweep."""

    name: Name
    sweeps: str
    settings: list[str]
    evaluation: list[str]
    space: dict[str, Annotated[Range | list[Any], BeforeValidator(_values)]] = Field(min_length=1)
    sampler: Literal["tpe", "random", "grid"]
    n_trials: int | None = Field(ge=1)
    objective: str
    direction: Direction
    prune_by: str | None
    prune_after: int = Field(ge=0)
    jobs: int = Field(ge=1)
    launch: list[str]
    storage: str | None
    max_failure_rate: float = Field(ge=0, le=1)
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "SweepConfig":
        if not re.fullmatch(r"\w+/\w+", self.objective):
            raise ValueError(
                f"objective={self.objective} is no metric: write PROBE/METRIC of eval.py, as linear/top1, or a key of "
                "summary.json, as val/loss"
            )
        varied = [name for name in self.space if name in CHANGES_THE_LOSS]
        for name, metric in (("objective", self.objective), ("prune_by", self.prune_by)):
            if varied and metric is not None and metric.endswith("/loss"):
                raise ValueError(
                    f"{name}={metric} cannot rank trials that differ in {', '.join(varied)}: their losses are of "
                    f"different quantities. Use {name}={'linear' if name == 'objective' else 'knn'}/top1"
                )
        if self.better(self.objective) != self.direction:
            raise ValueError(
                f"direction={self.direction} would call the worst {self.objective} the best: set "
                f"direction={self.better(self.objective)}"
            )
        ranges = [name for name, values in self.space.items() if isinstance(values, Range)]
        if self.sampler == "grid" and ranges:
            raise ValueError(f"sampler=grid takes values in space.{ranges[0]}, not a range: list them, or use tpe")
        if self.sampler != "grid" and self.n_trials is None:
            raise ValueError(f"sampler={self.sampler} has no end of its own: set n_trials")
        if self.as_jobs:
            self._refuse_options()
        space = {name.lstrip("+") for name in self.space}
        if fixed := space & _named(self.settings):
            raise ValueError(f"{min(fixed)} is in both space and settings: remove it from one of them")
        for field, given, own in (
            ("space or settings", space | _named(self.settings), {"name", "runs", "trial"}),
            ("evaluation", _named(self.evaluation), {"checkpoint", "probe", "out"}),
        ):
            if taken := given & own:
                raise ValueError(f"{min(taken)} in {field} is the sweep's to set: every trial has a folder of its own")
        return self

    def _refuse_options(self) -> None:
        """Raises ValueError if the options of sbatch are not options alone, or set what the sweep sets."""
        for word in self.launch[1:]:
            if not word.startswith("-"):
                raise ValueError(
                    f"launch={self.launch}: {word} is no option of sbatch. The script is the sweep's; write an option "
                    "and its value as one word, as in --partition=gpu"
                )
            if (name := word.partition("=")[0]) in OPTIONS_OF_THE_SWEEP or word[:2] in ("-o", "-e", "-J", "-a", "-W"):
                raise ValueError(f"launch={self.launch}: {name} is the sweep's to set for the job of each trial")

    def better(self, metric: str) -> Direction:
        """Returns the direction in which a metric gets better; that of the sweep for one that is not known."""
        return BETTER.get(metric.rpartition("/")[2], self.direction)

    @property
    def as_jobs(self) -> bool:
        """Returns whether each trial is a SLURM job of its own."""
        return self.launch[:1] == ["sbatch"]

    @property
    def points(self) -> list[dict[str, Any]]:
        """Returns all combinations of the values of a grid, in the order of its trials; none of another sampler."""
        if self.sampler != "grid":
            return []
        points: list[dict[str, Any]] = []
        for values in product(*(values for values in self.space.values() if isinstance(values, list))):
            if (point := dict(zip(self.space, values, strict=True))) not in points:
                points.append(point)
        return points

    @property
    def wanted(self) -> int:
        """Returns the number of trials in all."""
        if self.sampler != "grid":
            return self.n_trials or 0
        return min(self.n_trials or len(self.points), len(self.points))

    @property
    def fixed(self) -> list[str]:
        """Returns the settings of all trials that decide their values."""
        return sorted(word for word in self.settings if not word.lstrip("+~").startswith(MACHINE))

    @property
    def folder(self) -> Path:
        return Path(self.sweeps) / self.name

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {
            name: values.distribution() if isinstance(values, Range) else CategoricalDistribution(values)
            for name, values in self.space.items()
        }

    def trial_folder(self, number: int) -> Path:
        """Returns the run folder of a trial, always the same, so that the trial resumes from its checkpoints."""
        return self.folder / f"trial-{number:04d}"


class SweepSettings(BaseModel, frozen=True, extra="forbid"):
    """All settings of sweep.py."""

    sweep: SweepConfig
