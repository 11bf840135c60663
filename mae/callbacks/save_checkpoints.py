"""Checkpoint saving: every `every_steps` steps, before a cool-down and at the end, keeping the newest `keep`."""

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from pydantic import BaseModel, Field

from mae.atomic import flush
from mae.callbacks.step_callback import StepCallback
from mae.distributed.rank_zero import warn
from mae.errors import CheckpointError, RunEnded
from mae.run.checkpoint_files import checkpoint_path, checkpoints, step_of
from mae.run.checkpoint_writer import USUAL, BackgroundCheckpointIO


class CheckpointConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of checkpoint saving.

    every_steps  steps from one checkpoint to the next
    keep         checkpoints that are kept; older ones are deleted
    artifacts    none | reference | upload: what W&B gets of each
    """

    every_steps: int = Field(1000, ge=1)
    keep: int = Field(2, ge=1)
    artifacts: Literal["none", "reference", "upload"] = "none"


class SaveCheckpoints(StepCallback):
    """Saves runs/NAME/checkpoints/step-00000500.ckpt every `every_steps` steps, at the step `stays`, and at the end.

    That of step `stays` is never deleted: the last one before the cool-down, from which a run can be carried on.

    A step that is also validated is saved after its validation, so that a run that dies in between repeats both.
    Training goes on while the file is written (`BackgroundCheckpointIO`); the last one is waited for.
    """

    def __init__(self, run: Path, config: CheckpointConfig, val_every: int | None, stays: int | None = None) -> None:
        self.run = run
        self.config = config
        self.val_every = val_every
        self.stays = stays
        self.saved_step = -1
        self.told = False  # that writing takes long
        self.writer = BackgroundCheckpointIO()

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = self.writer

    def save(self, trainer: pl.Trainer) -> None:
        """Begins to save this step unless it is saved already, once the checkpoint before is on disk.

        Every rank has to call it. Raises RunEnded on every rank if the one before cannot be written.
        """
        step = trainer.global_step
        if step == self.saved_step:
            return
        self.finish(trainer)
        if trainer.is_global_zero and (metrics := self.run / "metrics.csv").is_file():
            flush(metrics)  # a resume from this checkpoint logs none of its rows again
        path = checkpoint_path(self.run, step)
        trainer.save_checkpoint(path)
        self.saved_step = step
        if trainer.is_global_zero:
            self.writer.then(partial(self._follow_up, path, step, trainer.loggers))

    def _follow_up(self, path: Path, step: int, loggers: list[Logger]) -> None:
        """Logs the artifact and deletes older checkpoints. Called once the new one is on disk."""
        if not self.told and 2 * self.writer.seconds > USUAL:
            self.told = True
            warn(
                f"a checkpoint takes {self.writer.seconds:.0f} s to write: what stops this run has to warn it two such "
                "times and a step before the kill, see docs/clusters.md. Up to a checkpoint is lost otherwise"
            )
        if self.config.artifacts != "none":
            from mae.run.artifacts import log_checkpoint

            log_checkpoint(loggers, path, step, self.config.artifacts)
        before = [old for old in checkpoints(self.run) if step_of(old) < step and step_of(old) != self.stays]
        for old in before[self.config.keep - 1 :]:
            old.unlink(missing_ok=True)

    def finish(self, trainer: pl.Trainer) -> None:
        """Waits until what was saved is on disk. Every rank has to call it.

        Raises RunEnded on every rank if rank 0 could not write; the checkpoints before stay as they are.
        """
        failure = None
        try:
            self.writer.wait()
        except CheckpointError as error:
            failure = error
        if not trainer.strategy.reduce_boolean_decision(failure is None):
            saved = checkpoints(self.run)
            newest = f"{saved[0].name} is whole" if saved else "nothing was saved before"
            path = checkpoint_path(self.run, self.saved_step)
            raise RunEnded(f"{failure or path}; {newest}. Make room and start the same command again")

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raises RunEnded if the ranks resumed from different checkpoints: a shared folder may lag behind.

        Removes what a save that was killed left behind.
        """
        if trainer.is_global_zero:
            for leftover in (self.run / "checkpoints").glob("step-*.ckpt.*tmp"):
                leftover.unlink()
        first, last = (
            int(trainer.strategy.reduce(torch.tensor(trainer.global_step, device=module.device), reduce_op=extreme))
            for extreme in ("min", "max")
        )
        if first != last:
            raise RunEnded(
                f"the ranks found different checkpoints in {self.run / 'checkpoints'}, of steps {first} to {last}: "
                "is it shared by all nodes? Start the same command again"
            )

    def _due(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step % self.config.every_steps == 0 or trainer.global_step == self.stays

    def validated_next(self, trainer: pl.Trainer) -> bool:
        """Returns True if a validation follows the step just made."""
        due = self.val_every is not None and trainer.global_step % self.val_every == 0
        return due or (trainer.should_stop and trainer.enable_validation)

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._due(trainer) and not self.validated_next(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and self._due(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.save(trainer)
        self.finish(trainer)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Waits for what is being written: the folder is another start's as soon as this one has given up its lease."""
        with suppress(CheckpointError):
            self.writer.wait()
