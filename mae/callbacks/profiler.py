"""Profiling of a few steps, for `profile=true`."""

from pathlib import Path

import lightning.pytorch as pl
from torch.profiler import profile, schedule

from mae.callbacks.step_callback import StepCallback

WARMUP_STEPS, STEPS = 5, 10


class StepProfiler(StepCallback):
    """Writes runs/NAME/trace.json: ten steps after five of warm-up, for ui.perfetto.dev. Rank 0 only."""

    def __init__(self, run: Path) -> None:
        self.file = run / "trace.json"
        self.profile: profile | None = None
        self.written = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.profile = profile(
                schedule=schedule(wait=0, warmup=WARMUP_STEPS, active=STEPS, repeat=1), on_trace_ready=self._write
            )
            self.profile.start()

    def _write(self, finished: profile) -> None:
        finished.export_chrome_trace(str(self.file))
        self.written = True
        print(f"{self.file}: {STEPS} steps, for ui.perfetto.dev", flush=True)

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.profile is not None:
            self.profile.step()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.profile is not None:
            self.profile.stop()
            if not self.written:
                print(f"profile=true: the run ended within the {WARMUP_STEPS} steps of warm-up, no trace", flush=True)
            self.profile = None
