"""Schedule: accumulation, steps and learning rate, derived from the recipe and the number of ranks."""

import math
from dataclasses import dataclass, replace
from typing import Any

from mae.errors import ConfigError
from mae.train.optim import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Derived numbers of one run: steps are optimiser steps, batch sizes count images.

    micro_batch  the largest: where the global batch does not divide, ranks take shares that differ by one unit
    """

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

    def weight(self, images: int) -> float:
        """Returns the factor for the mean loss of a micro-batch of so many images, 1 where all have the same number.

        The mean over micro-batches and ranks of what is weighted so is the mean over the global batch.
        """
        return images * self.accumulate * self.ranks / self.global_batch


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
    unit: int | None = None,
) -> Schedule:
    """Derives the schedule of a run over `samples` images on `ranks` devices.

    micro_batch  images per device and forward pass; None: the whole share of a device at once
    epochs       how often each image is shown
    views        crops that a pass shows of each image; each crop is an image of the batch
    unit         images that share a micro-batch, see split_batch; None: the views of one
    max_steps    replaces epochs; the schedule keeps its shape over the shorter or longer run

    Raises ConfigError if the global batch cannot be split or exceeds the samples, or min_lr the peak rate.
    """
    micro_batch, accumulate = split_batch(global_batch, micro_batch, ranks, unit or views)
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


def split_batch(global_batch: int, micro_batch: int | None, ranks: int, unit: int = 1) -> tuple[int, int]:
    """Returns the images of the largest micro-batch and the number of micro-batches of a rank in a step.

    Ranks, and the micro-batches of a rank, get equal numbers of units, or numbers that differ by one.

    micro_batch  at most so many images; None: the whole share of a rank at once
    unit         images that share a micro-batch, such as the views of one

    Raises ConfigError if a micro-batch would be empty or could not hold whole units.
    """
    if global_batch % unit or (micro_batch or 0) % unit:
        raise ConfigError(
            f"global_batch={global_batch} and micro_batch={micro_batch or 'null'} have to be multiples of {unit}: the "
            "views of an image (data.views_per_image) and images that are mixed in pairs (task.mixup, task.cutmix) "
            "share a micro-batch"
        )
    units = global_batch // unit
    largest = math.ceil(units / ranks)
    accumulate = math.ceil(largest / (micro_batch // unit)) if micro_batch else 1
    if units // ranks < accumulate:
        raise ConfigError(
            f"global_batch={global_batch} is too few for {ranks} ranks of micro_batch={micro_batch or 'null'}: one "
            "would have nothing to do. Use fewer ranks, or a larger micro_batch"
        )
    return math.ceil(largest / accumulate) * unit, accumulate


def describe_split(global_batch: int, micro_batch: int, ranks: int, accumulate: int, devices: str = "ranks") -> str:
    """Returns the row "batch" of tables: how a global batch is divided."""
    if micro_batch * ranks * accumulate == global_batch:
        return f"{global_batch:,} = {micro_batch} x {ranks} {devices} x {accumulate} accumulated"
    return f"{global_batch:,} over {ranks} {devices}, in {accumulate} x at most {micro_batch} on each"


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
