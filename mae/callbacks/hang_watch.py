"""Hang watch: ranks that wait for one another without an end write their stacks and exit, to be started again.

1 count  LoopTimer hears of every action of the training loop; the main thread does nothing more
2 talk   a thread of each rank tells the others, through the store of the process group, how far it is
3 watch  another adds up the time in which nothing was counted; beyond a limit hang_verdict judges the ranks' signs
"""

import faulthandler
import json
import os
import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch.distributed as dist
from pydantic import BaseModel, Field

from mae.callbacks.throughput import LoopTimer

TIMES = 20  # the median micro-batch: faster than that nothing hangs
HEARD, SILENT = 3, 9  # looks beyond patience: the others were heard; they are silent if they were not heard since


class HangConfig(BaseModel, frozen=True, extra="forbid"):
    """Limits in seconds: in a step after the first (None: no watch), and elsewhere (start, data, validation, save)."""

    step: float | None = Field(600, gt=0)
    other: float = Field(3600, gt=0)


class HangWatch(pl.Callback):
    """Ends a start in which a rank has stopped or waits without an end, in training and validation.

    A rank within its own limit is waited for, however long the others have waited. Time is counted in looks: a run that
    was suspended as a whole has not waited.
    """

    def __init__(self, run: Path, step_limit: float, other_limit: float, timer: LoopTimer) -> None:
        self.run, self.step_limit, self.other_limit, self.timer = run, step_limit, other_limit, timer
        self.patience = min(step_limit, other_limit)  # beyond it silence is a hang, whatever the others are doing
        self.period = min(5.0, self.patience / 10)
        self.ended, self.threads = threading.Event(), list[threading.Thread]()

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.trainer, self.rank, self.ranks = trainer, trainer.global_rank, trainer.world_size
        self.waited, self.signs, self.verdict = 0.0, list[list](), ""
        store = dist.distributed_c10d._get_default_store().clone() if dist.is_initialized() else dist.HashStore()
        self.store = dist.PrefixStore(f"hangs {trainer.strategy.broadcast(secrets.token_hex(4))}", store)
        self.store.set("verdict", "")
        self.store.set(str(self.rank), json.dumps(self.sign(0)))
        trainer.strategy.barrier()
        self.ended.clear()
        # A store whose process is stopped never answers: a thread of its own waits for it.
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._watch)]
        for thread in self.threads:
            thread.start()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(self.period)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "")

    @property
    def limit(self) -> float:
        """Returns the seconds that what is under way may take."""
        if not self.timer.batches or "run_training_batch" not in self.timer.actions:
            return self.other_limit
        return max(self.step_limit, TIMES * median(self.timer.batches.copy()))

    def sign(self, talks: int) -> list:
        """Returns the values of hang_verdict.Sign: how far this rank is."""
        action, process = ["start", *self.timer.actions][-1], f"process {os.getpid()} on {socket.gethostname()}"
        place = f"{action} after step {self.trainer.global_step} ({process})"
        return [talks, self.timer.count, self.waited, self.limit, place]

    def _talk(self) -> None:
        talks = 0
        while not self.ended.wait(self.period):
            talks += 1
            with suppress(RuntimeError):  # the process that holds the store has ended
                self.store.set(str(self.rank), json.dumps(self.sign(talks)))
                if self.verdict:
                    self.store.set("verdict", self.verdict)
                elif heard := self.store.get("verdict").decode():
                    self.verdict = heard
                if self.waited > self.patience:
                    self.signs = list(map(json.loads, self.store.multi_get(list(map(str, range(self.ranks))))))

    def _watch(self) -> None:
        seen, looks, before = -1, 0, list[list]()
        while not self.ended.wait(self.period):
            faulthandler.dump_traceback_later(self.step_limit, file=2)  # if a library keeps the interpreter from here
            self.waited = self.waited + self.period if self.timer.count == seen else 0.0
            seen, looks = self.timer.count, looks + 1 if self.waited > self.patience else 0
            if looks == HEARD:
                before = self.signs
            if looks == SILENT or self.verdict:
                faulthandler.dump_traceback_later(60, exit=True, file=2)  # the disk of program and run may hang as well
                from mae.callbacks.hang_verdict import end, judge

                looks, self.verdict = 0, self.verdict or judge(before, self.signs, self.ranks)
                if self.verdict:
                    end(self)
        faulthandler.cancel_dump_traceback_later()
