"""metrics.csv: one row per logged step, continued on a resume."""

import csv
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mae.atomic import write_atomically
from mae.run.checkpoint_files import set_aside


class MetricsCSV(Logger):
    """Lightning logger that appends to runs/NAME/metrics.csv.

    Lightning's own CSVLogger deletes the file of an earlier start. This one keeps it and drops the rows after the
    resumed step, so that no step stands twice in the file.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.resumed_step = resumed_step
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """Path of the file; its first use drops the rows after the resumed step."""
        if not self.columns:
            whole = read_metrics(self.path)
            # A process that is killed may leave half a last line: it is of a step after the last checkpoint.
            if self.path.is_file() and len(whole) < self.path.read_bytes().count(b"\n") - 1:
                set_aside(self.path, f"its {len(whole)} whole rows go on")
            rows = [row for row in whole if int(row["step"]) <= self.resumed_step]
            self.columns = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
            self._rewrite(rows)
        return self.path

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        path = self.experiment
        row = {"step": step, **metrics}
        if new := [key for key in row if key not in self.columns]:
            self.columns += new
            self._rewrite(read_metrics(path))
        with open(path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the settings stand in config.yaml."""

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with write_atomically(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a metrics.csv without their empty cells; rows that are cut off or damaged are dropped."""
    if not path.is_file():
        return []
    with open(path, newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return [
        {key: value for key, value in row.items() if value != ""}
        for row in rows
        if None not in row and row.get("step", "").isdigit() and all(map(_is_number, row.values()))
    ]


def by_name(rows: list[dict[str, str]]) -> dict[str, dict[int, float]]:
    """Returns name -> step -> value, ascending, those included that are not finite."""
    series: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        for name, value in row.items():
            if name != "step":
                series.setdefault(name, {})[int(row["step"])] = float(value)
    return series


def not_finite_since(values: Mapping[int, float]) -> int | None:
    """Returns the step from which on no value (by step, ascending) is finite, None if the last one is."""
    since: int | None = None
    for step in reversed(list(values)):
        if isfinite(values[step]):
            break
        since = step
    return since


def _is_number(cell: str | None) -> bool:
    """Returns True for a number and for an empty cell, False for what a power failure has left of one."""
    try:
        return cell is not None and (cell == "" or float(cell) is not None)
    except ValueError:
        return False
