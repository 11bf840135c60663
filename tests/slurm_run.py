"""A run of train.py that is slow, or goes wrong, in the place of train.py (SLURM_TASK_PROGRAM).

RUN_FAILS is a JSON object: `pause`, seconds before each step; at `step`, on the last rank, `error`, a key of ERRORS or
nan, from there on, on all ranks; `once`, a file that is made by the first error, after which there is none.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

sys.path[0] = str(Path(__file__).parent.parent)

from mae.distributed.restarts import journal_of_end  # noqa: E402
from tests.logged_run import train_with  # noqa: E402

ERRORS = {
    "cuda": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "exception": ZeroDivisionError("division by zero"),
}


class Fail(pl.Callback):
    def __init__(self, step: int = -1, error: str = "", pause: float = 0, once: str | None = None) -> None:
        self.step, self.error, self.pause, self.once = step, error, pause, once and Path(once)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        def spoil(model: Any, inputs: Any, out: Any) -> Any:
            return out._replace(loss=out.loss * math.nan) if trainer.global_step >= self.step else out

        if self.error == "nan":
            module.model.register_forward_hook(spoil)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(self.pause)
        last = trainer.global_rank == trainer.world_size - 1
        if self.error not in ERRORS or not last or trainer.global_step != self.step:
            return
        if self.once is not None:
            if self.once.exists():
                return
            self.once.touch()
        raise ERRORS[self.error]


if __name__ == "__main__":
    with journal_of_end():
        train_with([Fail(**json.loads(os.environ["RUN_FAILS"]))], sys.argv[1:])
