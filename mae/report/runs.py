"""Reads run folders, of finished, running or stopped runs, without their data."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from mae.errors import ConfigError
from mae.pictures import enlargement
from mae.run.checkpoint_files import flatten
from mae.run.metrics import read_metrics

# Of URLs, in files of versions that kept them: user information and the values of queries.
CREDENTIAL = re.compile(r"(?<=://)[^\s/?#'\"]+(?=@)|(?<=[?&])([^\s?&='\"]+=)[^\s&,\]'\"]+")

MetricValues = dict[int, float]  # step -> value, ascending


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    label        its name, or its path where two have the same name
    derived      derived.json of the last start; empty for runs of versions that did not write it
    metrics      values by name
    unreadable   number of damaged lines of metrics.csv
    pictures     grids of reconstructions by step
    bad_samples  (shard, key, reason) and how often it was met, most frequent first
    """

    path: Path
    label: str
    config: dict[str, Any]
    config_text: str
    derived: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    metrics: dict[str, MetricValues]
    unreadable: int
    pictures: dict[int, Path]
    bad_samples: list[tuple[tuple[str, str, str], int]]

    @property
    def starts(self) -> list[dict[str, Any]]:
        return self.environment.get("starts", [])

    @property
    def restarts(self) -> list[int]:
        """Returns the steps at which the run was resumed."""
        return sorted({start["step"] for start in self.starts[1:]})

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
        return max((max(values) for values in self.metrics.values()), default=0)

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
    config_text = _read_text(path / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path / 'config.yaml'} is damaged: {reason}. The same train.py command writes it anew"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path / 'config.yaml'} holds no settings. The same train.py command writes it anew")
    metrics, unreadable = _metrics(path / "metrics.csv")
    return Run(
        path=path,
        label=label,
        config=config,
        config_text=config_text,
        derived=read_json(path / "derived.json"),
        environment=read_json(path / "environment.json"),
        summary=read_json(path / "summary.json"),
        metrics=metrics,
        unreadable=unreadable,
        pictures={int(file.stem[5:]): file for file in sorted((path / "reconstructions").glob("step-*.png"))},
        bad_samples=_bad_samples(path / "bad_samples.jsonl"),
    )


def _read_text(path: Path) -> str:
    """Returns a text without the credentials of URLs: the page is passed on."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return CREDENTIAL.sub(lambda found: f"{found[1] or ''}hidden", text)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file, or an empty one if there is no file. Raises ConfigError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged: {error}. Delete it, and the report leaves it out") from error


def _metrics(path: Path) -> tuple[dict[str, MetricValues], int]:
    """Returns finite values by name and step, and the number of damaged lines.

    A last line without its line end is still being written and does not count as damaged.
    """
    if not path.is_file():
        return {}, 0
    rows = read_metrics(path)
    lines = path.read_bytes()
    unreadable = max(0, lines.count(b"\n") - 1 - len(rows))
    found: dict[str, MetricValues] = {}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        try:
            values = {name: float(value) for name, value in row.items() if name != "step"}
        except ValueError:
            unreadable += 1
            continue
        for name, value in values.items():
            if isfinite(value):
                found.setdefault(name, {})[int(row["step"])] = value
    return found, unreadable


def _bad_samples(path: Path) -> list[tuple[tuple[str, str, str], int]]:
    met: Counter[tuple[str, str, str]] = Counter()
    for line in _read_text(path).splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # still being written, or cut off when the run was killed
            continue
        met[record["shard"], record["key"], record["reason"]] += 1
    return met.most_common()


def evaluations(run: Run) -> list[tuple[str, float, float | None]]:
    """Returns the numbers in eval/*.json: name, value of the trained and of the untrained encoder."""
    found = []
    for file in run.files("eval"):
        if file.suffix != ".json":
            continue
        contents = read_json(file)
        untrained = dict(flatten(contents.get("untrained", {})))
        for name, value in flatten(contents.get("trained", {})):
            if isinstance(value, int | float):
                found.append((f"{file.stem} {name}", value, untrained.get(name)))
    return found


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns the settings that differ between runs, with the value in each."""
    settings = [dict(flatten(run.config)) for run in runs]
    names = dict.fromkeys(name for setting in settings for name in setting if name not in ("name", "runs"))
    values = [(name, [str(setting.get(name, "absent")) for setting in settings]) for name in names]
    return [(name, row) for name, row in values if len(set(row)) > 1]
