"""Files of a run folder, read for the report: what is ours is checked, what is not ours is passed over."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mae.errors import ConfigError, first_sentence
from mae.run.metrics import by_name, read_metrics

# Of URLs, in files of versions that kept them: user information and the values of queries.
CREDENTIAL = re.compile(r"(?<=://)[^\s/?#'\"]+(?=@)|(?<=[?&])([^\s?&='\"]+=)[^\s&,\]'\"]+")
PICTURE = re.compile(r"step-(\d{8})\.png")  # of reconstructions; copies of file managers have other names

MetricValues = dict[int, float]  # step -> value, ascending


class ModelSettings(BaseModel, extra="allow"):
    image_size: tuple[int, int]
    in_channels: int


class DataSettings(BaseModel, extra="allow"):
    mean: list[float]
    std: list[float]
    bits: int = 8


class Settings(BaseModel, extra="allow"):
    """The parts of config.yaml that the report reads."""

    model: ModelSettings
    data: DataSettings
    log_every: int


class Start(BaseModel, extra="allow"):
    time: str
    step: int
    ranks: int
    command: list[str]
    git: str | None


class Environment(BaseModel, extra="allow"):
    """The parts of environment.json that the report reads."""

    python: str
    platform: str
    cpus: int | None
    threads: int
    gpus: list[str]
    packages: dict[str, str]
    starts: list[Start]


class Order(BaseModel, extra="allow"):
    fingerprint: str
    order_version: int
    window: int
    lanes: int


class Derived(BaseModel, extra="allow"):
    """The parts of derived.json that the report reads."""

    samples: int
    data: Order
    model: dict[str, str]
    global_batch: int
    micro_batch: int
    ranks: int
    accumulate: int
    peak_lr: float
    epochs: float
    total_steps: int
    warmup_steps: int
    precision: str
    views: int = 1


class Summary(BaseModel, extra="allow"):
    """The parts of summary.json that the report reads."""

    step: int
    floors: dict[str, float] = {}
    floor_images: int | None = None


def read_text(path: Path) -> str:
    """Returns a text without the credentials of URLs: the page is passed on. Raises ConfigError if it is unreadable."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    return CREDENTIAL.sub(lambda found: f"{found[1] or ''}hidden", text)


def read_settings(text: str, path: Path) -> dict[str, Any]:
    """Returns the settings in the text of config.yaml. Raises ConfigError if they are not those of a run."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} is damaged: {' '.join(str(error).split())}. The same train.py command writes it anew"
        ) from error
    try:
        Settings.model_validate(config)
    except ValidationError as error:
        raise ConfigError(
            f"{path} holds no settings of a run ({first_sentence(error)}). The same train.py command writes it anew"
        ) from error
    return config


def read_own(path: Path, shape: type[BaseModel]) -> dict[str, Any]:
    """Returns the object in a JSON file of ours, an empty one if there is no file. Raises ConfigError if it is damaged.

    shape  model of the fields that are read
    """
    if not path.is_file():
        return {}
    try:
        return shape.model_validate(json.loads(read_text(path))).model_dump()
    except ValidationError as error:
        reason = first_sentence(error)
    except (ValueError, RecursionError) as error:  # what json raises
        reason = str(error)
    raise ConfigError(f"{path} is damaged: {reason}. Delete it, and the report leaves it out")


def read_pictures(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """Returns the grids of reconstructions by step, and the names of pictures that are not ours."""
    found = [(PICTURE.fullmatch(path.name), path) for path in sorted(folder.glob("*.png"))]
    left_out = [f"{folder.name}/{path.name}" for match, path in found if match is None]
    return {int(match[1]): path for match, path in found if match is not None}, left_out


def read_series(path: Path) -> tuple[dict[str, MetricValues], int]:
    """Returns all values of metrics.csv by name and step, NaN included, and the number of damaged lines.

    A last line without its line end is still being written and does not count as damaged.
    """
    if not path.is_file():
        return {}, 0
    try:
        rows, lines = read_metrics(path), path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    return by_name(rows), max(0, lines.count(b"\n") - 1 - len(rows))


def read_bad_samples(path: Path) -> tuple[list[tuple[tuple[str, str, str], int]], int]:
    """Returns (shard, key, reason) and how often it was met, most frequent first, and the number of damaged lines.

    A last line without its line end is still being written, or was cut off when the run was killed.
    """
    met: Counter[tuple[str, str, str]] = Counter()
    damaged = 0
    lines = read_text(path).split("\n") if path.is_file() else [""]
    for line in filter(str.strip, lines[:-1]):
        try:
            record = json.loads(line)
            met[str(record["shard"]), str(record["key"]), str(record["reason"])] += 1
        except (ValueError, LookupError, TypeError, RecursionError):
            damaged += 1
    return met.most_common(), damaged
