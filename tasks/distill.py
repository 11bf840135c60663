"""Distillation of a frozen teacher into a smaller encoder (task=distill)."""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from pydantic import ValidationError

from data.datamodule import ShardDataModule
from data.evaluation import read_now
from data.index.index import ShardIndex
from data.loader.dataset import ShardDataset
from data.order.samplers import spread
from data.photograph_datamodule import PhotographDataModule
from mae.distill.distillation import Distillation, DistillConfig
from mae.distill.floors import trivial_cosine_losses, trivial_embedding_losses
from mae.distill.loss import Tokens
from mae.distill.student import SamStudent, Student
from mae.distill.teacher import Teacher, open_teacher
from mae.distill.warm_start import initialise_student
from mae.distributed.rank_zero import say
from mae.errors import ConfigError, first_sentence
from mae.models.config import MAEConfig
from mae.models.execution import prepare_blocks
from mae.run.checkpoint_files import read_own
from mae.sam.convert import sam_config
from mae.sam.embedding_cache import OutputCache
from mae.sam.encoder import SamConfig
from tasks.online_probe import build_online_probe
from tasks.task import Task

FLOOR_IMAGES = 128  # on which the losses of trivial predictors are computed
OUTPUTS_FORMAT = 1
AS_STORED = {"scale": (1.0, 1.0), "flip": False, "rand_augment": None, "views_per_image": 1, "mode": "index"}


class CentreCrops(ShardDataModule):
    """A ShardDataModule that shows each training image as its centre crop, the same in every epoch."""

    def dataset(self, index: ShardIndex, seed: int | None = None, replace: bool = True) -> ShardDataset:
        return super().dataset(index, None, replace)


class Distill(Task[DistillConfig]):
    """A student on images without labels: an encoder by `model`, or one in SAM style."""

    settings_type = DistillConfig
    training = Distillation
    loss = "loss against the teacher"

    @property
    def in_sam_style(self) -> bool:
        return self.settings.student == "sam"

    @cached_property
    def teacher(self) -> Teacher:
        """Loads the teacher. Raises ConfigError if it is not set or does not fit the images or the student."""
        task, config = self.settings, self.config
        if task.teacher is None:
            raise ConfigError(
                "task.teacher is not set: give the encoder to learn from, a run or checkpoint, or weights of another "
                "library as mae.load and mae.load_sam read them"
            )
        teacher = open_teacher(task.teacher, task.teacher_size, len(config.data.mean))
        if self.in_sam_style and not teacher.is_sam:
            raise ConfigError(
                f"task.student=sam learns the image embedding of a SAM, and {task.teacher} holds a plain encoder: set "
                "task.student=plain, or another task.teacher"
            )
        return teacher

    @cached_property
    def sam(self) -> SamConfig:
        """Returns the architecture of a SAM-style student: the size of `model`, the embedding of the teacher."""
        config, task = self.config.model, self.settings
        if config.image_size[0] != config.image_size[1]:
            raise ConfigError(
                f"model.image_size={list(config.image_size)} is not square, and task.student=sam takes photographs in "
                "a square: set it to one number"
            )
        given: dict[str, object] = {"window": task.window, "out_channels": self.teacher.width}
        given |= {"image_size": config.image_size, "patch_size": config.patch_size}
        if task.global_blocks is not None:
            given["global_blocks"] = task.global_blocks
        return sam_config(config, given)

    @cached_property
    def masking(self) -> MAEConfig | None:
        """Returns how patches are hidden from a plain student; None if it sees whole images."""
        task = self.settings
        if not task.mask_ratio:
            return None
        own = {"mask_ratio": task.mask_ratio, "mask_cell": task.mask_cell, "masking": "random"}
        try:
            return MAEConfig.model_validate(self.config.model.model_dump() | own)
        except ValidationError as error:
            said = f"task.mask_ratio={task.mask_ratio} task.mask_cell={task.mask_cell}"
            raise ConfigError(f"{said}: {first_sentence(error)}") from error

    @property
    def augmented(self) -> list[str]:
        """Returns the settings that show a training image otherwise each time, as they have to be set for the cache."""
        wanted = {"flip": False, "mode": "index"} if self.in_sam_style else AS_STORED
        shown = {"scale": "[1,1]", "flip": "false", "rand_augment": "null", "views_per_image": "1", "mode": "index"}
        return [f"data.{name}={shown[name]}" for name in wanted if getattr(self.config.data, name) != wanted[name]]

    @cached_property
    def data(self) -> ShardDataModule:
        task, shape = self.settings, self.config.model
        if task.outputs is not None and self.augmented:
            raise ConfigError(
                f"task.outputs={task.outputs} keeps what the teacher says of an image that is always the same: set "
                f"{' '.join(self.augmented)}, or leave it out"
            )
        if self.in_sam_style:
            return PhotographDataModule(image_size=self.sam.image_size[0], **self.data_arguments)
        module = ShardDataModule if self.augmented else CentreCrops
        return module(image_size=shape.image_size, channels=shape.in_channels, **self.data_arguments)

    def recipe(self, precision: str) -> dict[str, Any]:
        task = self.settings.model_dump(mode="json", exclude={"outputs"}) | {"teacher": self.teacher.fingerprint}
        sam = {"sam": self.sam.model_dump(mode="json")} if self.in_sam_style else {}
        return super().recipe(precision) | {"task": task} | sam

    def refuse_settings(self, checkpoint: Path | None) -> None:
        config = self.config
        if config.optim.layer_decay != 1:
            raise ConfigError(
                f"optim.layer_decay={config.optim.layer_decay} is for fine-tuning (task=finetune, task=segment): in "
                "distillation set it to 1"
            )
        if self.in_sam_style and config.online_probe.every is not None:
            raise ConfigError(
                f"online_probe.every={config.online_probe.every} measures plain encoders, and this is "
                "task.student=sam: set it to null"
            )
        if self.in_sam_style and config.blocks.recompute not in ("none", "all"):
            raise ConfigError(
                f"blocks.recompute={config.blocks.recompute} is not available for task.student=sam: set "
                "blocks.recompute=none or all"
            )
        if checkpoint is not None:
            self._refuse_other_teacher(checkpoint)

    def _refuse_other_teacher(self, checkpoint: Path) -> None:
        stored = read_own(checkpoint)["mae"]
        before, now = stored["recipe"].get("task", {}).get("teacher"), self.teacher.fingerprint
        if before is not None and before != now:
            raise ConfigError(
                f"{checkpoint} was distilled from another teacher: {stored['teacher']} had the fingerprint {before}, "
                f"and task.teacher={self.settings.teacher} has {now}. Give the weights of before, or start a new run "
                "with another name="
            )

    def student(self) -> Student | SamStudent:
        """Builds the student with random weights."""
        if self.in_sam_style:
            return SamStudent(self.sam)
        return Student(self.config.model, self.teacher.width, self.masking)

    def model(self, checkpoint: Path | None) -> Student | SamStudent:
        config, model = self.config, self.student()
        if config.init_from is not None and checkpoint is None:
            pixels = config.data.mean, config.data.std
            for sentence in initialise_student(model, Path(config.init_from), pixels, config.init_weights):
                say(f"init_from: {sentence}")
        if isinstance(model, Student):
            prepare_blocks(list(model.blocks), config.blocks)
        else:
            model.checkpointing = config.blocks.recompute == "all"
            if config.blocks.compile:
                model.compile_blocks()
        return model

    def averaged(self, model: Student | SamStudent) -> Student | SamStudent:
        return self.student()

    def module_arguments(self, model: Student | SamStudent, recipe: dict[str, Any]) -> dict[str, Any]:
        if self.settings.outputs is not None:
            self.teacher.cache = self._open_cache(self.settings.outputs, recipe["precision"])
        return {"teacher": self.teacher}

    def _open_cache(self, folder: Path, precision: str) -> OutputCache:
        """Opens the teacher's tokens of these images, shown as they are here."""
        data, teacher, index = self.config.data, self.teacher, self.data.train_index
        seen = {
            "fingerprint": index.fingerprint,
            "image": data.image,
            "size": self.image_size,
            "framed": self.in_sam_style,
            "crop": [data.val_crop, data.decode, data.bits],
            "teacher": [teacher.fingerprint, teacher.image_size],
            "precision": precision,
            "format": OUTPUTS_FORMAT,
        }
        return OutputCache(folder, digest(seen), teacher.shape, len(index), "task.outputs")

    def callbacks(self) -> list[pl.Callback]:
        probe = self.config.online_probe
        if probe.every is None:
            return []
        return [build_online_probe(probe, probe.every, self.data, self.config.model, self.topology)]

    def results(self, module: Distillation, step: int) -> dict[str, Any]:
        """Computes the losses of trivial predictors on whole images."""
        batches, model = self._taught(module.teacher), module.model
        if isinstance(model, SamStudent):
            floors = trivial_embedding_losses(batches, model.config.grid)
        else:
            floors = trivial_cosine_losses(batches, model.config.grid, model.config.class_tokens)
        return {"floors": floors, "floor_images": len(self._examples[0]), "teacher": str(module.teacher.path)}

    @cached_property
    def _examples(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns a few images, those of validation if there are any, and their sizes in the square frame."""
        if not self.in_sam_style:
            return self.data.examples(FLOOR_IMAGES)[0], None
        index = self.data.val_index or self.data.train_index
        batch = read_now(self.data, index, spread(len(index), FLOOR_IMAGES))
        return batch["images"], torch.from_numpy(batch["inside"])

    def _taught(self, teacher: Teacher) -> Iterator[Tokens]:
        """Yields the teacher's tokens of the examples, a micro-batch at a time."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        images, inside = self._examples
        size = self.batch_split[0]
        for first in range(0, len(images), size):
            rows = slice(first, first + size)
            yield teacher(images[rows].to(device), None, None if inside is None else inside[rows].to(device))

    @property
    def probe(self) -> str | None:
        val = self.data.val_index
        if val is None or self.in_sam_style:
            return None
        labelled = all(bool((index.labels >= 0).all()) for index in (self.data.train_index, val))
        return "suite" if labelled else None

    def next_steps(self) -> dict[str, str]:
        if not self.in_sam_style:
            return super().next_steps() | self.use_encoder()
        export = {"export": self.export_command("segment-anything", "sam_encoder.pth")}
        return super().next_steps() | export | {"Python": f"mae.load_sam({str(self.config.run)!r})"}

    def describe(self, model: Student | SamStudent) -> dict[str, str]:
        config, teacher = model.config, self.teacher
        parameters, theirs = (sum(p.numel() for p in one.parameters()) for one in (model, teacher.encoder))
        head = sum(p.numel() for p in model.distillation_head.parameters()) if isinstance(model, Student) else 0
        kind = "SAM-style student" if self.in_sam_style else "student"
        its, ours = teacher.encoder.config, config
        return {
            "model": f"{kind} of {ours.width} x {ours.depth} blocks, {(parameters - head) / 1e6:.1f} M parameters"
            + (f", head {head / 1e6:.1f} M" if head else ""),
            "teacher": f"{its.width} x {its.depth} blocks at {its.image_size[0]} x {its.image_size[1]} px, "
            f"{theirs / 1e6:.1f} M parameters, fingerprint {teacher.fingerprint}, {teacher.path}",
            "tokens": f"{teacher.grid[0]} x {teacher.grid[1]} of width {teacher.width} from the teacher, "
            f"{ours.grid[0]} x {ours.grid[1]} patches of {ours.patch_size} px here, {self._seen()}",
            **({"outputs": self._describe_outputs()} if self.settings.outputs is not None else {}),
        }

    def _seen(self) -> str:
        if self.masking is None:
            return "all visible"
        side = self.masking.mask_cell
        return f"{self.masking.visible} of them visible" + (f", in cells of {side} x {side}" if side > 1 else "")

    def _describe_outputs(self) -> str:
        tokens, width = self.teacher.shape
        images = len(self.data.train_index)
        return f"{images * tokens * width * 2 / 1e9:,.3g} GB in {self.settings.outputs} when all {images:,} are kept"


def digest(seen: dict[str, Any]) -> str:
    """Returns 16 digits of a SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]
