"""plan=true: what the run of these settings would take, printed instead of started."""

from contextlib import suppress
from pathlib import Path

import torch

from data.rate import loading_rate
from mae.distributed.launch import Topology, resolve_devices
from mae.errors import CheckpointError
from mae.plan.devices import find_hardware, planned_precision
from mae.plan.distillation_cost import distillation_cost
from mae.plan.forecast import Forecast
from mae.plan.tables import show_forecast
from mae.plan.training_cost import TrainingCost, classification_cost, pretraining_cost, segmentation_cost
from mae.report.start import describe_sampling
from mae.run.checkpoint_writer import seconds_to_write
from mae.run.folder import write_json
from tasks.branch import resolve_branch
from tasks.config import TrainConfig
from tasks.distill import Distill
from tasks.finetune import Finetune
from tasks.segment import Segment
from tasks.task import Task, task_class


def plan_only(config: TrainConfig) -> None:
    """Prints the forecast on rank 0. Of the data it reads the index alone, or nothing if plan.samples is set."""
    topology, wanted = Topology.from_environment(), config.plan
    if topology is not None and topology.rank != 0:
        return
    ranks = wanted.gpus or (topology.ranks if topology else resolve_devices(config.trainer.devices))
    config = resolve_branch(config)
    task = task_class(config.task.name)(config, Topology(ranks=ranks, devices=ranks))
    micro_batch, accumulate = task.batch_split
    precision = planned_precision(config.precision, wanted.gpu, wanted.described)
    hardware = find_hardware(wanted.gpu, precision, wanted.memory, wanted.tflops)
    cost = training_cost(task, precision, torch.device(hardware.kind))
    samples, shards, shard_bytes, loading, sampling = wanted.samples, None, None, None, None
    shown = samples  # in an epoch
    if samples is None and config.data.named:
        index = task.data.train_index
        samples, shards, shown = len(index), len(index.shards), len(task.data.order)
        sampling = describe_sampling(task.data.sampling, samples) if task.data.sampling else None
        shard_bytes = None if config.data.mode == "stream" else int(index.bytes.sum())
        loading = loading_rate(task.data)
    images = None
    if shown is not None:
        begin = config.branched[1] if config.branched else 0
        images = (task.schedule_over(shown).total_steps - begin) * config.global_batch
    expected = Forecast(
        cost,
        hardware,
        ranks=ranks,
        global_batch=config.global_batch,
        micro_batch=micro_batch,
        accumulate=accumulate,
        precision=precision,
        mfu=wanted.mfu,
        images=images,
        samples=samples,
        sampling=sampling,
        shards=shards,
        shard_bytes=shard_bytes,
        loading=loading,
        price=wanted.price,
        checkpoints=config.checkpoint.keep + 1 + (config.optim.schedule == "wsd"),
        saving=saving_seconds(cost, config.run),
        network=wanted.network * 1e9,
        unit=task.unit,
    )
    show_forecast(expected, config.name)
    if wanted.file is not None:
        write_json(Path(wanted.file), expected.plain())


def saving_seconds(cost: TrainingCost, run: Path) -> float | None:
    """Measures how long a checkpoint takes to write where the run folder will be; None if nothing can be written."""
    with suppress(CheckpointError):
        return seconds_to_write(cost.checkpoint_bytes, run)


def training_cost(task: Task, precision: str, device: torch.device) -> TrainingCost:
    """Counts what one image costs in a task."""
    model, optim, averaged = task.architecture, task.config.optim, task.settings.ema is not None
    if isinstance(task, Finetune):
        drop_path = task.settings.drop_path
        return classification_cost(model, task.classes, drop_path, precision, device, optim, averaged)
    if isinstance(task, Distill):
        return distillation_cost(task.student, task.teacher, precision, device, optim, averaged)
    if isinstance(task, Segment):
        return segmentation_cost(model, task.settings, precision, optim, averaged)
    return pretraining_cost(model, precision, device, optim, averaged)
