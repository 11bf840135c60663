"""Places that belong to given weights: their run, and the folder of their results."""

from pathlib import Path

from mae.errors import ConfigError
from mae.run.checkpoint_files import NAME as NAME_OF_CHECKPOINT
from mae.run.folder import is_run, stored_settings


def run_of(path: Path) -> Path | None:
    """Returns the run folder that `path` is or lies in; None if there is none. Raises ConfigError if its settings are
    damaged.
    """
    run = next(filter(is_run, (path, *path.parents)), None)
    if run is not None and stored_settings(run) is None:
        raise ConfigError(f"{run / 'config.yaml'} is damaged or gone. The same train.py command writes it anew")
    return run


def evaluation_folder(checkpoint: Path) -> Path:
    """Returns the folder of the results of eval.py: eval/ of a run or a folder of weights, eval/FILE beside a file.

    Those of a single checkpoint of a run lie in eval/ of the run.
    """
    if checkpoint.is_dir():
        return checkpoint / "eval"
    beside = checkpoint.parent
    if NAME_OF_CHECKPOINT.fullmatch(checkpoint.name) and beside.name == "checkpoints":
        beside = beside.parent
    return beside / "eval" / checkpoint.name
