"""What follows from the settings of a run before it begins."""

from pathlib import Path

import torch

from mae.plan.devices import hardware, planned_precision
from mae.plan.forecast import forecast
from mae.plan.tables import show_forecast
from mae.run.folder import write_json
from mae.train.schedule import Schedule, derive_schedule, split_batch
from tasks.config import TrainConfig
from tasks.task import Task


def plan_only(task: Task) -> None:
    """Prints what the run would take, without starting it; of the data it needs the index alone, or plan.samples."""
    config, ranks = task.config, task.topology.ranks
    wanted = config.plan
    precision = planned_precision(config.precision, wanted.gpu)
    device = hardware(wanted.gpu, precision)
    micro_batch, accumulate = split_batch(config.global_batch, config.micro_batch, ranks)
    work = task.workload(precision, torch.device(device.kind))
    samples, shards = wanted.samples, None
    if samples is None and config.data.named:
        index = task.data.train_index
        size = None if config.data.mode == "stream" else int(index.bytes.sum())
        samples, shards = len(index), (len(index.shards), size)
    images = None
    if samples is not None:
        images = schedule_of(config, samples, ranks).total_steps * config.global_batch
    plan = forecast(
        work,
        device,
        ranks=ranks,
        micro_batch=micro_batch,
        accumulate=accumulate,
        precision=precision,
        mfu=wanted.mfu,
        images=images,
        shards=shards,
        checkpoints=config.checkpoint.keep,
    )
    show_forecast(plan, config.name)
    if wanted.file is not None:
        write_json(Path(wanted.file), plan.plain())


def schedule_of(config: TrainConfig, samples: int, ranks: int) -> Schedule:
    """What follows from the recipe for so many training images and ranks."""
    return derive_schedule(
        config.optim,
        samples=samples,
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        ranks=ranks,
        epochs=config.epochs,
        max_steps=config.max_steps,
        views=config.data.views_per_image,
    )
