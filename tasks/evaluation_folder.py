"""What is evaluated, and where results go: those on a run's own images to its eval/, those on others to folders in it.

1 settings  of the data: those of the run under what is given, mean and deviation those of the weights
2 folder    on the run's own images, or not; of the run that was read, and of no other that has taken its place
3 record    the data as each JSON states them
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np

from data.config import DataConfig
from data.errors import DataError
from data.index.index import ShardIndex
from mae.distributed.rank_zero import say
from mae.errors import CheckpointError, ConfigError
from mae.formats.opened import Opened, plain_list, scale_of, scale_words
from mae.run.folder import read_mapping
from mae.run.of_weights import evaluation_folder, run_of
from tasks.config import evaluation_data

PIXELS = ("image", "mean", "std", "scale", "flip", "val_crop", "bits")  # settings on which the features depend
PLACES = ("path", "val_path", "source")
PARTS = ("train", "val", "test")


class Evaluated(Protocol):
    """Images that are evaluated: those of a ShardDataModule, or a plain folder."""

    @property
    def config(self) -> DataConfig: ...
    @property
    def train_index(self) -> ShardIndex: ...
    @property
    def val_index(self) -> ShardIndex | None: ...


def read_data_settings(checkpoint: Path, opened: Opened, channels: int, given: dict[str, Any]) -> DataConfig:
    """Returns the settings of the data, with the mean and deviation of the weights, and says where these come from.

    given  settings in place of the run's; None: unchanged
    """
    run, scale = run_of(checkpoint), scale_of(opened, channels)
    wanted = {name for name in ("mean", "std") if given.get(name) is None}
    if wanted and opened.run is None and (scale.known or run is None):
        given = given | {name: getattr(scale, name) for name in wanted}
        said = f"of {checkpoint}" if scale.known else f"assumed, ImageNet's, since {checkpoint} says none"
        say(f"{scale_words(given['mean'], given['std'])}: {' and '.join(sorted(wanted))} {said}")
    config = evaluation_data(run, given)
    if scale.known and not np.allclose((*config.mean, *config.std), (*scale.mean, *scale.std), atol=1e-4):
        say(
            f"{scale_words(config.mean, config.std)} are used, and {checkpoint} was trained with "
            f"{plain_list(scale.mean)} and {plain_list(scale.std)}"
        )
    return config


@contextmanager
def same_run(path: Path) -> Iterator[Callable[[], None]]:
    """Yields a check that the run which `path` is or lies in is still the one that it was.

    Raises CheckpointError if it has been overwritten or removed, by the check, at the end, and for errors that follow
    from that.
    """
    run = run_of(path)
    begun = _first_start(run)

    def check() -> None:
        if run is not None and _first_start(run) != begun:
            raise CheckpointError(
                f"{run} was overwritten or removed while it was read: nothing more is written to it. Run the same "
                "command again when it has a checkpoint"
            )

    try:
        yield check
    except (OSError, ConfigError, CheckpointError, DataError) as error:
        check()
        if isinstance(error, FileNotFoundError) and not path.exists():
            raise CheckpointError(f"{path} was removed while it was read") from error
        raise
    check()


def _first_start(run: Path | None) -> Any:
    """Returns what tells a run from another one in the same folder: when and by which command it was begun."""
    starts = ((run and read_mapping(run / "environment.json")) or {}).get("starts")
    return starts[0] if starts else None


def choose_folder(checkpoint: Path, opened: Opened, data: Evaluated, *, out: Path | None, wandb: bool = False) -> Path:
    """Returns the folder of the results, and says where they go if the images are not the run's own.

    Those of weights that were asked for instead of the usual ones lie in a folder of their name: eval/average.

    Raises ConfigError if they shall go to the run's W&B run and are on other images.
    """
    folder = evaluation_folder(checkpoint)
    if opened.taken is not None and not opened.usual:
        folder = folder / opened.taken
    if out is not None:
        return out
    other = folder / f"on-{_name(data.config)}-{_digest(data)}"
    if (run := run_of(checkpoint)) is None:
        return other
    if are_own(run, opened, data):
        return folder
    if wandb:
        raise ConfigError("wandb=true takes the results on the run's own images: leave data.* out, or wandb=true")
    say(f"images and pixels are not those that {run} was trained and validated on: results in {other}")
    return other


def are_own(run: Path, opened: Opened, data: Evaluated) -> bool:
    """Returns whether images and pixels are those of the run: the same shards, wherever they lie, read alike."""
    try:
        own = evaluation_data(run, {})
    except ConfigError:  # a stream has no samples to be evaluated on
        return False
    config = data.config
    if config.val_path != own.val_path or any(getattr(config, name) != getattr(own, name) for name in PIXELS):
        return False
    trained_on = opened.run and opened.run["recipe"].get("order", {}).get("fingerprint")
    if trained_on:
        return data.train_index.fingerprint == trained_on
    return all(getattr(config, name) == getattr(own, name) for name in ("path", "source", "root"))


def _name(config: DataConfig) -> str:
    """Returns a word for the images: the last folder of their path that is no part."""
    path = config.val_path or config.path or config.source or "images"
    folders = PurePath(path if isinstance(path, str) else path[0]).parts
    name = next((part for part in reversed(folders) if part not in PARTS), "images")
    return "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in name)[:40]


def _digest(data: Evaluated) -> str:
    read = {name: getattr(data.config, name) for name in PIXELS}
    shards = [index.fingerprint for index in (data.train_index, data.val_index) if index is not None]
    return hashlib.sha256(json.dumps([read, shards]).encode()).hexdigest()[:8]


def record_data(data: Evaluated) -> dict[str, Any]:
    """Returns what the results were measured on: places, scale and crop of the images, and each part's fingerprint."""
    config = data.config
    places = {name: getattr(config, name) for name in PLACES if getattr(config, name)}
    pixels = {name: getattr(config, name) for name in ("mean", "std", "val_crop", "bits")}
    parts = {"train": data.train_index, "test": data.val_index}
    return places | pixels | {name: _part(index) for name, index in parts.items() if index is not None}


def _part(index: ShardIndex) -> dict[str, Any]:
    labels = index.labels
    labels_digest = hashlib.sha256(labels.tobytes()).hexdigest()[:16]
    found = {"fingerprint": index.fingerprint, "labels": labels_digest, "images": len(index)}
    return found | {"classes": len(np.unique(labels[labels >= 0]))}
