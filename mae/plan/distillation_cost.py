"""Cost of distillation: the student's step, and a frozen teacher beside it, whole on every device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mae.distill.flops import distillation_flops, executed_distillation_flops
from mae.distill.loss import Tokens
from mae.distill.student import SamStudent, Student
from mae.distill.teacher import Teacher, encode
from mae.models.attention import set_attention
from mae.models.execution import BlocksConfig, prepare_blocks
from mae.models.vit import Encoder
from mae.plan.dry_step import ADAMW, Workload
from mae.plan.training_cost import DRY_BATCH, TrainingCost, count_cost
from mae.sam.encoder import SamConfig, SamEncoder
from mae.train.muon import update_flops
from mae.train.optim import OptimConfig


class Both(nn.Module):
    """A student and its teacher, as one model to count; only the student is trained."""

    def __init__(self, student: Student | SamStudent, teacher: Encoder | SamEncoder) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.student.blocks


def distillation(build_student: Callable[[], Student | SamStudent], teacher: Teacher, device: torch.device) -> Workload:
    """Returns the workload of distillation, with the attention that suits `device`.

    build_student  makes the student, of random weights
    """
    theirs = teacher.encoder.config

    def build(recompute: bool) -> Both:
        student = build_student()
        if isinstance(student, SamStudent):
            student.checkpointing = recompute
        else:
            prepare_blocks(list(student.blocks), BlocksConfig(recompute="all" if recompute else "none"))
        model = Both(student, SamEncoder(theirs) if isinstance(theirs, SamConfig) else Encoder(theirs))
        set_attention(model, fused=device.type != "cpu" or None)  # fake tensors are on a CPU
        return model

    def loss(model: Any, images: int) -> Tensor:
        config = model.student.config
        with torch.no_grad():
            tokens = encode(model.teacher, torch.empty(images, theirs.in_channels, *theirs.image_size))
            target = Tokens(*(part.bfloat16() for part in tokens))
        noise = torch.empty(images, config.grid[0] * config.grid[1])
        return model.student.imitate(torch.empty(images, config.in_channels, *config.image_size), target, noise)

    return Workload(build, loss)


def distillation_cost(
    build_student: Callable[[], Student | SamStudent],
    teacher: Teacher,
    precision: str,
    device: torch.device,
    optim: OptimConfig = ADAMW,
    averaged: bool = False,
) -> TrainingCost:
    """Returns the cost of distillation on `device`; `averaged`: with an average of all weights."""
    workload = distillation(build_student, teacher, device)._replace(optim=optim)
    with torch.device("meta"):
        student = build_student()
    flops = distillation_flops(student, teacher.encoder), executed_distillation_flops(student, teacher.encoder)
    sam = isinstance(student, SamStudent)
    after = {"neck": ("student.neck",)} if sam else {"head": ("student.distillation_head",)}
    cost = count_cost(workload, 1 if teacher.is_sam else DRY_BATCH, after, flops, precision)
    parameters = sum(p.numel() for p in teacher.encoder.parameters())
    frozen = sum(p.nbytes for p in teacher.encoder.parameters())
    parts = cost.parameters | {"encoder": cost.parameters["encoder"] - parameters, "teacher (frozen)": parameters}
    kept, recomputed = (step._replace(weights=step.weights - frozen) for step in (cost.kept, cost.recomputed))
    return cost._replace(
        parameters=parts,
        kept=kept,
        recomputed=recomputed,
        frozen=frozen,
        update=update_flops(student.named_parameters()) if optim.name == "muon" else 0,
        average=kept.weights if averaged else 0,
        unblocked=cost.unblocked - frozen,
    )
