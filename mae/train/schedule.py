"""Schedule: accumulation, steps and learning rate, derived from the recipe and the number of ranks."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mae.errors import ConfigError
from mae.run.checkpoint_files import checkpoint_path
from mae.train.optim import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Derived numbers of one run: steps are optimiser steps, batch sizes count images.

    micro_batch  the largest: where the global batch does not divide, ranks take shares that differ by one unit
    shape        cosine | linear | wsd | steps
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
    shape: str = "cosine"
    cooldown_steps: int = 0  # of wsd
    milestones: tuple[float, ...] = ()  # of steps

    @property
    def epochs(self) -> float:
        """Returns how often each image is shown."""
        return self.total_steps * self.views / self.steps_per_pass

    @property
    def cooldown_start(self) -> int:
        """Returns the number of steps before the cool-down: all without one."""
        return self.total_steps - self.cooldown_steps

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of the update after `step` updates."""
        return learning_rate(
            step,
            peak_lr=self.peak_lr,
            min_lr=self.min_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            shape=self.shape,
            cooldown_steps=self.cooldown_steps,
            milestones=self.milestones,
        )

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
    branch_step: int | None = None,
) -> Schedule:
    """Derives the schedule of a run over `samples` images on `ranks` devices.

    micro_batch  images per device and forward pass; None: the whole share of a device at once
    epochs       how often each image is shown
    views        crops that a pass shows of each image; each crop is an image of the batch
    unit         images that share a micro-batch, see split_batch; None: the views of one
    max_steps    replaces epochs; the schedule keeps its shape over the shorter or longer run. The warm-up of wsd keeps
                 its number of steps: what comes before the cool-down is the same in a run of any length
    branch_step  at which a branch leaves the run that it comes from: the cool-down begins here if max_steps is None

    Raises ConfigError if the global batch cannot be split or exceeds the samples, min_lr the peak rate, warm-up and
    cool-down the run, or if the cool-down would begin before the branch.
    """
    micro_batch, accumulate = split_batch(global_batch, micro_batch, ranks, unit or views)
    steps_per_pass = samples * views // global_batch
    if steps_per_pass == 0:
        raise ConfigError(
            f"global_batch={global_batch} is more than the {samples * views} training samples: no step fits into an "
            f"epoch. Set global_batch to at most {samples * views}"
        )
    total_steps = max_steps if max_steps is not None else round(epochs * steps_per_pass / views)
    if branch_step is not None and max_steps is None:
        total_steps = max(branch_step + 1, round(branch_step / (1 - optim.cooldown)))
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
    at_once = branch_step if max_steps is None else None
    cooldown_steps = derive_cooldown(optim, total_steps, at_once)
    if branch_step is not None and total_steps - cooldown_steps < branch_step:
        raise ConfigError(
            f"max_steps={max_steps} with optim.cooldown={optim.cooldown:g} cools down after step "
            f"{total_steps - cooldown_steps:,}, and the branch begins after step {branch_step:,}: raise max_steps, "
            "or set it to null, which cools down at once"
        )
    warmup_steps = derive_warmup(optim, total_steps, epochs, steps_per_pass / views)
    if optim.schedule == "wsd" and warmup_steps + cooldown_steps > total_steps:
        raise ConfigError(
            f"optim.schedule=wsd: {warmup_steps:,} steps of warm-up and {cooldown_steps:,} of cool-down do not fit "
            f"into {total_steps:,}. Lower optim.warmup_epochs or set optim.warmup_steps"
        )
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
        shape=optim.schedule,
        cooldown_steps=cooldown_steps,
        milestones=optim.milestones,
    )


def derive_warmup(optim: OptimConfig, total_steps: int, epochs: float, steps_per_epoch: float) -> int:
    """Returns the steps of warm-up: of wsd the same in a run of any length, else a share of it."""
    if optim.warmup_steps is not None:
        return optim.warmup_steps
    if optim.schedule == "wsd":
        return round(optim.warmup_epochs * steps_per_epoch)
    return round(total_steps * min(1.0, optim.warmup_epochs / epochs))


def derive_cooldown(optim: OptimConfig, total_steps: int, branch_step: int | None) -> int:
    """Returns the steps of cool-down, all of a branch that cools down at once from `branch_step`; 0 without wsd."""
    if optim.schedule != "wsd":
        return 0
    return max(1, round(optim.cooldown * total_steps)) if branch_step is None else total_steps - branch_step


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


def rate_change(now: Schedule, before: dict[str, Any], run: Path, step: int) -> str | None:
    """Returns what becomes of the learning rate in a run that resumes after `step` with another length; None if it has
    the same.

    before  the schedule that the run had until then, as a dictionary
    run     folder of the run
    """
    names = ("total_steps", "warmup_steps", "cooldown_steps")
    earlier = replace(now, **{name: before.get(name, getattr(now, name)) for name in names})
    if earlier == now or step == 0:
        return None
    lengths = f"the schedule was made for {earlier.total_steps:,} steps and is now for {now.total_steps:,}"
    began = earlier.cooldown_start
    if now.shape == "wsd" and step <= min(began, now.cooldown_start):
        return f"as in a run of this length from the beginning: the cool-down begins after step {now.cooldown_start:,}"
    last, following = earlier.learning_rate(step - 1), now.learning_rate(step)
    said = f"{following:.3g} at step {step + 1:,}, after {last:.3g} at step {step:,}: {lengths}"
    if now.shape == "wsd" and step > began:
        said += f". The cool-down that began after step {began:,} stays in the weights"
        if checkpoint_path(run, began).is_file():
            said += f"; resume={checkpoint_path(run, began)} with another name= carries on from before it"
    return said


def learning_rate(
    step: int,
    *,
    peak_lr: float,
    min_lr: float = 0.0,
    warmup_steps: int,
    total_steps: int,
    shape: str = "cosine",
    cooldown_steps: int = 0,
    milestones: tuple[float, ...] = (),
) -> float:
    """Returns the learning rate of an update: linear warm-up from 0, then by `shape`.

    step        number of updates made before this one
    shape       cosine  half a cosine down to `min_lr` (Loshchilov & Hutter 2017; He et al. 2022, table 8)
                linear  a line down to `min_lr`
                wsd     constant, and in the last `cooldown_steps` down to `min_lr` by 1 - sqrt (Hägele et al. 2024)
                steps   a tenth after each of `milestones` (Kirillov et al. 2023, section A)
    milestones  shares of all steps
    """
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    if shape == "steps":
        return peak_lr * 0.1 ** sum(step >= share * total_steps for share in milestones)
    begin = total_steps - cooldown_steps if shape == "wsd" else warmup_steps
    if shape == "wsd" and step <= begin:
        return peak_lr  # exactly, whatever the length
    progress = min(1.0, (step - begin) / max(1, total_steps - begin))
    if shape == "linear":
        left = 1 - progress
    elif shape == "wsd":
        left = 1 - math.sqrt(progress)
    else:
        left = 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + (peak_lr - min_lr) * left
