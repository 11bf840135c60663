"""Lightning module of pre-training: normalises images on the device, draws the mask noise, returns the loss."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mae.models.flops import pretraining_flops
from mae.models.mae import MaskedAutoencoder
from mae.models.noise import uniform_noise
from mae.train.average import AverageConfig
from mae.train.strategies import shard
from mae.train.training import Training

# The step that validation masks are drawn for: they depend on the sample alone, so that values compare across steps.
VALIDATION = -1


class PretrainConfig(AverageConfig, frozen=True, extra="forbid"):
    """Settings of task=pretrain, beside those of the model. `ema` averages the encoder.

    drop_path  stochastic depth: rate of the encoder's last block, falling linearly to 0 at the first
    """

    name: Literal["pretrain"] = "pretrain"
    drop_path: float = Field(0.0, ge=0, lt=1)


class Pretraining(Training):
    """Masked pre-training. The average is one of the encoder; the loss is always that of the trained weights.

    A batch holds `images` uint8 or uint16 [B, C, H, W] and `positions` int64 [B], the place of each in its epoch.
    """

    model: MaskedAutoencoder

    @property
    def flops(self) -> float:
        return pretraining_flops(self.model.config)

    def shard(self, model: Any, mesh: Any, *, reshard: bool | None = None) -> None:
        if isinstance(model, MaskedAutoencoder):
            shard(model, model.whole_blocks, mesh, ("encode", "reconstruct"), reshard)
        else:
            shard(model, model.blocks, mesh, ("encode",), reshard)

    def noise(self, step: int, rows: Tensor) -> Tensor:
        """Returns mask noise [B, N] for rows of the global batch of `step`."""
        return uniform_noise(self.seed, step, rows, self.model.config.patches)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Returns the loss of a micro-batch; the mask of an image follows from its row of the global batch."""
        rows = batch["positions"] % self.schedule.global_batch
        return self.model(self.pixels.normalise(batch["images"]), self.noise(self.global_step, rows)).loss

    def blank_batch(self, count: int) -> dict[str, Any]:
        config = self.model.config
        images = torch.zeros(count, config.in_channels, *config.image_size, dtype=torch.uint8, device=self.device)
        return {"images": images, "positions": torch.arange(count, device=self.device)}

    def validate(self, batch: dict[str, Any]) -> tuple[dict[str, float], int]:
        out = self.model(self.pixels.normalise(batch["images"]), self.noise(VALIDATION, batch["positions"]))
        return {"loss": float(out.loss)}, len(batch["images"])
