"""Time limit of a start (trainer.max_time): the run ends after a whole step, validated and saved."""

import re
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl

from mae.callbacks.step_callback import StepCallback

DAYS_TO_SECONDS = re.compile(r"(\d+):(\d{1,2}):(\d{1,2}):(\d{1,2})")


def time_limit(given: Any) -> timedelta | None:
    """Returns Lightning's `max_time` as a duration: days:hours:minutes:seconds, or a mapping such as {hours: 2}.

    Raises ValueError for anything else.
    """
    if given is None or isinstance(given, timedelta):
        return given
    try:
        if isinstance(given, str) and (parts := DAYS_TO_SECONDS.fullmatch(given)):
            days, hours, minutes, seconds = map(int, parts.groups())
            return timedelta(days, hours=hours, minutes=minutes, seconds=seconds)
        if isinstance(given, Mapping):
            return timedelta(**given)
    except (TypeError, OverflowError):
        pass
    raise ValueError(f"{given} has to be days:hours:minutes:seconds, as in 00:12:00:00, or as in {{hours: 12}}")


class TimeLimit(StepCallback):
    """Ends the training after the first step at which `limit` has passed since the start, on all ranks alike.

    Comes before the callbacks that log, show and save: what they do after the last step they do after this one.
    """

    def __init__(self, limit: timedelta) -> None:
        self.limit = limit.total_seconds()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.since = time.monotonic()

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        passed = time.monotonic() - self.since >= self.limit
        if trainer.strategy.broadcast(passed):  # rank 0's clock
            trainer.should_stop = True


def at_the_end(trainer: pl.Trainer) -> bool:
    """Returns True after the last step of this start: of the run, or within its time limit."""
    return trainer.global_step == trainer.max_steps or trainer.should_stop
