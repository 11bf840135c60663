"""Masked pre-training (task=pretrain)."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mae.callbacks.reconstructions import Reconstructions
from mae.distributed.rank_zero import say
from mae.errors import ConfigError
from mae.models.execution import prepare_blocks
from mae.models.mae import MaskedAutoencoder
from mae.models.vit import Encoder
from mae.probes.trivial_losses import trivial_losses
from mae.train.pretraining import VALIDATION, PretrainConfig, Pretraining
from tasks.task import Task

TRIVIAL_IMAGES = 256  # on which the losses of trivial predictors are computed
PICTURE_IMAGES = 8


class Pretrain(Task[PretrainConfig]):
    """A masked autoencoder on images without labels."""

    settings_type = PretrainConfig
    training = Pretraining
    loss = "loss on hidden patches"
    of_average = "the encoder's weights"

    def refuse_settings(self, checkpoint: Path | None) -> None:
        # Runs that were begun with it resume: it made no difference.
        if self.config.optim.layer_decay != 1 and checkpoint is None:
            raise ConfigError(
                f"optim.layer_decay={self.config.optim.layer_decay} is for fine-tuning (task=finetune, task=segment): "
                "in pre-training set it to 1"
            )

    def recipe(self, precision: str) -> dict[str, Any]:
        return super().recipe(precision) | {"task": self.settings.model_dump(mode="json", include={"ema", "drop_path"})}

    def averaged(self, model: MaskedAutoencoder) -> Encoder:
        return Encoder(model.config)

    def model(self, checkpoint: Path | None) -> MaskedAutoencoder:
        config = self.config
        model = MaskedAutoencoder(config.model, self.settings.drop_path)
        if config.init_from is not None and checkpoint is None:
            from mae.formats.warm_start import initialise_from

            pixels = config.data.mean, config.data.std
            for sentence in initialise_from(model, Path(config.init_from), pixels, config.init_weights):
                say(f"init_from: {sentence}")
        prepare_blocks(model.whole_blocks, config.blocks)
        return model

    def describe(self, model: MaskedAutoencoder) -> dict[str, str]:
        config = self.config.model
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows, columns = config.grid
        return {
            "model": f"encoder {config.width} x {config.depth} blocks, decoder {config.decoder_width} x "
            f"{config.decoder_depth}, {parameters / 1e6:.1f} M parameters",
            "patches": f"{rows} x {columns} of {config.patch_size} px, {config.visible} of {config.patches} visible",
        }

    @property
    def probe(self) -> str | None:
        val = self.data.val_index
        if val is None:
            return None
        labelled = all(bool((index.labels >= 0).all()) for index in (self.data.train_index, val))
        return "suite" if labelled else "reconstruct"

    def next_steps(self) -> dict[str, str]:
        return super().next_steps() | self.use_encoder()

    def callbacks(self) -> list[pl.Callback]:
        images, _ = self.data.examples(PICTURE_IMAGES)
        every, statistics = self.config.pictures_every, self.config.pictures_statistics
        callbacks: list[pl.Callback] = [Reconstructions(self.config.run, images, every, statistics)]
        probe = self.config.online_probe
        if probe.every is not None:
            from tasks.online_probe import build_online_probe

            callbacks.append(build_online_probe(probe, probe.every, self.data, self.config.model, self.topology))
        return callbacks

    def results(self, module: Pretraining, step: int) -> dict[str, Any]:
        """Computes the losses of trivial predictors under the masks of validation, and names the last picture."""
        images, positions = self.data.examples(TRIVIAL_IMAGES)
        noise = module.noise(VALIDATION, positions)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pixels = module.pixels.to(device)
        picture = self.config.run / "reconstructions" / f"step-{step:08d}.png"
        floors = trivial_losses(images, noise, self.config.model, lambda some: pixels.normalise(some.to(device)))
        return {"floors": floors, "floor_images": len(images), "reconstruction": str(picture)}
