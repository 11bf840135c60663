"""Tracker identity: one run of W&B or MLflow for one training, through any number of restarts."""

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from mae.atomic import write_atomically
from mae.distributed.rank_zero import warn
from mae.errors import ConfigError
from mae.run.checkpoint_files import set_aside
from mae.run.folder import read_json
from mae.run.metrics import read_metrics
from mae.run.of_weights import run_of

MLFLOW_LETTERS = 250  # of a parameter's value
ROWS_PER_START = 10**8  # more than one start of a run ever logs


def open_trackers(
    run: Path,
    makers: dict[str, Callable[..., Any]],
    settings: dict[str, Any],
    resumed_step: int,
    checkpoint_every: int,
) -> list[Logger]:
    """Opens the loggers beside metrics.csv, on rank 0: each continues its earlier run and gets the settings.

    A killed process loses the rows that its loggers had not yet written or sent. Those rows are later than the last
    checkpoint but one, so all rows since that one are logged again, with equal values.

    makers  name of the logger -> makes Lightning's logger, given further arguments
    """
    first = max(0, resumed_step - checkpoint_every) + 1
    rows = [(int(row.pop("step")), row) for row in read_metrics(run / "metrics.csv")]
    trackers = []
    for name, make in makers.items():
        if name == "wandb":
            tracker = open_wandb(run, make)
            _continue_numbering(run, tracker)
            tracker.log_hyperparams(settings)
        elif name == "mlflow":
            tracker = open_mlflow(run, make, settings)
        elif name == "tensorboard":
            tracker = make(purge_step=first if resumed_step else None)  # hides these steps of an earlier start
            tracker.log_hyperparams(settings)
        else:
            tracker = make()
        for step, row in rows:
            if first <= step <= resumed_step:
                tracker.log_metrics({key: float(value) for key, value in row.items()}, step)
        trackers.append(tracker)
    return trackers


def open_wandb(run: Path, make: Callable[..., WandbLogger]) -> WandbLogger:
    """Opens the W&B run of this training: online with a key and a server that answers, else in files for `wandb sync`.

    Without a key W&B would wait for somebody to type one. Raises ConfigError if it refuses the run.
    """
    ensure_home(run / "wandb")
    import wandb  # slow to import, and only tracked runs need it
    from requests.utils import get_netrc_auth

    identity = {"id": wandb_id(run), "resume": "allow"}
    _write_id(run / "wandb_id.txt", identity["id"])
    os.environ.setdefault("WANDB_DATA_DIR", str((run / "wandb").resolve()))  # not the home folder, which is often small
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    has_key = bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(server))  # `wandb login` puts it into ~/.netrc
    for offline in (not has_key, True):
        logger = make(**identity, offline=offline)
        try:
            _ = logger.experiment
            break
        except (wandb.Error, TypeError) as error:
            wandb.teardown()  # its service process would still hold the id
            reason = str(error).splitlines()[0]
            if offline or isinstance(error, TypeError):
                raise ConfigError(
                    f"W&B cannot be used ({reason}): change what it names, or start without logger=wandb"
                ) from error
            warn(f"W&B cannot be used ({reason}): this start is tracked offline. Later: wandb sync {run / 'wandb'}")
    return logger


def ensure_home(folder: Path) -> None:
    """Makes `folder` the home of a user who has none, as in a container: W&B and its libraries ask for one."""
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = str(folder.resolve())


def wandb_disabled() -> bool:
    """Returns True if the environment says that W&B shall do nothing."""
    switch = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    return switch or os.environ.get("WANDB_MODE", "").lower() == "disabled"


def _continue_numbering(run: Path, logger: WandbLogger) -> None:
    """Moves the row numbers of an offline start behind those of the starts before it.

    Offline, W&B numbers the rows of every start from 0, and `wandb sync` would take them for the same rows.
    """
    earlier = len(list((run / "wandb").glob("offline-run-*"))) - 1
    if logger.experiment.offline and earlier > 0:
        logger.experiment.log({}, step=earlier * ROWS_PER_START)


def wandb_id(run: Path) -> str:
    """Returns the id of a folder's W&B run: the stored one, that of a sweep's agent (WANDB_RUN_ID), or a new one.

    Raises ConfigError if the stored one differs from WANDB_RUN_ID: two runs would become one.
    """
    own, given = _read_id(run / "wandb_id.txt"), os.environ.get("WANDB_RUN_ID")
    if own and given and own != given:
        raise ConfigError(
            f"{run} belongs to the W&B run {own}, but WANDB_RUN_ID={given}: they would become one. Give every run a "
            "folder of its own, such as name=${oc.env:WANDB_RUN_ID} in a sweep, or unset WANDB_RUN_ID"
        )
    return own or given or secrets.token_hex(4)


def _read_id(file: Path) -> str | None:
    """Returns the id in a file, None if there is none. A damaged file is set aside with a warning."""
    if not file.is_file():
        return None
    tracked = file.read_text(errors="replace").strip()
    if tracked and tracked.isprintable():
        return tracked
    set_aside(file, "the tracker begins another run")
    return None


def _write_id(file: Path, tracked: str) -> None:
    with write_atomically(file) as temporary:
        temporary.write_text(tracked)


def tracked_run(path: Path) -> Path:
    """Returns the run folder of a checkpoint, for adding to its W&B run.

    Raises ConfigError if its training was not tracked, or still writes to that W&B run.
    """
    run = run_of(path)
    if run is None or not (run / "wandb_id.txt").is_file() or "wandb" not in _config(run)["logger"]:
        raise ConfigError(f"{path} was not trained with logger=wandb, so there is no W&B run to add to")
    if not (run / "summary.json").is_file():
        raise ConfigError(f"{run} is not finished, and its W&B run has one writer at a time: wait for the training")
    return run


@contextmanager
def reopen_wandb(run: Path) -> Iterator[Any]:
    """Reopens the W&B run of a finished training (see tracked_run), to add evaluations or exports.

    Fills its summary from the run folder: offline, the summary of the last start replaces those before it.
    """
    own = {key: value for key, value in _config(run)["logger"]["wandb"].items() if not key.startswith("_")}
    settings: dict[str, Any] = own | {"save_dir": str(run)}
    code = 1
    try:
        wandb_run = open_wandb(run, partial(WandbLogger, **settings)).experiment
        rows = read_metrics(run / "metrics.csv")
        latest = {name: float(value) for row in rows for name, value in row.items() if name != "step"}
        wandb_run.summary.update(latest | _evaluations(run))
        yield wandb_run
        code = 0
    finally:
        finish_wandb(code)


def _evaluations(run: Path) -> dict[str, Any]:
    """Returns eval/PROBE -> the numbers in eval/PROBE.json of a run, eval/average/PROBE those of its average."""
    folder = run / "eval"
    files = [file for place in (folder, folder / "average", folder / "raw") for file in sorted(place.glob("*.json"))]
    found = {file.relative_to(folder).with_suffix("").as_posix(): read_json(file) for file in files}
    about = ("probe", "checkpoint", "weights", "pictures", "settings", "seed", "classes", "images", "data", "remarks")
    return {
        f"eval/{name}": {key: value for key, value in numbers.items() if key not in about}
        for name, numbers in found.items()
        if "probe" in numbers  # not the table of a suite
    }


def _config(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def finish_wandb(exit_code: int) -> None:
    """Closes the W&B run, if one is open, which sends what is left."""
    if (wandb := sys.modules.get("wandb")) and wandb.run is not None:
        wandb.finish(exit_code=exit_code)


def open_mlflow(run: Path, make: Callable[..., MLFlowLogger], settings: dict[str, Any]) -> MLFlowLogger:
    """Opens the MLflow run of this training. MLflow chooses its id; its parameters are those of the first start.

    Raises ConfigError if MLflow cannot be used, or does not know the run.
    """
    file = run / "mlflow_id.txt"
    known = _read_id(file)
    with explain_mlflow():
        logger = make(run_id=known) if known else make()
        if known and not _is_known(logger, known):
            raise ConfigError(
                f"MLflow has no run {known} any more, which {file} names: set logger.mlflow.tracking_uri to the server "
                f"or database that has it, or remove {file} to begin a new MLflow run"
            )
        assert logger.run_id is not None
        if not known:
            _write_id(file, logger.run_id)
            logger.log_hyperparams(_mark_cuts(settings))  # MLflow refuses to change them
    return logger


@contextmanager
def explain_mlflow() -> Iterator[None]:
    """Raises ConfigError in the place of MLflow's errors."""
    from mlflow.exceptions import MlflowException  # optional, and slow to import

    try:
        yield
    except MlflowException as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"MLflow cannot be used ({reason}). Start again when it can, or without logger=mlflow"
        ) from error


def _is_known(logger: MLFlowLogger, tracked: str) -> bool:
    """Returns whether MLflow has a run of this id, which has not been deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return logger.experiment.get_run(tracked).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _mark_cuts(settings: Any) -> Any:
    """Ends long values in "…": Lightning cuts what it sends to MLflow without a mark."""
    if isinstance(settings, dict):
        return {name: _mark_cuts(value) for name, value in settings.items()}
    if isinstance(settings, list) and any(isinstance(value, dict) for value in settings):
        return [_mark_cuts(value) for value in settings]
    text = str(settings)
    return settings if len(text) <= MLFLOW_LETTERS else f"{text[: MLFLOW_LETTERS - 1]}…"
