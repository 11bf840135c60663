"""Schedule: accumulation, steps and learning rate, derived from the recipe and the number of ranks."""

import math
from dataclasses import dataclass, replace
from typing import Any

from mae.errors import ConfigError
from mae.train.optim import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Derived numbers of one run: steps are optimiser steps, batch sizes count images."""

    samples: int
    global_batch: int
    micro_batch: int
    ranks: int
    accumulate: int
    views: int
    steps_per_pass: int  # a pass shows each image with all its views
    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float

    @property
    def epochs(self) -> float:
        """Returns how often each image is shown."""
        return self.total_steps * self.views / self.steps_per_pass


def derive_schedule(
    optim: OptimConfig,
    *,
    samples: int,
    global_batch: int,
    micro_batch: int | None,
    ranks: int,
    epochs: float,
    max_steps: int | None,
    views: int = 1,
) -> Schedule:
    """Derives the schedule of a run over `samples` images on `ranks` devices.

    micro_batch  images per device and forward pass; None: the whole share of a device at once
    epochs       how often each image is shown
    views        crops that a pass shows of each image; each crop is an image of the batch
    max_steps    replaces epochs; the schedule keeps its shape over the shorter or longer run

    Raises ConfigError if the global batch cannot be split or exceeds the samples, or min_lr the peak rate.
    """
    micro_batch, accumulate = split_batch(global_batch, micro_batch, ranks)
    steps_per_pass = samples * views // global_batch
    if steps_per_pass == 0:
        raise ConfigError(
            f"global_batch={global_batch} is more than the {samples * views} training samples: no step fits into an "
            f"epoch. Set global_batch to at most {samples * views}"
        )
    total_steps = max_steps if max_steps is not None else round(epochs * steps_per_pass / views)
    if total_steps < 1:
        raise ConfigError(
            f"epochs={epochs} of {steps_per_pass / views:g} steps are no whole step: raise epochs or set max_steps"
        )
    peak_lr = optim.base_lr * global_batch / 256
    if optim.min_lr > peak_lr:
        raise ConfigError(
            f"optim.min_lr={optim.min_lr} is above the peak rate {peak_lr:.3g} = optim.base_lr x {global_batch} / 256, "
            "so that the rate would rise to the end: lower it"
        )
    warmup_steps = optim.warmup_steps
    if warmup_steps is None:
        warmup_steps = round(total_steps * min(1.0, optim.warmup_epochs / epochs))
    return Schedule(
        samples=samples,
        global_batch=global_batch,
        micro_batch=micro_batch,
        ranks=ranks,
        accumulate=accumulate,
        views=views,
        steps_per_pass=steps_per_pass,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        peak_lr=peak_lr,
        min_lr=optim.min_lr,
    )


def split_batch(global_batch: int, micro_batch: int | None, ranks: int) -> tuple[int, int]:
    """Returns (micro_batch, accumulate) of a global batch. Raises ConfigError if it cannot be split."""
    if micro_batch is None:
        if global_batch % ranks:
            raise ConfigError(
                f"global_batch={global_batch} cannot be split over {ranks} ranks: it is not a multiple of {ranks}"
            )
        micro_batch = global_batch // ranks
    if global_batch % (micro_batch * ranks):
        share = global_batch // ranks
        way_out = (
            f"Set micro_batch to a divisor of {share}" if global_batch % ranks == 0 else f"Use a multiple of {ranks}"
        )
        raise ConfigError(
            f"global_batch={global_batch} cannot be split over {ranks} ranks of micro_batch={micro_batch}: "
            f"{global_batch} is not a multiple of {ranks * micro_batch}. {way_out}"
        )
    return micro_batch, global_batch // (micro_batch * ranks)


def rate_change(now: Schedule, before: dict[str, Any], milestones: tuple[float, ...], step: int) -> str | None:
    """Returns what becomes of the learning rate in a run that resumes after `step` with another length; None if it has
    the same.

    before  the schedule that the run had until then, as a dictionary
    """
    lengths = {name: before.get(name, getattr(now, name)) for name in ("total_steps", "warmup_steps")}
    earlier = replace(now, **lengths)
    if earlier == now or step == 0:
        return None
    last, following = (
        learning_rate(
            at,
            peak_lr=schedule.peak_lr,
            min_lr=schedule.min_lr,
            warmup_steps=schedule.warmup_steps,
            total_steps=schedule.total_steps,
            milestones=milestones,
        )
        for schedule, at in ((earlier, step - 1), (now, step))
    )
    return (
        f"{following:.3g} at step {step + 1:,}, after {last:.3g} at step {step:,}: the schedule was made for "
        f"{earlier.total_steps:,} steps and is now for {now.total_steps:,}"
    )


def learning_rate(
    step: int,
    *,
    peak_lr: float,
    min_lr: float = 0.0,
    warmup_steps: int,
    total_steps: int,
    milestones: tuple[float, ...] = (),
) -> float:
    """Returns the learning rate of an update: linear warm-up from 0, then half a cosine down to `min_lr`.

    step        number of updates made before this one
    milestones  shares of all steps, after each of which the rate is divided by 10, instead of the cosine (Kirillov et
                al. 2023, section A)

    Source: He et al. 2022, table 8; Loshchilov & Hutter 2017.
    """
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    if milestones:
        return peak_lr * 0.1 ** sum(step >= share * total_steps for share in milestones)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + (peak_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
