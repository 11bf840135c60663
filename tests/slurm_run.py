"""A run of train.py that is slow, or goes wrong, in the place of train.py (SLURM_TASK_PROGRAM).

RUN_FAILS is a JSON object: `begin`, seconds of the first start before its first step; `pause`, seconds before each
step; at `step`, on the last rank, `error`: a key of ERRORS, memory (takes all there is), killed, or, on all ranks and
from there on, nan; `when`, a file without which there is no error, which removes it: it comes once, at `step` or later.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

sys.path[0] = str(Path(__file__).parent.parent)

from mae.distributed.restarts import journal_of_end  # noqa: E402
from mae.distributed.stop import stop_at_once  # noqa: E402
from tests.logged_run import train_with  # noqa: E402

ERRORS = {
    "cuda": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "exception": ZeroDivisionError("division by zero"),
}


class Fail(pl.Callback):
    def __init__(
        self, step: int = -1, error: str = "", pause: float = 0, when: str | None = None, begin: float = 0
    ) -> None:
        self.step, self.error, self.pause, self.when = step, error, pause, when and Path(when)
        self.begin = begin if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else 0

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        if self.begin:
            print(f"rank {trainer.global_rank} begins", flush=True)
            time.sleep(self.begin)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        def spoil(model: Any, inputs: Any, out: Any) -> Any:
            return out._replace(loss=out.loss * math.nan) if trainer.global_step >= self.step else out

        if self.error == "nan":
            module.model.register_forward_hook(spoil)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(self.pause)
        if trainer.global_rank < trainer.world_size - 1:
            return
        if self.when is None and trainer.global_step != self.step:
            return
        if self.when is not None:
            if trainer.global_step < self.step or not self.when.exists():
                return
            self.when.unlink()
        if self.error in ERRORS:
            raise ERRORS[self.error]
        if self.error == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.error == "memory":
            print(len([bytearray(1 << 26) for _ in range(64)]), "times 64 MB, and nobody minds")


if __name__ == "__main__":
    with stop_at_once(), journal_of_end():
        train_with([Fail(**json.loads(os.environ["RUN_FAILS"]))], sys.argv[1:])
