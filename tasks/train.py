"""One run of train.py, from its settings to summary.json."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf

from data.loader.loader import explain_worker_death
from mae.callbacks.profiler import StepProfiler
from mae.callbacks.progress import ShowProgress
from mae.callbacks.save_checkpoints import SaveCheckpoints
from mae.callbacks.skip_non_finite import SkipNonFinite
from mae.callbacks.stop_on_signal import StopOnSignal, Stopped
from mae.callbacks.throughput import FetchTimer, Throughput
from mae.distributed.launch import Topology, cluster_environment, relaunch_under_torchrun, resolve_devices
from mae.distributed.rank_zero import say
from mae.distributed.slurm import requeue
from mae.errors import ConfigError
from mae.report.start import show_start
from mae.run.checkpoint_files import read_own, refuse_other_run
from mae.run.checkpoint_writer import AtomicCheckpointIO
from mae.run.folder import create, record_start, starting_point, write_json
from mae.run.metrics import MetricsCSV
from mae.run.tracker_identity import finish_wandb, wandb_id
from mae.train.optim import OptimConfig
from mae.train.precision import resolve_precision
from mae.train.schedule import Schedule
from mae.train.strategies import choose_strategy
from tasks.cli import FULL_ERROR, quieten
from tasks.config import TrainConfig
from tasks.errors import readable_errors
from tasks.finetune import Finetune
from tasks.loggers import open_loggers
from tasks.plan import plan_only, schedule_of
from tasks.pretrain import Pretrain
from tasks.segment import Segment
from tasks.task import Task

TASKS: dict[str, type[Task]] = {"pretrain": Pretrain, "finetune": Finetune, "segment": Segment}


@readable_errors()
def launch(raw: DictConfig) -> None:
    """Validates the settings and finds the ranks: those of torchrun or SLURM, or as many as trainer.devices says."""
    quieten()  # a job of submitit begins here
    config = TrainConfig.model_validate(OmegaConf.to_container(raw, resolve=True, throw_on_missing=True))
    topology = Topology.from_environment()
    if config.plan.show:
        ranks = topology.ranks if topology else resolve_devices(config.trainer["devices"])
        if topology is None or topology.rank == 0:
            ranks = config.plan.gpus or ranks
            plan_only(TASKS[config.task.name](config, Topology(ranks=ranks, devices=ranks)))
        return
    if topology is None:
        devices = resolve_devices(config.trainer["devices"])
        if devices > 1 and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise ConfigError(f"trainer.devices={devices} in a multirun (-m): add launcher=slurm, or start run by run")
        if devices > 1:
            if not FULL_ERROR:
                del os.environ["HYDRA_FULL_ERROR"]  # ours, see run_program: the ranks shall start as this process did
            relaunch_under_torchrun(devices)
        topology = Topology()
    train(config, topology)


def train(config: TrainConfig, topology: Topology, extra_callbacks: Sequence[pl.Callback] = ()) -> None:
    """One run from the settings to summary.json; everything is checked before anything is written."""
    task = TASKS[config.task.name](config, topology)
    data = task.data
    schedule = schedule_of(config, len(data.train_index), topology.ranks)
    start = starting_point(config.run, config.resume, config.overwrite)
    recipe, start_step = settle_recipe(task, start)
    if start_step >= schedule.total_steps and (config.run / "summary.json").is_file():
        say(f"{config.run} is finished: step {start_step} of {schedule.total_steps}, {start}. Nothing to do.")
        return
    if "wandb" in config.logger and not config.overwrite:
        wandb_id(config.run)  # refuses that of another run
    if config.trial is not None:
        os.environ.setdefault("WANDB_RUN_GROUP", config.name)
    strategy = choose_strategy(config.trainer["strategy"], topology.ranks, recipe["precision"])
    torch.manual_seed(config.seed)
    model = task.model(start)

    if topology.rank == 0:
        create(config.run, config.overwrite)
        OmegaConf.save(OmegaConf.create(config.model_dump(mode="json", exclude={"plan"})), config.run / "config.yaml")
        record_start(config.run, start_step, topology.ranks)
        about = {"precision": recipe["precision"], "data": recipe["order"], "model": dict(task.describe(model))}
        write_json(config.run / "derived.json", {**asdict(schedule), "epochs": schedule.epochs, **about})
        show_start(
            config.run,
            schedule,
            task.describe(model),
            shards=len(data.train_index.shards),
            validation=len(data.val_index) if data.val_index is not None else 0,
            base_lr=config.optim.base_lr,
            precision=recipe["precision"],
            source=str(start or config.init_from or "random weights"),
        )
    module = task.module(model, schedule, recipe)
    trainer = build_trainer(task, schedule, recipe["precision"], start_step, strategy)
    trainer.callbacks = [*extra_callbacks, *trainer.callbacks]  # pyright: ignore[reportAttributeAccessIssue]
    code = 1
    try:
        with explain_worker_death():
            trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
        if data.val_index is not None and (config.val_every is None or schedule.total_steps % config.val_every):
            trainer.validate(module, datamodule=data, verbose=False)
        code = 0
    except Stopped as stop:
        requeue(stop.signum, topology.rank)  # before W&B, which may take long
        raise
    finally:
        if error := sys.exception():
            error.add_note(f"The same command goes on from the newest checkpoint in {config.run / 'checkpoints'}.")
        finish_wandb(code)
    if topology.rank == 0:
        task.finish(module, schedule)


def settle_recipe(task: Task, start: Path | None) -> tuple[dict[str, Any], int]:
    """The settings that decide the result, as stored in every checkpoint, and the step to start from.

    Raises ConfigError when the checkpoint to go on from was made with other ones.
    """
    stored = read_own(start)["mae"] if start is not None else None
    precision = resolve_precision(task.config.precision)
    if stored is not None and task.config.precision == "auto":
        precision = stored["recipe"]["precision"]
    recipe = task.recipe(precision)
    if stored is None or start is None:
        return recipe, 0
    # Settings that the checkpoint's version did not have are at their defaults in it.
    known = stored["recipe"] | {"optim": OptimConfig.model_validate(stored["recipe"].get("optim", {})).model_dump()}
    refuse_other_run(known, recipe, start)
    return recipe, stored["step"]


def build_trainer(
    task: Task, schedule: Schedule, precision: str, start_step: int, strategy: str | Strategy
) -> pl.Trainer:
    """Lightning's trainer for this topology, counting in optimiser steps."""
    config, data, topology = task.config, task.data, task.topology
    val_every = config.val_every if data.val_index is not None else None
    checkpoints = SaveCheckpoints(config.run, config.checkpoint, val_every)
    signals = StopOnSignal(checkpoints)
    guard = SkipNonFinite(config.run, signals)
    throughput = Throughput(config.log_every, FetchTimer(), guard, precision)
    # The order matters: a step is measured, painted and saved before the run may stop at it.
    callbacks = [throughput, ShowProgress(throughput), *task.callbacks(), checkpoints, guard, signals]
    if config.profile:
        callbacks.insert(0, StepProfiler(config.run))
    loggers = [MetricsCSV(config.run / "metrics.csv", start_step)]
    if topology.rank == 0:
        loggers += open_loggers(config, start_step)
    settings = config.trainer | {"devices": topology.devices, "num_nodes": topology.nodes}
    return instantiate(
        settings,
        strategy=strategy,
        precision=precision,
        max_steps=schedule.total_steps,
        max_epochs=-1,
        accumulate_grad_batches=schedule.accumulate,
        gradient_clip_val=config.optim.grad_clip,
        check_val_every_n_epoch=None,
        val_check_interval=(val_every or schedule.total_steps + 1) * schedule.accumulate,
        limit_val_batches=0 if data.val_index is None else 1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # Throughput decides
        use_distributed_sampler=False,  # the order is ours
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=loggers,
        profiler=throughput.timer,
        plugins=[AtomicCheckpointIO(), *cluster_environment()],
        callbacks=callbacks,
        default_root_dir=config.run,
    )
