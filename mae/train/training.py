"""Base of the Lightning modules: optimiser, learning rate, seeds of each micro-batch, contents of a checkpoint."""

import random
from abc import ABC, abstractmethod
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR

from mae.models.pixels import Pixels
from mae.train.average import pair_parameters, update_average
from mae.train.lightning_progress import loops_at_step
from mae.train.optim import NamedAdamW, OptimConfig, build_optimizer
from mae.train.precision import choose_float32_products
from mae.train.schedule import Schedule
from mae.train.validation import ValidationMeans


class Training(ValidationMeans, ABC):
    """Trains `model` by `schedule`.

    recipe   plain dictionary of the settings that decide the result; stored in every checkpoint
    pixels   scale of the images
    average  model for the exponential moving average of the weights with decay `ema` per step (mae/train/average.py),
             of all of `model` or of its encoder; None: no average

    `found_inf` is 1 on the device if the guard skips the update under way.

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
        average: nn.Module | None = None,
        ema: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.schedule = schedule
        self.seed = seed
        self.pixels = pixels
        self.recipe = recipe
        self.average = average
        self.ema = ema
        self.averaged: list[tuple[Tensor, Tensor]] = []
        self.found_inf: Tensor | None = None

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
    def shard(self, model: Any, mesh: Any, *, reshard: bool | None = None) -> None:
        """Shards the model or its average over the ranks of `mesh` (`mae.train.strategies.shard`)."""

    def configure_model(self) -> None:
        """Shards model and average under FSDP. Lightning calls this before every fit and validation."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.model, FSDPModule):
            mesh = self.trainer.strategy.device_mesh["data_parallel"]
            self.shard(self.model, mesh)
            if self.average is not None:
                self.shard(self.average, mesh, reshard=True)  # no backward pass comes to do it

    def on_fit_start(self) -> None:
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
        """Clips by norm. Lightning refuses fused optimisers, which divide by the scale of 16-mixed inside the step."""
        if not gradient_clip_val:
            return
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
        if self.trainer.scaler is not None:
            norm = norm / self.trainer.scaler.scale(torch.ones_like(norm))
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        if self.average is not None and self.ema is not None:
            if not self.averaged:  # FSDP has replaced the parameters since the beginning, and keeps them from here on
                self.averaged = pair_parameters(self.average, self.model)
            update_average(self.averaged, self.ema, self.global_step, self.found_inf)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mae"] = {"step": self.global_step, "recipe": self.recipe}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loops"] = loops_at_step(self.trainer, checkpoint["mae"]["step"], self.schedule)
