"""Progress display: a bar on a terminal, a line every `log_every` steps in a log file."""

from datetime import timedelta

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mae.callbacks.step_callback import StepCallback
from mae.callbacks.throughput import Throughput
from mae.callbacks.time_limit import at_the_end
from mae.train.training import Training


class ShowProgress(StepCallback):
    """Shows one bar for the whole run: loss, images per second, share of waiting for data, time left. Rank 0 only."""

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self.bar: Progress | None = None
        self.shown = ""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        console = Console()
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            self.task = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, numbers="")
            self.bar.start()

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero:
            return
        logged = step % self.throughput.log_every == 0 or at_the_end(trainer)
        if self.bar is not None:
            if logged:
                self.shown = self._numbers()
            self.bar.update(self.task, completed=step, numbers=self.shown)
        elif logged:
            assert isinstance(module, Training)
            images_left = (trainer.max_steps - step) * module.schedule.global_batch
            left = timedelta(seconds=round(images_left / self.throughput.latest["perf/images_per_s"]))
            print(f"step {step}/{trainer.max_steps}  {self._numbers()}  left {left}", flush=True)

    def _numbers(self) -> str:
        latest = self.throughput.latest
        text = (
            f"loss {latest['train/loss']:.4f}  {latest['perf/images_per_s']:,.0f} images/s"
            f"  data wait {latest['perf/data_wait']:.0%}"
            f"  MFU {latest['perf/mfu']:.0%}  {latest['perf/memory_gb']:.1f} GB"
        )
        if "val/loss" in latest:
            text += f"  val {latest['val/loss']:.4f}"
        if latest["guard/skipped"]:
            text += f"  {latest['guard/skipped']:.0f} skipped"
        return text

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()
