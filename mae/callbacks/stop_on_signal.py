"""Stops a run at a step boundary when the scheduler or the user says so, with nothing lost."""

import os
import signal
from types import FrameType

import lightning.pytorch as pl

from mae.callbacks.save_checkpoints import SaveCheckpoints
from mae.callbacks.step_callback import StepCallback
from mae.distributed.rank_zero import say
from mae.distributed.slurm import submitit_signal
from mae.errors import RunEnded

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(RunEnded):
    """The run was told to stop and has saved; `exit_code` is what the shell shall see."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.exit_code = 130 if signum == signal.SIGINT else 143


class StopOnSignal(StepCallback):
    """SIGINT, SIGTERM and SIGUSR1 set a flag; Guard makes the ranks agree on it, and all of them save and stop,
    after the validation where one is due.

    Under submitit its signal does so too. Replaces Lightning's handlers, which save in the middle of a step or not at
    all and end with exit code 0. A second Ctrl-C ends the process at once.
    """

    def __init__(self, checkpoints: SaveCheckpoints) -> None:
        self.checkpoints = checkpoints
        self.received = 0  # by this rank
        self.agreed = 0  # by all ranks, after a step

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for signum in {*HANDLED, submitit_signal()} - {None}:
            signal.signal(signum, self._note)  # Lightning has noted what was there before, and restores it at the end
        if trainer.received_sigterm:  # between Lightning's registration and ours
            self.received = signal.SIGTERM
            trainer._signal_connector.received_sigterm = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = signum
        say(f"\n{signal.Signals(signum).name}: saving at the next step, then stopping")

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.checkpoints.validated_next(trainer):
            self._stop_if_agreed(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._stop_if_agreed(trainer)

    def _stop_if_agreed(self, trainer: pl.Trainer) -> None:
        if self.agreed and trainer.global_step < trainer.max_steps:
            self.checkpoints.save(trainer)
            raise Stopped(self.agreed, trainer.global_step)
