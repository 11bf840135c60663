"""The lease of the run folder, renewed by all ranks."""

import os
from typing import Any

import lightning.pytorch as pl
import torch

from mae.distributed.processes import identify
from mae.run.lease import Lease


class ShareLease(pl.Callback):
    """Has all ranks renew rank 0's lease (`mae.run.lease`), and rank 0 check it before each checkpoint."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        own = torch.tensor(identify(os.getpid()), dtype=torch.int64, device=module.device)
        everyone = trainer.strategy.all_gather(own)
        token = trainer.strategy.broadcast(self.lease.contents["token"])
        self.lease.share(token, everyone.reshape(-1, len(own)).tolist())

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            self.lease.check()
