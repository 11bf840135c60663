"""The loggers that the settings name, beside metrics.csv."""

import json
from functools import partial
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger

from mae.run.tracker_identity import open_trackers
from tasks.config import TrainConfig


def open_loggers(config: TrainConfig, start_step: int) -> list[Logger]:
    """Each goes on where it stood, and is told the settings and what followed from them."""
    makers = {
        name: partial(instantiate, settings, **_place(config, settings)) for name, settings in config.logger.items()
    }
    about = {name: json.loads((config.run / f"{name}.json").read_text()) for name in ("derived", "environment")}
    settings = config.model_dump(mode="json", exclude={"plan"}) | about
    return open_trackers(config.run, makers, settings, start_step, config.checkpoint.every_steps)


def _place(config: TrainConfig, settings: dict[str, Any]) -> dict[str, str]:
    """The run folder, for loggers that write there; the settings cannot name that of a trial of a multirun."""
    place = {}
    if config.trial is not None and "save_dir" in settings:
        place["save_dir"] = str(config.run)
    if settings.get("tracking_uri", "") is None:
        place["tracking_uri"] = f"sqlite:///{config.run}/mlflow.db"
    return place
