"""Masked pre-training (task=pretrain)."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from data.errors import DataError
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
        if self.config.online_probe.every is not None:
            callbacks.append(self._online_probe(self.config.online_probe.every))
        return callbacks

    def _online_probe(self, every: int) -> pl.Callback:
        """Builds the online probe on test images, else training images; with kNN if all of them have labels."""
        from data.evaluation import EvaluationImages
        from mae.callbacks.online_probe import OnlineProbe

        probe, data, topology = self.config.online_probe, self.data, self.topology
        images = EvaluationImages(data, data.micro_batch, topology.rank, topology.ranks)
        streamed = data.config.mode == "stream"
        if streamed and data.val_index is None:
            raise ConfigError(
                f"online_probe.every={every} needs images that have numbers, and a stream has none: set "
                "data.val_path, or online_probe.every=null"
            )
        test = "train" if data.val_index is None else "test"
        held_out = images.samples(test, probe.test_images)
        train = None
        if test == "test" and not streamed and bool((images.labels("test", held_out) >= 0).all()):
            samples = images.samples("train", probe.train_images)
            if bool((images.labels("train", samples) >= 0).all()):
                if differing := images.differing_classes("train", "test"):
                    raise DataError(f"online_probe.every={every}: {differing} Or set online_probe.every=null.")
                train = images.batches("train", samples)
                for remark in images.remarks_on_labels():
                    say(f"labels: {remark}")
        if train is None:
            say("online probe: knn/top1 is left out, it needs labels of all training and validation images")
        return OnlineProbe(every, probe.k, train, images.batches(test, held_out))

    def results(self, module: Pretraining, step: int) -> dict[str, Any]:
        """Computes the losses of trivial predictors under the masks of validation, and names the last picture."""
        images, positions = self.data.examples(TRIVIAL_IMAGES)
        noise = module.noise(VALIDATION, positions)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pixels = module.pixels.to(device)
        picture = self.config.run / "reconstructions" / f"step-{step:08d}.png"
        floors = trivial_losses(images, noise, self.config.model, lambda some: pixels.normalise(some.to(device)))
        return {"floors": floors, "floor_images": len(images), "reconstruction": str(picture)}
