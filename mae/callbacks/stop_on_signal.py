"""Stopping by a signal of the scheduler or the user: at a step boundary, after a save."""

import os
import signal
import time
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from mae.callbacks.save_checkpoints import SaveCheckpoints
from mae.callbacks.step_callback import StepCallback
from mae.distributed.rank_zero import say_at_once
from mae.distributed.slurm import submitit_signal
from mae.distributed.stop import AFTER, HANDLED, Stopped, ask_for_requeue, hangup_ignored, program

NOT_WRITTEN = 65  # in the place of a signal, above them all: a checkpoint cannot be written
OWN_SIGNAL_SECONDS = 5  # after another machine's ranks were stopped


class StopOnSignal(StepCallback):
    """Saves and stops on SIGINT, SIGTERM, SIGUSR1, SIGHUP or submitit's signal, after the validation if one is due.

    A run that was started to ignore SIGHUP (nohup) goes on when its terminal closes.

    The handler only sets `received`; SkipNonFinite sets `agreed` after the next step, on all ranks alike. Before the
    first step of a start, which may compile for minutes, there is nothing to save, and it stops at once, as it does
    outside of the training loop (`mae.distributed.stop`). A second Ctrl-C ends the process at once.
    A checkpoint that cannot be written ends the run in the same way, by SaveCheckpoints.
    """

    def __init__(self, checkpoints: SaveCheckpoints) -> None:
        self.checkpoints = checkpoints
        self.received = 0  # the signal that reached this rank, or NOT_WRITTEN
        self.agreed = 0  # the highest that reached any rank
        self.before: dict[int, Any] = {}  # signal -> its handler outside of the training loop

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for signum in {*HANDLED, submitit_signal()} - {None}:
            if signum == signal.SIGHUP and hangup_ignored():
                continue
            self.before[signum] = signal.signal(signum, self._note)
        self.pid = os.getpid()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        program.in_training = True

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a worker that is being started
            return
        if not program.in_training:
            raise Stopped(signum)
        if signum == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = signum
        say_at_once(f"\n{signal.Signals(signum).name}: saving at the next step, then stopping")

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.checkpoints.writer.failed:
            self.received = NOT_WRITTEN
        if not self.checkpoints.validated_next(trainer):
            self._stop_if_agreed(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._stop_if_agreed(trainer)

    def _stop_if_agreed(self, trainer: pl.Trainer) -> None:
        if self.agreed and trainer.global_step < trainer.max_steps:
            self.checkpoints.save(trainer)
            self.checkpoints.finish(trainer)
            if trainer.num_nodes > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
                self._await_own_signal()
            raise Stopped(self.agreed, trainer.global_step)

    def _await_own_signal(self) -> None:
        """Waits until this machine's torchrun stops its ranks too, as each does when a machine joins.

        It takes ranks that exit before for failed ones, and ends if no restart is left.
        """
        deadline = time.monotonic() + OWN_SIGNAL_SECONDS
        while not self.received and time.monotonic() < deadline:
            time.sleep(0.05)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Hands signals back. One that came in the last step is answered now, when it is saved."""
        self._hand_back()
        program.where = AFTER
        if (signum := self.received or self.agreed) in signal.valid_signals():
            raise Stopped(signum)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._hand_back()
        program.ending.set()  # srun and torchrun send SIGTERM to the ranks beside one that has crashed
        if isinstance(exception, Stopped):  # before the strategy and W&B are closed, which may take long
            ask_for_requeue(exception)

    def _hand_back(self) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        self.before.clear()
        program.in_training = False
