"""The trackers that `logger` names, beside metrics.csv: checked before anything is written, then opened."""

import json
import os
from functools import partial
from importlib.util import find_spec
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from data.storage.credentials import hide_all, reveal_all
from mae.distributed.rank_zero import warn
from mae.errors import ConfigError
from mae.run.tracker_identity import explain_mlflow, open_trackers, wandb_disabled, wandb_id
from tasks.config import TrainConfig

OURS = {  # arguments of Lightning's loggers that follow from the run -> what there is for a user
    "wandb": {
        **dict.fromkeys(("id", "version", "resume"), "WANDB_RUN_ID in the environment does"),
        **dict.fromkeys(("offline", "mode"), "WANDB_MODE in the environment does"),
        "log_model": "checkpoint.artifacts does",
    },
    "mlflow": {
        "run_id": "mlflow_id.txt in the run folder does",
        "log_model": "the checkpoints are in the run folder",
    },
    "tensorboard": {"purge_step": "the resumed checkpoint does"},
}


def check_trackers(config: TrainConfig) -> None:
    """Raises ConfigError if a tracker cannot be used, or the run folder belongs to another W&B run.

    Groups the runs of a multirun in W&B.
    """
    for name, settings in config.logger.items():
        if "_target_" not in settings:
            raise ConfigError(f"logger.{name} has settings, but is not chosen: add logger={name}")
        if name in OURS and find_spec(name) is None:
            raise ConfigError(f"logger={name} needs the package {name}, which is not installed: pip install {name}")
        if given := [argument for argument in OURS.get(name, {}) if argument in settings]:
            raise ConfigError(f"logger.{name}.{given[0]} is not yours to set: {OURS[name][given[0]]}")
    if "wandb" in config.logger and not config.overwrite and not wandb_disabled():
        wandb_id(config.run)
    if "mlflow" in config.logger:
        settings = config.logger["mlflow"]
        if settings.get("tracking_uri"):
            with explain_mlflow():
                _make(settings)
        elif "?" in str(config.run):
            raise ConfigError(
                f"the run folder {config.run} has a question mark, at which the address of MLflow's database in it "
                "ends: choose another runs= or name=, or set logger.mlflow.tracking_uri"
            )
    if config.trial is not None:
        os.environ.setdefault("WANDB_RUN_GROUP", config.name)


def open_loggers(config: TrainConfig, start_step: int) -> list[Logger]:
    """Opens each tracker where it stopped, and logs the settings and what was derived from them."""
    makers = {}
    for name, settings in config.logger.items():
        if name == "wandb" and wandb_disabled():
            warn("W&B is disabled in the environment (WANDB_MODE or WANDB_DISABLED): it does not track this start")
            continue
        place = {}  # what conf/logger cannot name: the folder of a trial of a multirun, the database in the run folder
        if config.trial is not None and "save_dir" in settings:
            place["save_dir"] = str(config.run)
        if not settings.get("tracking_uri", "another tracker's"):
            place["tracking_uri"] = f"sqlite:///{config.run}/mlflow.db"
        makers[name] = partial(_make, settings, **place)
    about = {name: json.loads((config.run / f"{name}.json").read_text()) for name in ("derived", "environment")}
    about = hide_all(about)  # earlier versions kept the commands as they were typed
    settings = config.model_dump(mode="json", exclude={"plan", "suggest"}) | about
    return open_trackers(config.run, makers, settings, start_step, config.checkpoint.every_steps)


def _make(settings: dict[str, Any], **others: Any) -> Logger:
    """Makes a logger of Lightning's. MLflow's errors come without Hydra's. Raises ConfigError for other arguments."""
    try:
        logger = instantiate(reveal_all(settings), **others)
        if isinstance(logger, TensorBoardLogger):
            _ = logger.experiment  # which takes the arguments that the logger passes on
        return logger
    except (InstantiationException, TypeError) as error:
        if type(cause := error.__cause__).__module__.startswith("mlflow."):
            raise cause from None  # pyright: ignore[reportGeneralTypeIssues]
        raise ConfigError(f"{settings['_target_']} cannot be made of these settings: {cause or error}") from error
