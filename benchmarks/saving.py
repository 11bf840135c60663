"""Pause of the training at a save, written beside the training and within the step: python -m benchmarks.saving

Whole runs of train.py's own loop on the built-in digits, in turn: the encoder of a ViT-B, 1 GB of weights and moments,
a checkpoint every 10 steps. A pause is what the step with the save takes longer than the median of the others.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra import compose, initialize_config_dir

from mae.callbacks.save_checkpoints import SaveCheckpoints
from mae.distributed.launch import Topology
from mae.run.checkpoint_files import checkpoints
from mae.run.checkpoint_writer import BackgroundCheckpointIO, write_checkpoint
from tasks.cli import quieten
from tasks.task import read_settings
from tasks.train import train

EVERY, STEPS = 10, 30
SETTINGS = ("model=vit_base", "model.patch_size=4", "model.decoder_width=64")


class WithinTheStep(BackgroundCheckpointIO):
    """Writes before it returns, and copies nothing."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def then(self, work: Callable[[], None]) -> None:
        work()


class Clock(pl.Callback):
    """Takes the time at which each step begins."""

    def __init__(self, writer: BackgroundCheckpointIO) -> None:
        self.writer, self.begun = writer, list[float]()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        (saving,) = (callback for callback in trainer.callbacks if isinstance(callback, SaveCheckpoints))  # pyright: ignore[reportAttributeAccessIssue]
        saving.writer = trainer.strategy.checkpoint_io = self.writer

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.begun.append(time.perf_counter())


def run(writer: BackgroundCheckpointIO, micro_batch: int) -> tuple[float, float, float]:
    """Trains, and returns the median step without a save and the median pause in seconds, and the bytes of a file."""
    with tempfile.TemporaryDirectory() as runs, initialize_config_dir(str(Path("conf").absolute()), version_base=None):
        batch = [f"global_batch={micro_batch}", f"max_steps={STEPS}", f"checkpoint.every_steps={EVERY}"]
        rest = [f"runs={runs}", "name=saving", "val_every=null", "log_every=1000"]
        config = read_settings(compose("train", [*SETTINGS, *batch, *rest]))
        clock = Clock(writer)
        train(config, Topology(), [clock])
        size = checkpoints(Path(runs) / "saving")[0].stat().st_size
    seconds = [after - before for before, after in zip(clock.begun, clock.begun[1:], strict=False)]
    saving = seconds[EVERY - 1 :: EVERY]
    usual = statistics.median(time for step, time in enumerate(seconds, 1) if step % EVERY and step > EVERY)
    return usual, statistics.median(saving[1:]) - usual, size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=8)
    arguments = parser.parse_args()
    quieten()
    for number in range(arguments.rounds):
        for writer in (WithinTheStep(), BackgroundCheckpointIO()):
            usual, pause, size = run(writer, arguments.micro_batch)
            print(
                f"round {number + 1}, {type(writer).__name__}: a step {usual:.3f} s, pause at a save of "
                f"{size / 1e9:.2f} GB {pause:.3f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
