"""Base of the Lightning modules: optimiser, learning rate, seeds of each micro-batch, contents of a checkpoint."""

import random
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR

from mae.models.pixels import Pixels
from mae.models.vit import choose_attention
from mae.train.lightning_progress import loops_at_step
from mae.train.optim import NamedAdamW, OptimConfig, build_optimizer
from mae.train.precision import choose_float32_products
from mae.train.schedule import Schedule
from mae.train.validation import ValidationMeans


class Training(ValidationMeans, ABC):
    """Trains `model` by `schedule`.

    recipe  plain dictionary of the settings that decide the result; stored in every checkpoint
    pixels  scale of the images

    `step` is the only position. The random numbers that torch, NumPy and Python draw in a micro-batch (drop path,
    mixup, prompts) follow from (seed, step, micro-batch, rank): a resumed run draws the same, and no generator state is
    saved.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        schedule: Schedule,
        *,
        seed: int,
        pixels: Pixels,
        recipe: dict[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.schedule = schedule
        self.seed = seed
        self.pixels = pixels
        self.recipe = recipe

    @property
    @abstractmethod
    def flops(self) -> float:
        """FLOPs of a step per image, for the MFU (mae/models/flops.py)."""

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Returns the mean loss of a micro-batch."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Returns `loss`, which Lightning divides by the accumulation, and `value`, the same undivided, for the log."""
        loss, weight = self.loss(batch), self.schedule.weight(len(batch["images"]))
        if weight != 1:
            loss = loss * weight
        return {"loss": loss, "value": loss.detach()}

    @abstractmethod
    def shard(self, mesh: Any) -> None:
        """Shards the model over the ranks of `mesh` (`mae.train.strategies.shard`)."""

    def configure_model(self) -> None:
        """Shards the model under FSDP. Lightning calls this before every fit and validation."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.model, FSDPModule):
            self.shard(self.trainer.strategy.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        choose_attention(self, device=self.device)
        choose_float32_products(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        place = (self.seed, self.global_step, batch_idx % self.schedule.accumulate, self.global_rank)
        seed = int(np.random.SeedSequence(place).generate_state(1)[0])
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def lr(self, step: int) -> float:
        """Returns the learning rate of the update after `step` updates."""
        return self.schedule.learning_rate(step)

    def build_optimizer(self) -> NamedAdamW:
        """Returns the optimiser, each parameter group at its peak learning rate; the schedule scales all alike."""
        return build_optimizer(self.model.named_parameters(), self.optim, self.schedule.peak_lr)

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer()
        scheduler = LambdaLR(optimizer, lambda step: self.lr(step) / self.schedule.peak_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Sets the learning rate: a checkpoint holds that of the schedule under which it was saved."""
        scheduler: Any = self.lr_schedulers()
        for group, peak in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = peak * (self.lr(scheduler.last_epoch) / self.schedule.peak_lr)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips by norm. Lightning refuses fused optimisers, though they unscale inside the step only with a scaler."""
        if self.trainer.scaler is not None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mae"] = {"step": self.global_step, "recipe": self.recipe}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loops"] = loops_at_step(self.trainer, checkpoint["mae"]["step"], self.schedule)
