"""One training run: from the settings of train.py to summary.json.

1 launch     validate TrainConfig; find the ranks, or relaunch under torchrun
2 derive     index of the data → accumulation, steps, learning rate
3 resume     wait for another start in this folder; choose the checkpoint (a branch: another run's); refuse it if its
             recipe differs
4 model      build it; load init_from on a fresh start
5 trainer    Lightning's trainer, which refuses settings too
6 record     rank 0: run folder, lease, config.yaml, derived.json, start table. The run folder is untouched until here,
             but by the last word of a start that is refused
7 attach     Lightning module, callbacks in their order, loggers
8 fit        train, validate the last step
9 finish     rank 0: pictures, summary.json, closing lines
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf
from torch import nn

from data.loader.loader import explain_worker_death
from mae.callbacks.hang_watch import HangWatch
from mae.callbacks.progress import ShowProgress
from mae.callbacks.save_checkpoints import SaveCheckpoints
from mae.callbacks.share_lease import ShareLease
from mae.callbacks.skip_non_finite import SkipNonFinite
from mae.callbacks.stop_on_signal import StopOnSignal
from mae.callbacks.throughput import LoopTimer, Throughput
from mae.callbacks.time_limit import TimeLimit
from mae.distributed.launch import (
    Topology,
    cluster_environment,
    refuse_other_devices,
    relaunch_under_torchrun,
    resolve_devices,
)
from mae.distributed.rank_zero import say
from mae.distributed.restarts import note_in_journal
from mae.distributed.stop import AFTER, BEFORE, program
from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.report.start import show_start
from mae.run.checkpoint_files import checkpoint_path, read_own, refuse_other_run, set_damaged_aside, verify
from mae.run.checkpoint_writer import describe_saving, refuse_full_disk
from mae.run.folder import (
    clear_run_folder,
    own_launch,
    read_mapping,
    record_start,
    refuse_foreign_folder,
    starting_point,
    stored_settings,
    write_json,
    write_settings,
)
from mae.run.lease import await_turn, hold_lease
from mae.run.metrics import MetricsCSV
from mae.train.optim import OptimConfig, checkpoint_bytes
from mae.train.precision import resolve_precision
from mae.train.schedule import rate_change
from mae.train.strategies import choose_strategy
from mae.train.training import Training
from tasks.cli import FULL_ERROR, quieten
from tasks.config import TrainConfig, keep_image
from tasks.errors import last_word, readable_errors
from tasks.recipe import chosen_recipe
from tasks.task import Task, read_settings, task_class


@readable_errors()
def launch(raw: DictConfig, hydra: Any = None) -> None:
    """Validates the settings, finds the ranks and calls `train`; with plan=true or suggest=true prints instead.

    hydra  Hydra's own settings, which say what was chosen; None for settings composed by other means
    """
    quieten()  # a job of submitit begins here
    if raw.suggest.show:
        from tasks.suggest import suggest

        suggest(raw, hydra)
        return
    config = keep_image(read_settings(raw, hydra and chosen_recipe(raw, hydra)))
    if hydra and hydra.mode == RunMode.RUN and hydra.runtime.choices.get("launcher"):
        raise ConfigError(
            f"launcher={hydra.runtime.choices.launcher} starts runs of a multirun: add -m, for a single one too"
        )
    if hydra and hydra.mode == RunMode.MULTIRUN and config.trial is None and hydra.job.num > 0:
        raise ConfigError(
            "the runs of this multirun would share a folder: write the values that differ on the command line, as in "
            "optim.base_lr=1e-3,2e-3, not in hydra.sweeper.params"
        )
    if config.plan.show:
        from tasks.plan import plan_only

        plan_only(config)
    else:
        train(config, detect_topology(config.trainer.devices))


def detect_topology(devices: int | str) -> Topology:
    """Returns this process's rank and the number of ranks. Replaces the process by torchrun to start several.

    Raises ConfigError if a run of a multirun asks for several.
    """
    if (topology := Topology.from_environment()) is not None:
        refuse_other_devices(devices, topology)
        return topology
    devices = resolve_devices(devices)
    if devices > 1:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise ConfigError(f"trainer.devices={devices} in a multirun (-m): add launcher=slurm, or start run by run")
        if not FULL_ERROR:
            del os.environ["HYDRA_FULL_ERROR"]  # run_program set it: the ranks shall start as this process did
        relaunch_under_torchrun(devices)
    return Topology()


def train(config: TrainConfig, topology: Topology, extra_callbacks: Sequence[pl.Callback] = ()) -> None:
    """Runs steps 2 to 9. Raises ConfigError, CheckpointError or DataError before step 6 if the input cannot work."""
    program.begin_run()
    with last_word(config.run, topology.rank, has_lease=False):
        refuse_missing_gpu(config.trainer.accelerator)
        # 2 derive
        if "@" in (config.init_from or "") or (stored_settings(config.run) or {}).get("branch"):
            from tasks.branch import resolve_branch

            config = resolve_branch(config)
        task = task_class(config.task.name)(config, topology)
        total_steps = task.schedule.total_steps

        # 3 resume
        left_behind = await_turn(config.run, topology.rank)
        checkpoint = starting_point(config.run, config.resume, config.overwrite)
        if checkpoint is None and config.branched is not None:
            checkpoint = checkpoint_path(*config.branched)
            verify(checkpoint)
        clear = config.overwrite and own_launch(config.run) is None
        if topology.rank == 0:  # others may find what rank 0 has begun to write
            refuse_foreign_folder(config.run, clear)
        task.refuse_settings(checkpoint)
        recipe, start_step = match_recipe(task, checkpoint)
        if start_step > total_steps:
            raise ConfigError(
                f"{checkpoint} is behind the end of this run: step {start_step}, and max_steps or epochs make "
                f"{total_steps} steps. Set them higher, or train the shorter run under another name="
            )
        if start_step == total_steps and (config.run / "summary.json").is_file():
            say(f"{config.run} is finished: step {start_step} of {total_steps}, {checkpoint}. Nothing to do.")
            return
        program.where = BEFORE if start_step < total_steps else AFTER
        if config.logger:
            from tasks.loggers import check_trackers

            check_trackers(config)
        timeout = timedelta(seconds=2 * config.hang.other)  # the hang watch is first, and knows who is waited for
        strategy = choose_strategy(config.trainer.strategy, topology.ranks, recipe["precision"], timeout)

        # 4 model
        torch.manual_seed(config.seed)
        model = task.model(checkpoint)
        average = task.average(model)

        # 5 trainer
        timer = LoopTimer()
        trainer = build_trainer(task, recipe["precision"], strategy, timer)

    # 6 record
    holder = hold_lease(config.run, topology.rank, topology.ranks, left_behind)
    with holder as lease, last_word(config.run, topology.rank):
        if topology.rank == 0:
            if clear:
                clear_run_folder(config.run)
            record_run(task, model, average, recipe, checkpoint, start_step)

        # 7 attach
        module = task.module(model, recipe, average)
        callbacks = build_callbacks(task, recipe["precision"], timer)
        trainer.callbacks += [ShareLease(lease), *extra_callbacks, *callbacks]  # pyright: ignore[reportAttributeAccessIssue]
        trainer.loggers = [MetricsCSV(config.run / "metrics.csv", start_step)]
        if config.logger and topology.rank == 0:
            from tasks.loggers import open_loggers

            trainer.loggers += open_loggers(config, start_step)

        # 8 fit
        fit(trainer, module, task, checkpoint)

        # 9 finish
        if topology.rank == 0:
            task.finish(module, trainer.global_step)


def refuse_missing_gpu(accelerator: str) -> None:
    """Raises ConfigError if the settings ask for a GPU and torch finds none."""
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={accelerator}, and torch finds no GPU: set trainer=cpu, or see what nvidia-smi says "
            "and whether this torch was built for GPUs"
        )


def match_recipe(task: Task, checkpoint: Path | None) -> tuple[dict[str, Any], int]:
    """Returns the recipe and the step to start at. Raises ConfigError if the checkpoint has a different recipe."""
    stored = read_own(checkpoint)["mae"] if checkpoint is not None else None
    precision = resolve_precision(task.config.precision)
    if stored is not None and task.config.precision == "auto":
        precision = stored["recipe"]["precision"]
    recipe = task.recipe(precision)
    if stored is None or checkpoint is None:
        return recipe, 0
    known = with_defaults(task, stored["recipe"], recipe)
    if task.config.branched is not None and stored["step"] == task.config.branched[1]:
        from tasks.branch import with_own_cooldown

        known = with_own_cooldown(known, recipe)
    refuse_other_run(known, recipe, checkpoint)
    return recipe, stored["step"]


def with_defaults(task: Task, stored: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the recipe of a checkpoint with all present settings: one older than a setting was trained with its
    default.
    """
    fields = type(task.settings).model_fields.items()
    defaults = {name: field.default for name, field in fields if name in recipe.get("task", {})}
    return stored | {
        "model": MAEConfig.model_validate(stored["model"]).model_dump(mode="json"),
        "optim": OptimConfig.model_validate(stored.get("optim", {})).model_dump(),
        "task": defaults | stored.get("task", {}),
    }


def record_run(
    task: Task,
    model: nn.Module,
    average: nn.Module | None,
    recipe: dict[str, Any],
    checkpoint: Path | None,
    start_step: int,
) -> None:
    """Writes config.yaml, environment.json and derived.json, prints the start table."""
    config, data, schedule, run = task.config, task.data, task.schedule, task.config.run
    set_damaged_aside(run, start_step)
    before = read_mapping(checkpoint.parent.parent / "derived.json") if checkpoint is not None else None
    settings = config.model_dump(mode="json", exclude={"plan", "suggest"})
    write_settings(run, OmegaConf.to_yaml(OmegaConf.create(settings)))
    begins = checkpoint is None or checkpoint.parent.parent.resolve() != run.resolve()
    record_start(run, start_step, task.topology.ranks, begins)
    note_in_journal(f"step {start_step}")
    about = {
        "precision": recipe["precision"],
        "data": recipe["order"],
        "model": task.describe(model) | task.describe_average(),
    }
    if config.branch is not None:
        from tasks.branch import describe_branch, take_over

        about["branch"] = describe_branch(config, schedule)
        if checkpoint is not None and begins:
            take_over(checkpoint, run)
    derived = {**asdict(schedule), "epochs": schedule.epochs, **about}
    write_json(run / "derived.json", derived)
    size = checkpoint_bytes(model, config.optim, average) if checkpoint is None else checkpoint.stat().st_size
    refuse_full_disk(size, run)
    show_start(
        run,
        derived,
        recipe=config.recipe,
        image_size=task.image_size,
        data=config.data.path or f"built-in {config.data.source}",
        shards=len(data.train_index.shards),
        validation=len(data.val_index) if data.val_index is not None else 0,
        checkpoint=checkpoint,
        start_step=start_step,
        init_from=f"the {config.init_weights} weights in {config.init_from}"
        if config.init_weights
        else config.init_from,
        ranks=str(task.topology),
        saving=describe_saving(size, config.checkpoint.every_steps, run / "checkpoints"),
        rate_change=rate_change(schedule, before or {}, run, start_step),
    )


def build_trainer(task: Task, precision: str, strategy: str | Strategy, timer: LoopTimer) -> pl.Trainer:
    """Builds Lightning's trainer for this topology, counting in optimiser steps. Raises ConfigError if it refuses."""
    config, topology, schedule = task.config, task.topology, task.schedule
    validates = task.data.val_index is not None
    val_every = config.val_every if validates else None
    passed = config.trainer.model_dump(exclude_defaults=True, exclude={"max_time"})  # TimeLimit does it
    try:
        trainer = instantiate(
            {"_target_": config.trainer.target, **passed},
            devices=topology.devices,
            num_nodes=topology.nodes,
            strategy=strategy,
            precision=precision,
            max_steps=schedule.total_steps,
            max_epochs=-1,
            accumulate_grad_batches=schedule.accumulate,
            gradient_clip_val=config.optim.grad_clip,
            check_val_every_n_epoch=None,
            val_check_interval=(val_every or schedule.total_steps + 1) * schedule.accumulate,
            limit_val_batches=1.0 if validates else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=1,  # Throughput decides
            use_distributed_sampler=False,  # the order is ours
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,  # the loggers come when there is a run folder
            profiler=timer,
            plugins=[cluster_environment(topology)],
            default_root_dir=config.run,
        )
    except InstantiationException as error:
        given = " ".join(f"trainer.{name}={value}" for name, value in passed.items()) or "these settings"
        raise ConfigError(f"Lightning refuses {given}: {error.__cause__ or error}") from error
    # Its handler of SIGTERM waits for all ranks, which may not have got the signal. StopOnSignal has others.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


def build_callbacks(task: Task, precision: str, timer: LoopTimer) -> list[pl.Callback]:
    """Builds the callbacks in the order in which they run: a step is measured, shown and saved before the run may stop.

    The first of them, if there is one, ends the run at this step (trainer.max_time).
    """
    config = task.config
    val_every = config.val_every if task.data.val_index else None
    before_cooldown = task.schedule.cooldown_start if task.schedule.cooldown_steps else None
    checkpoints = SaveCheckpoints(config.run, config.checkpoint, val_every, before_cooldown)
    signals = StopOnSignal(checkpoints)
    guard = SkipNonFinite(config.run, signals)
    throughput = Throughput(config.log_every, timer, guard, precision)
    limit, hang = config.trainer.max_time, config.hang
    callbacks: list[pl.Callback] = [TimeLimit(limit)] if limit is not None else []
    if hang.step is not None:
        callbacks.append(HangWatch(config.run, hang.step, hang.other, timer))
    if config.profile:
        from mae.callbacks.profiler import StepProfiler

        callbacks.append(StepProfiler(config.run))
    return [*callbacks, throughput, ShowProgress(throughput), *task.callbacks(), checkpoints, guard, signals]


def fit(trainer: pl.Trainer, module: Training, task: Task, checkpoint: Path | None) -> None:
    """Trains to the last step and validates it."""
    config, data = task.config, task.data
    code = 1
    try:
        with explain_worker_death():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        # Lightning validates when a time limit ends the training.
        validated = trainer.should_stop or (config.val_every and task.schedule.total_steps % config.val_every == 0)
        if data.val_index is not None and not validated:
            trainer.validate(module, datamodule=data, verbose=False)
        code = 0
    except FileNotFoundError as error:
        if config.run.is_dir():
            raise
        raise ConfigError(
            f"{config.run} was removed or renamed while its run was under way. Put it back and run the same command to "
            "resume, or start anew"
        ) from error
    finally:
        if error := sys.exception():
            error.add_note(f"Run the same command to resume from the newest checkpoint in {config.run / 'checkpoints'}")
        if config.logger:
            from mae.run.tracker_identity import finish_wandb

            finish_wandb(code)
