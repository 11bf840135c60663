"""A run of train.py that also notes what each rank sees: python -m tests.logged_run LOG.jsonl SETTING=VALUE ..."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
from hydra import compose, initialize_config_dir

from mae.distributed.launch import Topology
from tasks.errors import readable_errors
from tasks.task import read_settings
from tasks.train import train
from tests.conftest import ROOT


class Log(pl.Callback):
    """Appends a line for each sample of a micro-batch: step, key, box, and a hash of the mask noise.

    As long as LOG.slow exists, each micro-batch waits for SLOW_SECONDS.
    """

    SLOW_SECONDS = 0.1

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        noise = module.noise(trainer.global_step, batch["positions"] % module.schedule.global_batch)
        masks = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in noise.cpu()]
        rows = zip(batch["keys"], batch["boxes"].tolist(), masks, strict=True)
        lines = "".join(json.dumps([trainer.global_step, *row]) + "\n" for row in rows)
        with open(self.path, "ab", buffering=0) as file:  # one write: the ranks share the file
            file.write(lines.encode())
        if Path(self.path).with_suffix(".slow").exists():
            time.sleep(self.SLOW_SECONDS)


def train_with(callbacks: list[pl.Callback], overrides: list[str]) -> None:
    """Does what train.py does, with callbacks added, in a process of its own."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        raw = compose("train", overrides=overrides)
    with readable_errors():
        train(read_settings(raw), Topology.from_environment() or Topology(), callbacks)


if __name__ == "__main__":
    train_with([Log(sys.argv[1])], sys.argv[2:])
