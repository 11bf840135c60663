"""Checkpoint saving: every `every_steps` steps and at the end, keeping the newest `keep`."""

from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import torch
from pydantic import BaseModel, Field

from mae.atomic import flush
from mae.callbacks.step_callback import StepCallback
from mae.errors import CheckpointError, RunEnded
from mae.run.checkpoint_files import checkpoint_path, checkpoints, step_of


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
    """Saves runs/NAME/checkpoints/step-00000500.ckpt every `every_steps` steps and at the end.

    A step that is also validated is saved after its validation, so that a run that dies in between repeats both.
    """

    def __init__(self, run: Path, config: CheckpointConfig, val_every: int | None) -> None:
        self.run = run
        self.config = config
        self.val_every = val_every
        self.saved_step = -1

    def save(self, trainer: pl.Trainer) -> None:
        """Saves this step unless it is saved already. Every rank has to call it.

        Raises RunEnded on every rank if rank 0 cannot write; the checkpoints before stay as they are.
        """
        step = trainer.global_step
        if step == self.saved_step:
            return
        path = checkpoint_path(self.run, step)
        if trainer.is_global_zero and (metrics := self.run / "metrics.csv").is_file():
            flush(metrics)  # a resume from this checkpoint logs none of its rows again
        self._write(trainer, path)
        self.saved_step = step
        if trainer.is_global_zero:
            if self.config.artifacts != "none":
                from mae.run.artifacts import log_checkpoint

                log_checkpoint(trainer.loggers, path, step, self.config.artifacts)
            before = [old for old in checkpoints(self.run) if step_of(old) < step]
            for old in before[self.config.keep - 1 :]:
                old.unlink(missing_ok=True)

    def _write(self, trainer: pl.Trainer, path: Path) -> None:
        failure = None
        try:
            trainer.save_checkpoint(path)
        except CheckpointError as error:
            failure = error
            trainer.strategy.barrier()  # The other ranks wait in the one that ends a save.
        if not trainer.strategy.reduce_boolean_decision(failure is None):
            saved = checkpoints(self.run)
            newest = f"{saved[0].name} is whole" if saved else "nothing was saved before"
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
        return trainer.global_step % self.config.every_steps == 0

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
