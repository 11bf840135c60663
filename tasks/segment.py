"""Fine-tuning in the manner of SAM (task=segment)."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.mask_datamodule import MaskDataModule
from mae.errors import ConfigError
from mae.formats.load_segmenter import initialise_segmenter
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.models.pixels import Pixels
from mae.plan.training_cost import Workload, sam_workload
from mae.report.loss_curve import draw_loss_curve
from mae.report.summary import say_closing, summarise
from mae.sam.config import SegmentConfig, build_segmenter, choose_what_learns
from mae.sam.convert import sam_config
from mae.sam.embedding_cache import TokenCache
from mae.sam.segmentation import Segmentation
from mae.sam.segmenter import Segmenter
from mae.train.schedule import Schedule
from mae.train.training import Training
from tasks.task import Task


class Segment(Task):
    """A SAM on photographs with instance masks, its encoder that of a masked autoencoder."""

    @property
    def settings(self) -> SegmentConfig:
        assert isinstance(self.config.task, SegmentConfig)
        return self.config.task

    @cached_property
    def data(self) -> MaskDataModule:
        config = self.config
        if self.settings.embeddings is not None and (self.settings.encoder != "frozen" or config.data.flip):
            raise ConfigError(
                f"task.embeddings={self.settings.embeddings} keeps what a frozen encoder gives for an image that is "
                "always the same: set task.encoder=frozen and data.flip=false, or leave it out"
            )
        return MaskDataModule(
            config.data,
            image_size=self.settings.image_size,
            masks_per_image=self.settings.masks_per_image,
            min_area=self.settings.min_area,
            seed=config.seed,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch or max(1, config.global_batch // self.topology.ranks),
            bad_samples=config.run / "bad_samples.jsonl",
        )

    def recipe(self, precision: str) -> dict[str, Any]:
        return super().recipe(precision) | {"task": self.settings.model_dump(mode="json", exclude={"embeddings"})}

    def model(self, start: Path | None) -> Segmenter:
        config = self.config
        return start_of(config.model, self.settings, config.blocks, config.init_from if start is None else None)

    def module(self, model: nn.Module, schedule: Schedule, recipe: dict[str, Any]) -> Segmentation:
        config = self.config
        assert isinstance(model, Segmenter)
        cache = None
        if self.settings.embeddings is not None:
            index = self.data.train_index
            seen = {"fingerprint": index.fingerprint, "mean": config.data.mean, "std": config.data.std}
            seen["precision"] = recipe["precision"]
            cache = TokenCache(self.settings.embeddings, model.encoder, len(index), seen)
        return Segmentation(
            model,
            config.optim,
            schedule,
            seed=config.seed,
            pixels=Pixels(config.data.mean, config.data.std),
            recipe=recipe,
            task=self.settings,
            cache=cache,
        )

    def describe(self, model: nn.Module) -> list[tuple[str, str]]:
        assert isinstance(model, Segmenter)
        encoder, task = model.encoder.config, self.settings
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [
            (
                "model",
                f"SAM of {encoder.width} x {encoder.depth} blocks at {task.image_size} px, "
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
                f"{sum(p.numel() for p in parameters) / 1e6:.1f} M of them learn",
            ),
            (
                "prompts",
                f"{task.box_share:.0%} boxes, else points; {3 + task.clicks} answers with {task.clicks} clicks",
            ),
        ]

    def workload(self, precision: str, device: torch.device) -> Workload:
        return sam_workload(sam_config(self.config.model, self.settings.sam_fields), precision)

    def finish(self, module: Training, schedule: Schedule) -> None:
        run = self.config.run
        summary = summarise(run, schedule, {"loss_curve": str(draw_loss_curve(run, {}))})
        ious = {name: summary[f"val/{name}"] for name in ("first_iou", "last_iou") if f"val/{name}" in summary}
        results = "".join(f", {name} {value:.3f}" for name, value in ious.items())
        say_closing(run, summary, results, f"python eval.py checkpoint={run} probe=segment")


def start_of(config: MAEConfig, task: SegmentConfig, blocks: BlocksConfig, init_from: str | None) -> Segmenter:
    """The model that a run begins with; its fresh parts as torch's generator has them."""
    model = build_segmenter(config, task, blocks)
    if init_from is not None:
        initialise_segmenter(model, Path(init_from))
    choose_what_learns(model, task)
    return model
