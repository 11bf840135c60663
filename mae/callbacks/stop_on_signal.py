"""Stopping by a signal of the scheduler or the user: at a step boundary, after a save."""

import os
import signal
from types import FrameType

import lightning.pytorch as pl

from mae.callbacks.save_checkpoints import SaveCheckpoints
from mae.callbacks.step_callback import StepCallback
from mae.distributed.launch import hangup_ignored
from mae.distributed.rank_zero import say_at_once
from mae.distributed.slurm import submitit_signal
from mae.errors import RunEnded

NOT_WRITTEN = 65  # in the place of a signal, above them all: a checkpoint cannot be written
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stopped(RunEnded):
    """Ends a run that was told to stop and has saved. The exit codes are a shell's for SIGINT and SIGTERM."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.exit_code = 130 if signum == signal.SIGINT else 143


class StopOnSignal(StepCallback):
    """Saves and stops on SIGINT, SIGTERM, SIGUSR1, SIGHUP or submitit's signal, after the validation if one is due.

    A run that was started to ignore SIGHUP (nohup) goes on when its terminal closes.

    The handler only sets `received`; SkipNonFinite sets `agreed` after the next step, on all ranks alike. Replaces
    Lightning's handlers, which save in the middle of a step or not at all and end with exit code 0. A second Ctrl-C
    ends the process at once. A checkpoint that cannot be written ends the run in the same way, by SaveCheckpoints.
    """

    def __init__(self, checkpoints: SaveCheckpoints) -> None:
        self.checkpoints = checkpoints
        self.received = 0  # the signal that reached this rank, or NOT_WRITTEN
        self.agreed = 0  # the highest that reached any rank

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for signum in {*HANDLED, submitit_signal()} - {None}:
            if signum == signal.SIGHUP and hangup_ignored():
                continue
            signal.signal(signum, self._note)  # Lightning stored the handlers before, and restores them at the end.
        if trainer.received_sigterm:  # between Lightning's registration and ours
            self.received = signal.SIGTERM
            trainer._signal_connector.received_sigterm = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
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
            raise Stopped(self.agreed, trainer.global_step)
