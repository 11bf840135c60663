"""Reads run folders, of finished, running or stopped runs, without their data."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from mae.errors import ConfigError
from mae.pictures.draw import enlargement
from mae.report.evaluations import Evaluation, read_evaluations
from mae.report.run_files import (
    Derived,
    Environment,
    MetricValues,
    Summary,
    read_bad_samples,
    read_own,
    read_pictures,
    read_series,
    read_settings,
    read_text,
)
from mae.run.checkpoint_files import flatten
from mae.run.metrics import not_finite_since


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    label        its name, or its path where two have the same name
    derived      derived.json of the last start; empty for runs of versions that did not write it
    series       values by name, those included that are not finite
    unreadable   number of damaged lines by name of the file
    pictures     grids of reconstructions by step
    bad_samples  (shard, key, reason) and how often it was met, most frequent first
    evaluations  results of eval.py
    left_out     names of results and pictures that are not ours
    """

    path: Path
    label: str
    config: dict[str, Any]
    config_text: str
    derived: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    series: dict[str, MetricValues]
    unreadable: dict[str, int]
    pictures: dict[int, Path]
    bad_samples: list[tuple[tuple[str, str, str], int]]
    evaluations: list[Evaluation]
    left_out: list[str]

    @cached_property
    def metrics(self) -> dict[str, MetricValues]:
        """Returns the finite values by name, without metrics that have none."""
        finite = {
            name: {step: value for step, value in values.items() if isfinite(value)}
            for name, values in self.series.items()
        }
        return {name: values for name, values in finite.items() if values}

    def not_finite_since(self, name: str) -> int | None:
        """Returns the step from which on no value of a metric is finite, None if its last one is."""
        return not_finite_since(self.series.get(name, {}))

    @property
    def starts(self) -> list[dict[str, Any]]:
        return self.environment.get("starts", [])

    @property
    def restarts(self) -> list[int]:
        """Returns the steps at which the run was resumed."""
        return sorted({start["step"] for start in self.starts[1:]})

    @property
    def baselines(self) -> dict[str, float]:
        """Returns the finite losses of trivial predictors."""
        return {name: value for name, value in self.summary.get("floors", {}).items() if isfinite(value)}

    @property
    def baseline_images(self) -> str:
        """Says on how many images the baselines were computed, where summary.json has it."""
        count = self.summary.get("floor_images")
        return f" on {count:,} image{'s' if count > 1 else ''}" if count else ""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.config["model"]["image_size"]
        return height, width

    @property
    def small_images(self) -> bool:
        """True if pictures of the run show enlarged pixels."""
        return enlargement(self.image_size[1]) > 1

    @property
    def step(self) -> int:
        """Returns the last logged step."""
        return max((max(values) for values in self.series.values()), default=0)

    @property
    def status(self) -> str:
        total = self.derived.get("total_steps")
        if self.summary:
            return f"finished after {self.summary['step']:,} steps"
        return f"not finished: step {self.step:,}" + (f" of {total:,}" if total else "")

    def latest(self, name: str) -> float | None:
        values = self.metrics.get(name)
        return next(reversed(values.values())) if values else None

    def files(self, folder: str) -> list[Path]:
        """Lists a folder of the run, sorted by name."""
        return sorted(path for path in (self.path / folder).glob("*") if not path.name.startswith("."))


def read_runs(paths: list[Path]) -> list[Run]:
    """Reads the runs in these folders. Raises ConfigError if a folder is no run or a file in it is damaged."""
    names = Counter(path.resolve().name for path in paths)
    return [_read(path, path.resolve().name if names[path.resolve().name] == 1 else str(path)) for path in paths]


def _read(path: Path, label: str) -> Run:
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} is no run folder: it has no config.yaml. Give a folder runs/NAME of train.py")
    config_text = read_text(path / "config.yaml")
    series, lines = read_series(path / "metrics.csv")
    bad_samples, bad_lines = read_bad_samples(path / "bad_samples.jsonl")
    evaluations, left_out = read_evaluations(path / "eval")
    pictures, foreign_pictures = read_pictures(path / "reconstructions")
    return Run(
        path=path,
        label=label,
        config=read_settings(config_text, path / "config.yaml"),
        config_text=config_text,
        derived=read_own(path / "derived.json", Derived),
        environment=read_own(path / "environment.json", Environment),
        summary=read_own(path / "summary.json", Summary),
        series=series,
        unreadable={name: count for name, count in (("metrics.csv", lines), ("bad_samples.jsonl", bad_lines)) if count},
        pictures=pictures,
        bad_samples=bad_samples,
        evaluations=evaluations,
        left_out=left_out + foreign_pictures,
    )


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns the settings that differ between runs, with the value in each."""
    settings = [dict(flatten(run.config)) for run in runs]
    names = dict.fromkeys(name for setting in settings for name in setting if name not in ("name", "runs"))
    values = [(name, [str(setting.get(name, "absent")) for setting in settings]) for name in names]
    return [(name, row) for name, row in values if len(set(row)) > 1]
