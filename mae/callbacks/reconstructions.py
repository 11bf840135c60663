"""Reconstruction pictures: the same few images, under the same masks, every `every` steps."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from mae.callbacks.step_callback import StepCallback
from mae.pictures.draw import STATISTICS, Statistics, reconstruction_columns, save_grid, shown_range, tiles, to_image
from mae.train.pretraining import VALIDATION, Pretraining


class Reconstructions(StepCallback):
    """Writes runs/NAME/reconstructions/step-00000500.png every `every` steps and at the end, and a table to W&B.

    Every rank computes them, since each may hold a part of the weights; rank 0 writes.

    images      uint8 or uint16 [B, C, H, W]  always the same, under the same masks
    statistics  as of `MaskedAutoencoder.reconstruct`
    """

    def __init__(self, run: Path, images: Tensor, every: int, statistics: Statistics = "original") -> None:
        self.folder = run / "reconstructions"
        self.images = images
        self.shown = shown_range(images)
        self.every = every
        self.statistics: Statistics = statistics
        self.painted_step = -1

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step % self.every == 0:
            self.paint(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.paint(trainer, module)

    def paint(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Pretraining)
        step = trainer.global_step
        if step == self.painted_step:
            return
        self.painted_step = step
        images = module.pixels.normalise(self.images.to(module.device))
        noise = module.noise(VALIDATION, torch.arange(len(images), device=module.device))
        with trainer.precision_plugin.forward_context():
            reconstruction = module.model.reconstruct(images, noise, statistics=self.statistics)
        if not trainer.is_global_zero:
            return
        config = module.model.config
        unit = reconstruction._replace(images=module.pixels.denormalise(reconstruction.images))
        originals = module.pixels.unit(self.images.to(module.device))
        columns = reconstruction_columns(originals, unit, config.patch_size, self.shown)
        lines = [f"Step {step:,}: {config.mask_ratio:.0%} of each image is hidden, and painted by the model"]
        self.folder.mkdir(exist_ok=True)
        lines += [STATISTICS[self.statistics]] * config.norm_pix
        save_grid(columns, self.folder / f"step-{step:08d}.png", lines, self.shown)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_table(logger, columns, step)


def _log_table(logger: WandbLogger, columns: Tensor, step: int) -> None:
    """Logs the pictures as a table of W&B, a row per image."""
    import wandb  # slow to import, and only tracked runs need it

    rows = [[step, *(wandb.Image(to_image(tile)) for tile in tiles(row))] for row in columns]
    logger.log_table("reconstructions", ["step", "original", "masked", "reconstruction"], rows, step=step)
