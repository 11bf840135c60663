"""Progress display: a bar on a terminal, a line every `log_every` steps in a log file."""

from datetime import timedelta

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mae.callbacks.step_callback import StepCallback
from mae.callbacks.throughput import Throughput
from mae.callbacks.time_limit import at_the_end
from mae.train.training import Training

BAR = 12  # characters


class Numbers(ProgressColumn):
    """Shows as many of the numbers as the terminal has room for beside step, total, bar and time left."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        total = f"{task.total:.0f}"
        taken = len(f"step {total}/{total} {'-' * BAR} 0:00:00 left ")
        elapsed = {"elapsed": f"{timedelta(seconds=round(task.elapsed or 0))} elapsed"}
        return Text(fit_numbers(task.fields["numbers"] | elapsed, self.console.width - taken), no_wrap=True)


class ShowProgress(StepCallback):
    """Shows one bar for the whole run: loss, images per second, share of waiting for data, time left. Rank 0 only."""

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self.bar: Progress | None = None
        self.shown: dict[str, str] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        console = Console()
        if console.is_terminal:
            self.bar = progress_bar(console)
            self.task = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, numbers={})
            self.bar.start()

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero:
            return
        logged = step % self.throughput.log_every == 0 or at_the_end(trainer)
        if self.bar is not None:
            if logged:
                self.shown = numbers(self.throughput.latest)
            self.bar.update(self.task, completed=step, numbers=self.shown)
        elif logged:
            assert isinstance(module, Training)
            images_left = (trainer.max_steps - step) * module.schedule.global_batch
            left = timedelta(seconds=round(images_left / self.throughput.latest["perf/images_per_s"]))
            said = "  ".join(numbers(self.throughput.latest).values())
            print(f"step {step}/{trainer.max_steps}  {said}  left {left}", flush=True)

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()


def progress_bar(console: Console) -> Progress:
    """Builds the bar: step and total, bar, time left, and the numbers of the field `numbers` that fit."""
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=BAR),
        TimeRemainingColumn(),
        TextColumn("left"),
        Numbers(console),
        console=console,
    )


def numbers(latest: dict[str, float]) -> dict[str, str]:
    """Returns the latest metrics in words, in the order in which they are shown."""
    shown = {
        "loss": f"loss {latest['train/loss']:.4f}",
        "speed": f"{latest['perf/images_per_s']:,.0f} images/s",
        "wait": f"data wait {latest['perf/data_wait']:.0%}",
        "mfu": f"MFU {latest['perf/mfu']:.0%}",
        "memory": f"{latest['perf/memory_gb']:.1f} GB",
    }
    if "val/loss" in latest:
        shown["val"] = f"val {latest['val/loss']:.4f}"
    if latest["guard/skipped"]:
        shown["skipped"] = f"{latest['guard/skipped']:.0f} skipped"
    return shown


def fit_numbers(shown: dict[str, str], width: int) -> str:
    """Joins the numbers that fit into so many characters. The time elapsed goes first, then MFU, memory, images/s."""
    kept = dict(shown)
    for name in ("elapsed", "mfu", "memory", "speed", "wait", "val", "loss", "skipped"):
        if len("  ".join(kept.values())) <= width:
            break
        kept.pop(name, None)
    return "  ".join(kept.values())
