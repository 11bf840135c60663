"""Validation metrics: means over all samples of all ranks."""

import lightning.pytorch as pl
import torch
from torch import Tensor


class ValidationMeans(pl.LightningModule):
    """Sums what `validation_step` tallies, and logs the means as val/NAME when the validation ends.

    Each sample counts once, however many batches and samples the ranks had.
    """

    def on_validation_epoch_start(self) -> None:
        self.tallies: dict[str, Tensor] = {}

    def tally(self, name: str, mean: float, count: int) -> None:
        """Adds the mean over `count` validation samples to val/NAME."""
        total = self.tallies.setdefault(name, torch.zeros(2, dtype=torch.float64, device=self.device))
        total += torch.tensor([mean * count, count], dtype=torch.float64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        for name, sums in self.tallies.items():
            total, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
            self.log(f"val/{name}", total / count, logger=False)
