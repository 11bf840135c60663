"""Base of the callbacks that act once per optimiser step, where Lightning calls once per micro-batch."""

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl


class StepCallback(pl.Callback, ABC):
    """Calls `on_step_end` after the last micro-batch of each step; `trainer.global_step` already counts that step."""

    @abstractmethod
    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, module)
