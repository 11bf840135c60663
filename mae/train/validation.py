"""Validation metrics: means over all samples of all ranks."""

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class ValidationMeans(pl.LightningModule, ABC):
    """Sums what `validate` returns, and logs the means as val/NAME when the validation ends.

    Each sample counts once, however many batches and samples the ranks had. A rank that has fewer samples than others
    validates black images, which do not count: reductions are collective, and under FSDP forward passes too, so that
    the other ranks would wait for it for ever.
    """

    @abstractmethod
    def blank_batch(self, count: int) -> dict[str, Any]:
        """Returns a batch of so many black images, which is no part of the data: its samples have the number -1."""

    @abstractmethod
    def validate(self, batch: dict[str, Any]) -> tuple[dict[str, float], int]:
        """Returns means by name, and over how many samples they are taken. The names are the same for every batch."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        has_samples = len(batch["images"]) > 0
        means, count = self.validate(batch if has_samples else self.blank_batch(2))
        for name, mean in means.items():
            total = self.tallies.setdefault(name, torch.zeros(2, dtype=torch.float64, device=self.device))
            if has_samples:
                total += torch.tensor([mean * count, count], dtype=torch.float64, device=self.device)

    def on_validation_epoch_start(self) -> None:
        self.tallies: dict[str, Tensor] = {}

    def on_validation_epoch_end(self) -> None:
        for name, sums in self.tallies.items():
            total, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
            self.log(f"val/{name}", total / count, logger=False)
