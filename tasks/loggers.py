"""The trackers that `logger` names, beside metrics.csv: checked before anything is written, then opened."""

import json
import os
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger

from data.storage.credentials import hide_all
from mae.distributed.rank_zero import warn
from mae.errors import ConfigError
from mae.run.tracker_identity import explain_mlflow, open_trackers, wandb_disabled, wandb_id
from tasks.config import TrainConfig

OURS = {  # arguments of Lightning's loggers that say which run they continue -> what is there for a user
    "wandb": (("id", "version", "resume", "offline"), "WANDB_RUN_ID and WANDB_MODE in the environment do"),
    "mlflow": (("run_id",), "mlflow_id.txt in the run folder does"),
    "tensorboard": (("purge_step",), "the resumed checkpoint does"),
}


def check_trackers(config: TrainConfig) -> None:
    """Raises ConfigError if a tracker cannot be used, or the run folder belongs to another W&B run.

    Groups the runs of a multirun in W&B.
    """
    for name, (arguments, instead) in OURS.items():
        if given := [argument for argument in arguments if argument in config.logger.get(name, {})]:
            raise ConfigError(f"logger.{name}.{given[0]} is not yours to set: {instead}")
    if "wandb" in config.logger and not config.overwrite and not wandb_disabled():
        wandb_id(config.run)
    if "mlflow" in config.logger:
        settings = config.logger["mlflow"]
        if settings.get("tracking_uri") is not None:
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
        if settings.get("tracking_uri", "") is None:
            place["tracking_uri"] = f"sqlite:///{config.run}/mlflow.db"
        makers[name] = partial(_make, settings, **place)
    about = {name: json.loads((config.run / f"{name}.json").read_text()) for name in ("derived", "environment")}
    settings = config.model_dump(mode="json", exclude={"plan"}) | about
    return open_trackers(config.run, makers, hide_all(settings), start_step, config.checkpoint.every_steps)


def _make(settings: dict[str, Any], **others: Any) -> Logger:
    """Makes a logger of Lightning's. MLflow's errors come without Hydra's."""
    try:
        return instantiate(settings, **others)
    except InstantiationException as error:
        if type(cause := error.__cause__).__module__.startswith("mlflow."):
            raise cause from None  # pyright: ignore[reportGeneralTypeIssues]
        raise
