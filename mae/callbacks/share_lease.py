"""The lease of the run folder, renewed by all ranks."""

import os

import lightning.pytorch as pl
import torch

from mae.distributed.processes import identify
from mae.run.lease import Lease


class ShareLease(pl.Callback):
    """Tells rank 0's lease the processes of all ranks, each of which renews it from then on (`mae.run.lease`)."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        own = torch.tensor(identify(os.getpid()), dtype=torch.int64, device=module.device)
        everyone = trainer.strategy.all_gather(own)
        self.lease.share(everyone.reshape(-1, len(own)).tolist())
