"""Lightning's progress counters, derived from the step.

Lightning counts micro-batches and restores that count as it was saved, so a resume with another accumulation would skip
or repeat part of the epoch. The step is the only position: the counters are derived from it for the present topology.
"""

from typing import Any

import lightning.pytorch as pl

from mae.train.schedule import Schedule


def loops_at_step(trainer: pl.Trainer, step: int, schedule: Schedule) -> dict[str, Any]:
    """Returns the `loops` entry of a Lightning checkpoint saved after `step` optimiser steps."""
    epoch, step_in_epoch = divmod(step, schedule.steps_per_pass)
    mid_epoch = int(step_in_epoch > 0)
    fit = trainer.fit_loop.state_dict()
    fit["epoch_progress"] = _counts(
        fit["epoch_progress"], epoch, current=epoch, ready=epoch + mid_epoch, started=epoch + mid_epoch
    )
    fit["epoch_loop.batch_progress"] = {
        **_counts(
            fit["epoch_loop.batch_progress"], step * schedule.accumulate, current=step_in_epoch * schedule.accumulate
        ),
        "is_last_batch": False,
    }
    fit["epoch_loop.scheduler_progress"] = _counts(fit["epoch_loop.scheduler_progress"], step, current=step_in_epoch)
    optimizer = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for name in ("step", "zero_grad"):
        optimizer[name] = _counts(optimizer[name], step, current=step_in_epoch)
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    return {"fit_loop": fit}


def _counts(progress: dict[str, Any], total: int, *, current: int, **total_over: int) -> dict[str, Any]:
    """Sets all counters of a progress entry to `total` and `current`, those named in `total_over` otherwise."""
    return {
        "total": {key: total_over.get(key, total) for key in progress["total"]},
        "current": {key: total_over.get(key, current) for key in progress["current"]},
    }
