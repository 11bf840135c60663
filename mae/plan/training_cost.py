"""What a device does with one image of a training task, from the model's settings alone."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae.models.classifier import Classifier
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig, prepare_blocks
from mae.models.flops import (
    classification_flops,
    executed_classification_flops,
    executed_pretraining_flops,
    pretraining_flops,
)
from mae.models.mae import MaskedAutoencoder
from mae.models.vit import choose_attention
from mae.plan.dry_step import DryStep, dry_step
from mae.sam.encoder import SamConfig, SamEncoder
from mae.sam.flops import executed_sam_flops, sam_flops


class Workload(NamedTuple):
    """The cost of one image.

    parameters  by part
    flops       forward and backward of the published model by formula, for time and utilisation
    executed    the same as it is computed here, by formula
    kept        a step that keeps its activations
    recomputed  one that keeps only what lies between blocks and computes the rest a second time
    block       bytes of the largest block's weights
    unblocked   bytes of the weights outside the blocks
    """

    parameters: dict[str, int]
    flops: int
    executed: int
    kept: DryStep
    recomputed: DryStep
    block: int
    unblocked: int


class TrainingCost(NamedTuple):
    """How a model is trained, as far as shapes go.

    build  makes the model; True for one whose blocks are computed again in the backward pass
    loss   of a model on a number of images, whose pixels do not matter
    """

    build: Callable[[bool], nn.Module]
    loss: Callable[[Any, int], Tensor]


def pretraining(config: MAEConfig, device: torch.device) -> TrainingCost:
    """Masked pre-training, with the attention that suits `device`."""

    def build(recompute: bool) -> MaskedAutoencoder:
        model = MaskedAutoencoder(config)
        choose_attention(model.blocks, model.decoder_blocks, device=device)
        prepare_blocks(model.whole_blocks, BlocksConfig(recompute="all" if recompute else "none"))
        return model

    def loss(model: MaskedAutoencoder, images: int) -> Tensor:
        pixels = torch.empty(images, config.in_channels, *config.image_size)
        return model(pixels, torch.empty(images, config.patches)).loss

    return TrainingCost(build, loss)


def classification(config: MAEConfig, classes: int, drop_path: float, device: torch.device) -> TrainingCost:
    """Fine-tuning of a classifier, with the attention that suits `device`."""

    def build(recompute: bool) -> Classifier:
        model = Classifier(config, classes, drop_path=drop_path)
        choose_attention(model.blocks, device=device)
        prepare_blocks(list(model.blocks), BlocksConfig(recompute="all" if recompute else "none"))
        return model

    def loss(model: Classifier, images: int) -> Tensor:
        scores = model(torch.empty(images, config.in_channels, *config.image_size))
        return F.cross_entropy(scores.float(), torch.empty(images, classes))

    return TrainingCost(build, loss)


def sam_training(config: SamConfig) -> TrainingCost:
    """Training of the SAM-style encoder with some loss on its embedding, at the configured image size.

    On fake tensors the attention is that of a CPU; fused kernels keep vectors that are wider by the sides of the grid,
    at 1024 x 1024 less than a tenth more of everything.
    """

    def build(recompute: bool) -> SamEncoder:
        return SamEncoder(config, checkpointing=recompute)

    def loss(model: SamEncoder, images: int) -> Tensor:
        return model(torch.empty(images, config.in_channels, *config.image_size)).float().square().mean()

    return TrainingCost(build, loss)


def pretraining_workload(config: MAEConfig, precision: str, device: torch.device) -> Workload:
    """Masked pre-training on `device`; of the images four at a time, among which results that do not grow with their
    number are lost.
    """
    flops = pretraining_flops(config), executed_pretraining_flops(config)
    return _workload(pretraining(config, device), 4, ("decoder", ("decoder", "mask_token")), flops, precision)


def classification_workload(
    config: MAEConfig, classes: int, drop_path: float, precision: str, device: torch.device
) -> Workload:
    """Fine-tuning of a classifier on `device`, of the images four at a time as in pre-training."""
    flops = classification_flops(config, classes), executed_classification_flops(config, classes)
    task = classification(config, classes, drop_path, device)
    return _workload(task, 4, ("head", ("fc_norm", "head")), flops, precision)


def sam_workload(config: SamConfig, precision: str) -> Workload:
    """Training of the SAM-style encoder."""
    flops = 3 * sam_flops(config), executed_sam_flops(config)
    return _workload(sam_training(config), 1, ("neck", ("neck",)), flops, precision)


def _workload(
    task: TrainingCost, images: int, after_encoder: tuple[str, tuple[str, ...]], flops: tuple[int, int], precision: str
) -> Workload:
    """after_encoder: name of the part that follows it, and how the names of its parameters begin."""
    with torch.device("meta"):
        model = task.build(False)
    part, prefixes = after_encoder
    after = sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
    blocks = [sum(p.nbytes for p in block.parameters()) for block in _blocks(model)]
    every = sum(p.numel() for p in model.parameters())
    kept, recomputed = (
        dry_step(partial(task.build, again), lambda model: task.loss(model, images), precision).at(1 / images)
        for again in (False, True)
    )
    return Workload(
        {"encoder": every - after, part: after},
        *flops,
        kept=kept,
        recomputed=recomputed,
        block=max(blocks),
        unblocked=sum(p.nbytes for p in model.parameters()) - sum(blocks),
    )


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that are recomputed and sharded one by one: all but the decoder's last, see `last_tokens`."""
    decoder = getattr(model, "decoder_blocks", nn.ModuleList())
    return [*cast(nn.ModuleList, model.blocks), *decoder[:-1]]
