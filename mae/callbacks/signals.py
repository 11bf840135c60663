"""Stops a run at a step boundary when the scheduler or the user says so, with nothing lost."""

import os
import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mae.callbacks.checkpoints import Checkpoints

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was told to stop and has saved; `exit_code` is what the shell shall see, never 0."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.exit_code = 130 if signum == signal.SIGINT else 143


class StopOnSignal(pl.Callback):
    """SIGINT, SIGTERM and SIGUSR1 set a flag; at the next optimiser step the ranks agree, save and stop.

    Replaces Lightning's handlers, which save in the middle of a step or not at all and end with exit code 0. A second
    Ctrl-C ends the process at once.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for signum in HANDLED:
            signal.signal(signum, self._note)  # Lightning has noted what was there before, and restores it at the end
        if trainer.received_sigterm:  # between Lightning's registration and ours
            self.received = signal.SIGTERM
            trainer._signal_connector.received_sigterm = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = signum
        _say(f"\n{signal.Signals(signum).name}: saving at the next step, then stopping")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        signum = self.received
        if trainer.world_size > 1:
            # One rank may have been the only one told; the highest number wins, so that all exit alike.
            flag = torch.tensor(signum, device=module.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            signum = int(flag)
        if signum and trainer.global_step < trainer.max_steps:
            self.checkpoints.save(trainer)
            raise Stopped(signum, trainer.global_step)


@rank_zero_only
def _say(sentence: str) -> None:
    print(sentence, flush=True)
