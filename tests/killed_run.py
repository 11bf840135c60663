"""A run of train.py that is killed in a chosen phase: python -m tests.killed_run WHERE SETTING=VALUE ...

WHERE is a JSON object: step, phase, delay (seconds, for the phases that last), rank, and log, a file that is told just
before the kill.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from tests.logged_run import train_with

PHASES = ("save", "accumulation", "validation", "edge", "anywhere")


class Kill(pl.Callback):
    """SIGKILL to this very process, inside

    save          the writing of the checkpoint of that step
    accumulation  that step, between its micro-batches
    validation    the validation after that step
    edge          the change of epochs after that step
    anywhere      the time that follows that step
    """

    def __init__(self, step: int, phase: str, delay: float, rank: int, log: str) -> None:
        mine = rank == int(os.environ.get("RANK", "0"))
        self.step, self.phase, self.delay, self.notes = step, phase if mine else "", delay, Path(log)

    def _kill(self, step: int) -> None:
        with open(self.notes, "a") as file:
            file.write(json.dumps({"phase": self.phase, "step": step}) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def _kill_soon(self, step: int) -> None:
        def wait() -> None:
            time.sleep(self.delay)
            self._kill(step)

        threading.Thread(target=wait, daemon=True).start()

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.phase == "save" and trainer.global_step == self.step:
            self._kill_soon(self.step)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        between = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if trainer.global_step == self.step:
            if self.phase == "accumulation" and between:
                self._kill(self.step)
            if self.phase == "anywhere" and not between:
                self._kill_soon(self.step)

    def on_validation_batch_end(self, trainer: pl.Trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if self.phase == "validation" and trainer.global_step == self.step:
            self._kill(self.step)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.phase == "edge" and trainer.global_step == self.step and self.delay < 0.01:
            self._kill(self.step)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.phase == "edge" and trainer.global_step == self.step:
            self._kill(self.step)


class FirstStep(pl.Callback):
    """Says when the first step is made, and when the program has been imported."""

    def __init__(self, log: str, imported: float) -> None:
        self.notes, self.imported = Path(log), imported

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        if self.imported:
            with open(self.notes, "a") as file:
                file.write(json.dumps({"first step after": time.monotonic() - self.imported}) + "\n")
        self.imported = 0.0


if __name__ == "__main__":
    where = json.loads(sys.argv[1])
    train_with([FirstStep(where["log"], time.monotonic()), Kill(**where)], sys.argv[2:])
