"""Promptable segmentation in the manner of SAM (task=segment)."""

from functools import cached_property
from pathlib import Path
from typing import Any

from data.mask_datamodule import MaskDataModule
from mae.distributed.rank_zero import say
from mae.errors import ConfigError
from mae.formats.load_segmenter import initialise_decoder, initialise_segmenter
from mae.formats.opened import MeanAndDeviation
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.run.checkpoint_files import Weights
from mae.sam.config import SegmentConfig, build_segmenter, set_trainable
from mae.sam.embedding_cache import TokenCache
from mae.sam.segmentation import Segmentation
from mae.sam.segmenter import Segmenter
from mae.sam.session import count_answers
from tasks.task import Task

# Settings that change no result, or that only a fresh start reads.
OUTSIDE_RECIPE = {"embeddings", "masks_at_a_time", "decoder_from"}


class Segment(Task[SegmentConfig]):
    """A SAM on photographs with instance masks. Its encoder is that of a masked autoencoder."""

    settings_type = SegmentConfig
    training = Segmentation
    loss = "loss of the masks"

    @cached_property
    def data(self) -> MaskDataModule:
        task = self.settings
        if task.embeddings is not None and (task.encoder != "frozen" or self.config.data.flip):
            raise ConfigError(
                f"task.embeddings={task.embeddings} keeps what a frozen encoder gives for an image that is "
                "always the same: set task.encoder=frozen and data.flip=false, or leave it out"
            )
        return MaskDataModule(
            image_size=task.image_size,
            masks_per_image=task.masks_per_image,
            min_area=task.min_area,
            **self.data_arguments,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        return self.settings.image_size, self.settings.image_size

    def recipe(self, precision: str) -> dict[str, Any]:
        return super().recipe(precision) | {"task": self.settings.model_dump(mode="json", exclude=OUTSIDE_RECIPE)}

    def refuse_settings(self, checkpoint: Path | None) -> None:
        super().refuse_settings(checkpoint)
        if self.settings.masks_at_a_time is not None and self.config.trainer.strategy == "fsdp":
            raise ConfigError(
                f"task.masks_at_a_time={self.settings.masks_at_a_time} gives each rank another number of answers, "
                "for which the shards of trainer.strategy=fsdp would wait: set one of them otherwise"
            )

    def model(self, checkpoint: Path | None) -> Segmenter:
        config, task, init_from = self.config, self.settings, self.config.init_from
        if checkpoint is not None:
            task, init_from = task.model_copy(update={"decoder_from": None}), None
        pixels = config.data.mean, config.data.std
        return initial_segmenter(config.model, task, config.blocks, init_from, pixels, weights=config.init_weights)

    def averaged(self, model: Segmenter) -> Segmenter:
        average = build_segmenter(self.config.model, self.settings, BlocksConfig())
        set_trainable(average, self.settings)  # adds LoRA
        return average

    def module_arguments(self, model: Segmenter, recipe: dict[str, Any]) -> dict[str, Any]:
        cache = None
        if self.settings.embeddings is not None:
            index, data = self.data.train_index, self.config.data
            seen = {"fingerprint": index.fingerprint, "mean": data.mean, "std": data.std}
            seen["precision"] = recipe["precision"]
            cache = TokenCache(self.settings.embeddings, model.encoder, len(index), seen)
        return {"task": self.settings, "cache": cache}

    @property
    def probe(self) -> str | None:
        return None if self.data.val_index is None else "segment"

    def next_steps(self) -> dict[str, str]:
        export = {"export": self.export_command("segment-anything", "sam.pth")}
        python = {"Python": f"mae.load_segmenter({str(self.config.run)!r})"}
        return super().next_steps() | self.show_demo() | export | python

    def describe(self, model: Segmenter) -> dict[str, str]:
        encoder, task = model.encoder.config, self.settings
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return {
            "model": f"SAM of {encoder.width} x {encoder.depth} blocks at {task.image_size} px, "
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
            f"{sum(p.numel() for p in parameters) / 1e6:.1f} M of them trained",
            "prompts": f"{task.box_share:.0%} boxes, else points; "
            f"{count_answers(task.clicks, task.mask_input)} answers with {task.clicks} clicks",
        }


def initial_segmenter(
    config: MAEConfig,
    task: SegmentConfig,
    blocks: BlocksConfig,
    init_from: str | None,
    pixels: MeanAndDeviation | None = None,
    *,
    weights: Weights | None = None,
) -> Segmenter:
    """Builds the model that a run begins with. Its new parts are drawn from torch's generator.

    pixels   mean and deviation of its images, compared with those of `init_from`; None: not compared
    weights  raw or average, of a checkpoint that holds both
    """
    model = build_segmenter(config, task, blocks)
    if init_from is not None:
        decoder = task.decoder_from is None
        for sentence in initialise_segmenter(model, Path(init_from), pixels, weights, decoder=decoder):
            say(f"init_from: {sentence}")
    if task.decoder_from is not None:
        initialise_decoder(model, task.decoder_from)
        say(f"prompt encoder and mask decoder start from those of {task.decoder_from}")
    set_trainable(model, task)
    return model
