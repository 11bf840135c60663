"""The Lightning module of pre-training: normalises on the device, draws the mask noise, steps, remembers."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR

from mae.loops import loops_at_step
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import uniform_noise
from mae.models.vit import choose_attention
from mae.optim import OptimConfig, adamw, learning_rate
from mae.pixels import Pixels
from mae.precision import choose_float32_products
from mae.recipe import Plan
from mae.strategies import shard

# Validation masks follow from the sample alone, so that values compare across steps; no training step has this number.
VALIDATION = -1


class Pretraining(pl.LightningModule):
    """Masked pre-training of `model` by `plan`.

    recipe    plain dictionary of the settings that decide the result; stored in every checkpoint
    pixels    the scale of the images

    A batch holds `images` uint8 or uint16 [B, C, H, W] and `positions` int64 [B], the place of each in its epoch.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        optim: OptimConfig,
        plan: Plan,
        *,
        seed: int,
        pixels: Pixels,
        recipe: dict[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.plan = plan
        self.seed = seed
        self.recipe = recipe
        self.pixels = pixels
        self.validation_sum: Tensor

    def configure_model(self) -> None:
        """Shards the model when the strategy asks for it; Lightning calls this before every fit and validation."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.model, FSDPModule):
            shard(self.model, self.trainer.strategy.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        choose_float32_products(self.device)
        choose_attention(self.model.blocks, self.model.decoder_blocks, device=self.device)

    def noise(self, step: int, rows: Tensor) -> Tensor:
        """Mask noise [B, N] for rows of the global batch of `step`."""
        return uniform_noise(self.seed, step, rows, self.model.config.patches)

    def lr(self, step: int) -> float:
        """Learning rate of the update that follows after `step` updates."""
        plan = self.plan
        return learning_rate(
            step, peak=plan.peak_lr, floor=plan.min_lr, warmup=plan.warmup_steps, total=plan.total_steps
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        rows = batch["positions"] % self.plan.global_batch
        out = self.model(self.pixels.normalise(batch["images"]), self.noise(self.global_step, rows))
        # Lightning divides `loss` by the accumulation; `value` stays as it is, for the log.
        return {"loss": out.loss, "value": out.loss.detach()}

    def blank_batch(self) -> dict[str, Tensor]:
        """Two black images, for what needs some batch."""
        config = self.model.config
        images = torch.zeros(2, config.in_channels, *config.image_size, dtype=torch.uint8, device=self.device)
        return {"images": images, "positions": torch.arange(2, device=self.device)}

    def on_validation_epoch_start(self) -> None:
        self.validation_sum = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        count = len(batch["images"])
        if count == 0:  # more ranks than samples
            return
        out = self.model(self.pixels.normalise(batch["images"]), self.noise(VALIDATION, batch["positions"]))
        self.validation_sum += torch.tensor([float(out.loss) * count, count], dtype=torch.float64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """The mean over all samples of all ranks, each counted once, whatever their numbers of batches."""
        total, count = self.trainer.strategy.reduce(self.validation_sum, reduce_op="sum")
        self.log("val/loss", total / count, logger=False)

    def configure_optimizers(self) -> Any:
        plan = self.plan
        optimizer = adamw(self.model.named_parameters(), self.optim, plan.peak_lr)
        scheduler = LambdaLR(optimizer, lambda step: self.lr(step) / plan.peak_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mae"] = {"step": self.global_step, "recipe": self.recipe}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loops"] = loops_at_step(self.trainer, checkpoint["mae"]["step"], self.plan)
