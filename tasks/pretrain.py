"""Masked pre-training (task=pretrain)."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from data.evaluation import EvaluationImages, Split
from mae.callbacks.online_probe import OnlineProbe
from mae.callbacks.reconstructions import Reconstructions
from mae.errors import ConfigError
from mae.formats.load import initialise_from
from mae.models.execution import prepare_blocks
from mae.models.mae import MaskedAutoencoder
from mae.models.pixels import Pixels
from mae.plan.training_cost import Workload, pretraining_workload
from mae.probes.trivial_losses import trivial_losses
from mae.report.loss_curve import draw_loss_curve
from mae.report.summary import say_closing, summarise
from mae.train.pretraining import VALIDATION, Pretraining
from mae.train.schedule import Schedule
from mae.train.training import Training
from tasks.task import Task

FLOOR_IMAGES = 256
PICTURE_IMAGES = 8


class Pretrain(Task):
    """A masked autoencoder on images without labels."""

    def model(self, start: Path | None) -> MaskedAutoencoder:
        config = self.config
        model = MaskedAutoencoder(config.model)
        if config.init_from is not None and start is None:
            initialise_from(model, Path(config.init_from))
        prepare_blocks(model.whole_blocks, config.blocks)
        return model

    def module(self, model: nn.Module, schedule: Schedule, recipe: dict[str, Any]) -> Pretraining:
        config = self.config
        assert isinstance(model, MaskedAutoencoder)
        pixels = Pixels(config.data.mean, config.data.std)
        return Pretraining(model, config.optim, schedule, seed=config.seed, pixels=pixels, recipe=recipe)

    def describe(self, model: nn.Module) -> list[tuple[str, str]]:
        config = self.config.model
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows, columns = config.grid
        return [
            (
                "model",
                f"encoder {config.width} x {config.depth} blocks, decoder {config.decoder_width} x "
                f"{config.decoder_depth}, {parameters / 1e6:.1f} M parameters",
            ),
            (
                "patches",
                f"{rows} x {columns} of {config.patch_size} px, {config.visible} of {config.patches} visible",
            ),
        ]

    def workload(self, precision: str, device: torch.device) -> Workload:
        return pretraining_workload(self.config.model, precision, device)

    def callbacks(self) -> list[pl.Callback]:
        images, _ = self.data.examples(PICTURE_IMAGES)
        callbacks: list[pl.Callback] = [Reconstructions(self.config.run, images, self.config.pictures_every)]
        if self.config.online_probe.every is not None:
            callbacks.append(self._online_probe())
        return callbacks

    def _online_probe(self) -> OnlineProbe:
        """On test images, else training images, that never change; nearest neighbours where all have labels."""
        probe, data, topology = self.config.online_probe, self.data, self.topology
        images = EvaluationImages(data, data.micro_batch, topology.rank, topology.ranks)
        streamed = data.config.mode == "stream"
        if streamed and data.val_index is None:
            raise ConfigError(
                f"online_probe.every={probe.every} needs images that have numbers, and a stream has none: set "
                "data.val_path, or online_probe.every=null"
            )
        test: Split = "train" if data.val_index is None else "test"
        held_out = images.samples(test, probe.test_images)
        train = None
        if test == "test" and not streamed and bool((images.labels("test", held_out) >= 0).all()):
            samples = images.samples("train", probe.train_images)
            if bool((images.labels("train", samples) >= 0).all()):
                train = images.batches("train", samples)
        return OnlineProbe(probe, train, images.batches(test, held_out))

    def finish(self, module: Training, schedule: Schedule) -> None:
        """The losses of trivial predictors on the same masks, the loss curve, summary.json, and a few closing lines."""
        assert isinstance(module, Pretraining)
        images, positions = self.data.examples(FLOOR_IMAGES)
        module.pixels.cpu()
        noise = module.noise(VALIDATION, positions)
        floors = trivial_losses(module.pixels.normalise(images), noise, self.config.model)
        run = self.config.run
        picture = run / "reconstructions" / f"step-{schedule.total_steps:08d}.png"
        curve = draw_loss_curve(run, floors)
        summary = summarise(run, schedule, {"floors": floors, "reconstruction": str(picture), "loss_curve": str(curve)})
        floor_text = ", ".join(f"{name} {value:.3f}" for name, value in floors.items())
        say_closing(
            run, summary, f" (trivial predictors: {floor_text})", f"python eval.py checkpoint={run} probe=suite"
        )
