"""Lightning module of distillation: images, the teacher's tokens, the mask noise of the student, the loss."""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mae.distill.flops import distillation_flops
from mae.distill.student import SamStudent, Student
from mae.distill.teacher import Teacher
from mae.models.config import ImageSize
from mae.models.noise import uniform_noise
from mae.sam.square_frame import blank_padding
from mae.train.average import AverageConfig
from mae.train.pretraining import VALIDATION
from mae.train.strategies import shard
from mae.train.training import Training


class DistillConfig(AverageConfig, frozen=True, extra="forbid"):
    """Settings of task=distill, beside those of the student's architecture (`model`).

    teacher        path of any encoder that is read: a run or checkpoint, a file or folder of another library, a SAM
    student        plain; sam: SAM-style with a neck, whose image embedding is to be that of a SAM
    mask_ratio     share of the patches that are hidden from a plain student; 0: it sees whole images
    mask_cell      side in patches of the cells that are hidden or left whole
    teacher_size   of the images that the teacher gets; None: its own
    outputs        folder in which the teacher's tokens are kept from epoch to epoch and from run to run
    window, global_blocks
                   of a SAM-style student; global_blocks None: the last block of each quarter
    ema            of all weights; their average is what is validated, and loaded and exported by default
    """

    name: Literal["distill"]
    teacher: Path | None = None
    student: Literal["plain", "sam"] = "plain"
    mask_ratio: float = Field(0.0, ge=0, lt=1)
    mask_cell: int = Field(1, ge=1)
    teacher_size: ImageSize | None = None
    outputs: Path | None = None
    window: int = Field(14, ge=1)
    global_blocks: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _go_together(self) -> "DistillConfig":
        if self.student == "sam" and self.mask_ratio:
            raise ValueError(
                f"mask_ratio={self.mask_ratio} hides patches from a plain student, and student=sam needs all of them: "
                "set task.mask_ratio=0 or task.student=plain"
            )
        if self.student == "plain" and (self.window != 14 or self.global_blocks is not None):
            raise ValueError(
                "window and global_blocks are of a SAM-style student: set task.student=sam, or leave them out"
            )
        if self.mask_cell > 1 and not self.mask_ratio:
            raise ValueError(f"mask_cell={self.mask_cell} hides nothing with mask_ratio=0: set both, or leave it out")
        return self


class Distillation(Training):
    """Distillation of a frozen teacher, which is no module of this one.

    A batch holds `images` uint8 or uint16 [B, C, H, W], `positions` int64 [B], the place of each in its epoch, and
    `samples` int64 [B]; for a SAM-style student also `inside` int64 [B, 2], the size of each photograph in its frame.
    """

    model: Student | SamStudent

    def __init__(self, *arguments: Any, teacher: Teacher, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.teacher = teacher

    @property
    def flops(self) -> float:
        return distillation_flops(self.model, self.teacher.encoder)

    def shard(self, model: Any, mesh: Any, *, reshard: bool | None = None) -> None:
        shard(model, model.blocks, mesh, ("imitate", "encode") if isinstance(model, Student) else ("imitate",), reshard)

    def noise(self, step: int, rows: Tensor) -> Tensor | None:
        """Returns mask noise [B, N] for rows of the global batch of `step`; None if nothing is hidden."""
        masking = self.model.masking if isinstance(self.model, Student) else None
        return None if masking is None else uniform_noise(self.seed, step, rows, masking.patches)

    def compare(
        self, model: Student | SamStudent, batch: dict[str, Any], noise: Tensor | None, samples: Tensor | None
    ) -> Tensor:
        """Returns the loss of a student on a batch; `samples` as in `Teacher.__call__`."""
        inside = batch.get("inside")
        target = self.teacher(batch["images"], samples, inside)
        images = self.pixels.normalise(batch["images"])
        return model.imitate(images if inside is None else blank_padding(images, inside), target, noise)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Returns the loss of a micro-batch; the mask of an image follows from its row of the global batch."""
        rows = batch["positions"] % self.schedule.global_batch
        return self.compare(self.model, batch, self.noise(self.global_step, rows), batch["samples"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["mae"]["teacher"] = str(self.teacher.path)

    def blank_batch(self, count: int) -> dict[str, Any]:
        config = self.model.config
        images = torch.zeros(count, config.in_channels, *config.image_size, dtype=torch.uint8, device=self.device)
        batch = {"images": images, "positions": torch.arange(count, device=self.device)}
        batch["samples"] = torch.full((count,), -1, device=self.device)
        if isinstance(self.model, SamStudent):
            batch["inside"] = torch.tensor([config.image_size] * count, device=self.device)
        return batch

    def validate(self, batch: dict[str, Any]) -> tuple[dict[str, float], int]:
        """Validates the EMA weights if `task.ema` is set, else the trained weights."""
        model = cast(Student | SamStudent, self.model if self.average is None else self.average)
        loss = self.compare(model, batch, self.noise(VALIDATION, batch["positions"]), None)
        return {"loss": float(loss)}, len(batch["images"])
