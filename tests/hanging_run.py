"""A run of train.py in which ranks stand still at chosen places: python -m tests.hanging_run PLACES SETTING=VALUE ...

PLACES is a JSON list of [place, rank, step, seconds]; "library" stands for a call that keeps Python's interpreter.
"""

import ctypes
import json
import os
import sys
import time

import lightning.pytorch as pl

from tests.logged_run import train_with


class StandStill(pl.Callback):
    """Stands still once in each place: before the backward pass, between steps, in a validation, in a save."""

    def __init__(self, places: list) -> None:
        self.places = places

    def _pass(self, trainer: pl.Trainer, *names: str) -> None:
        for place in self.places[:]:
            name, rank, step, seconds = place
            here = name in names and rank == trainer.global_rank and step == trainer.global_step
            if here and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
                self.places.remove(place)
                print(f"{name} of rank {rank} stands still after step {step}", flush=True)
                ctypes.PyDLL(None).sleep(seconds) if name == "library" else time.sleep(seconds)

    def on_before_backward(self, trainer: pl.Trainer, module, loss) -> None:
        self._pass(trainer, "step", "library")

    def on_train_batch_start(self, trainer: pl.Trainer, module, batch, batch_idx) -> None:
        self._pass(trainer, "data")

    def on_validation_batch_end(self, trainer: pl.Trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._pass(trainer, "validation")

    def on_save_checkpoint(self, trainer: pl.Trainer, module, checkpoint) -> None:
        self._pass(trainer, "save")


if __name__ == "__main__":
    train_with([StandStill(json.loads(sys.argv[1]))], sys.argv[2:])
