"""Measuring and logging: loss of the global batch, learning rate, images per second, data wait, MFU, memory."""

import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler

from mae.callbacks.skip_non_finite import SkipNonFinite
from mae.callbacks.step_callback import StepCallback
from mae.callbacks.time_limit import at_the_end
from mae.plan.devices import measure_flops, peak_flops, peak_memory
from mae.train.training import Training


class LoopTimer(Profiler):
    """Follows the training loop: Lightning announces each of its actions, one within the other, to its profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: dict[str, float] = {}  # under way → when it began
        self.count = 0  # of actions begun and ended
        self.seconds = 0.0  # spent waiting for the training loader
        self.batches: deque[float] = deque(maxlen=99)  # seconds of the latest micro-batches

    def start(self, action_name: str) -> None:
        self.count += 1
        self.actions[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        self.count += 1
        seconds = time.perf_counter() - self.actions.pop(action_name)
        if action_name.endswith("train_dataloader_next"):
            self.seconds += seconds
        elif action_name == "run_training_batch":
            self.batches.append(seconds)


class Throughput(StepCallback):
    """Logs every `log_every` steps to all loggers, under the number of steps made.

    train/loss         mean over the global batch of exactly this step, so that a repeated step repeats its value
    train/lr           learning rate of the update just made
    perf/images_per_s  of all ranks since the last row, without validation and probes
    perf/data_wait     share of that time spent waiting for the loader
    perf/mfu           model FLOPs utilisation: FLOPs of the published algorithm for these images, as a share of the
                       devices' peak (by data sheet, else by a matrix product timed at the start)
    perf/memory_gb     peak memory of rank 0 until now in 10^9 bytes: tensors on a GPU, the process on a CPU
    guard/skipped      steps without an update since the beginning of the run
    """

    def __init__(self, log_every: int, timer: LoopTimer, guard: SkipNonFinite, precision: str) -> None:
        self.log_every = log_every
        self.timer = timer
        self.guard = guard
        self.precision = precision
        self.latest: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Training)
        peak = peak_flops(module.device, self.precision) or measure_flops(module.device, self.precision)
        if self.precision == "16-mixed" and module.device.type == "cpu":  # few CPUs multiply float16 themselves
            peak = max(peak, measure_flops(module.device, "32-true"))
        self.seconds_at_peak = module.flops / (peak * trainer.world_size)  # for an image
        self.loss = torch.zeros((), device=module.device)
        self._start_window()

    def _start_window(self) -> None:
        self.images = 0
        self.since = time.perf_counter()
        self.waited = self.timer.seconds

    def pause(self, seconds: float) -> None:
        """Leaves time that was spent on something else out of the images per second."""
        self.since += seconds

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.pause(time.perf_counter() - self.paused)
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.log_metrics(trainer, found)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.loss += outputs["value"]
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Training)
        step = trainer.global_step
        self.images += module.schedule.global_batch
        if step % self.log_every == 0 or at_the_end(trainer):
            loss = trainer.strategy.reduce(self.loss / trainer.accumulate_grad_batches, reduce_op="mean")
            seconds = time.perf_counter() - self.since
            images_per_s = self.images / seconds
            measured = {
                "train/loss": float(loss),
                "train/lr": module.lr(step - 1),
                "perf/images_per_s": images_per_s,
                "perf/data_wait": (self.timer.seconds - self.waited) / seconds,
                "perf/mfu": images_per_s * self.seconds_at_peak,
                "perf/memory_gb": peak_memory(module.device) / 1e9,
                "guard/skipped": self.guard.skipped,
            }
            self.log_metrics(trainer, measured)
            self._start_window()
        self.loss.zero_()

    def log_metrics(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        """Hands metrics of this step to all loggers, and keeps them for the progress display."""
        self.latest |= metrics
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
