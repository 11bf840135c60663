"""Cost of training a model per image, from its settings alone: parameters, FLOPs by formula, dry steps."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae.models.attention import set_attention
from mae.models.classifier import Classifier
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig, prepare_blocks
from mae.models.flops import classification_flops, pretraining_flops
from mae.models.mae import MaskedAutoencoder
from mae.plan.dry_step import ADAMW, DryStep, Workload, dry_step
from mae.plan.executed_flops import executed_classification_flops, executed_pretraining_flops
from mae.sam.config import SegmentConfig, build_segmenter, set_trainable
from mae.sam.convert import sam_config
from mae.sam.encoder import SamConfig, SamEncoder
from mae.sam.flops import ENCODER_PASSES, executed_sam_flops, neck_flops, sam_flops, session_flops
from mae.sam.prompts import Draws
from mae.sam.segmenter import STRIDE, Segmenter
from mae.sam.session import count_answers, simulate_session
from mae.train.muon import update_flops
from mae.train.optim import OptimConfig

FLOAT32 = 4  # bytes
DRY_BATCH = 4  # images, so that results that do not grow with their number hardly count


class TrainingCost(NamedTuple):
    """Cost of training on one image.

    parameters  by part of the model
    flops       forward and backward pass of the published model by formula, for time and utilisation
    executed    the same of this implementation, by formula
    kept        dry step that keeps all activations
    recomputed  dry step with activation checkpointing of all blocks
    average     bytes of the moving average of the weights (task.ema); 0 without
    update      FLOPs of Muon's iterations in each step, of all matrices; 0 with AdamW
    block       bytes of weights of the largest block
    unblocked   bytes of weights outside the blocks
    frozen      bytes of a teacher that is not trained, whole on every device; 0 without
    taken       what one image is taken to hold, in words; None: nothing but pixels
    """

    parameters: dict[str, int]
    flops: int
    executed: int
    kept: DryStep
    recomputed: DryStep
    average: int
    update: int
    block: int
    unblocked: int
    frozen: int = 0
    taken: str | None = None

    @property
    def checkpoint_bytes(self) -> int:
        return self.kept.weights + self.average + self.kept.optimiser


def pretraining(config: MAEConfig, device: torch.device) -> Workload:
    """Returns the workload of masked pre-training, with the attention that suits `device`."""

    def build(recompute: bool) -> MaskedAutoencoder:
        model = MaskedAutoencoder(config)
        set_attention(model, fused=device.type != "cpu" or None)  # fake tensors are on a CPU
        prepare_blocks(model.whole_blocks, BlocksConfig(recompute="all" if recompute else "none"))
        return model

    def loss(model: MaskedAutoencoder, images: int) -> Tensor:
        pixels = torch.empty(images, config.in_channels, *config.image_size)
        return model(pixels, torch.empty(images, config.patches)).loss

    return Workload(build, loss)


def classification(config: MAEConfig, classes: int, drop_path: float, device: torch.device) -> Workload:
    """Returns the workload of fine-tuning a classifier, with the attention that suits `device`."""

    def build(recompute: bool) -> Classifier:
        model = Classifier(config, classes, drop_path=drop_path)
        set_attention(model, fused=device.type != "cpu" or None)  # fake tensors are on a CPU
        prepare_blocks(list(model.blocks), BlocksConfig(recompute="all" if recompute else "none"))
        return model

    def loss(model: Classifier, images: int) -> Tensor:
        scores = model(torch.empty(images, config.in_channels, *config.image_size), torch.empty(images, 1))
        return F.cross_entropy(scores.float(), torch.empty(images, classes))

    return Workload(build, loss)


def sam_training(config: SamConfig) -> Workload:
    """Returns the workload of training the SAM-style encoder, with any loss on its embedding.

    On fake tensors the attention is that of a CPU. Fused kernels keep vectors that are wider by both sides of the grid,
    which adds less than a tenth to all memory at 1024 x 1024.
    """

    def build(recompute: bool) -> SamEncoder:
        return SamEncoder(config, checkpointing=recompute)

    def loss(model: SamEncoder, images: int) -> Tensor:
        return model(torch.empty(images, config.in_channels, *config.image_size)).float().square().mean()

    return Workload(build, loss)


def segmentation(config: MAEConfig, task: SegmentConfig) -> Workload:
    """Returns the workload of task=segment: photographs of `task.masks_per_image` objects each, with their sessions.

    The attention of the encoder is that of `sam_training`. Tokens that task.embeddings may hold are computed.
    """

    def build(recompute: bool) -> Segmenter:
        model = build_segmenter(config, task, BlocksConfig(recompute="all" if recompute else "none"))
        set_trainable(model, task)
        return model

    def loss(model: Segmenter, images: int) -> Tensor:
        pixels = torch.empty(images, config.in_channels, task.image_size, task.image_size)
        objects, cells = images * task.masks_per_image, task.image_size // STRIDE
        masks = torch.zeros(objects, cells, cells, dtype=torch.bool)
        masks[:, : cells // 2] = True
        repeats = (1, 2 + task.clicks) if task.mask_input else ()
        draws = Draws(torch.rand(objects, 1), torch.randn(objects, 4), torch.rand(1 + task.clicks, objects, 1), repeats)
        if task.encoder == "frozen":
            with torch.no_grad():
                tokens = model.tokens(pixels)
            embedding = model.neck(tokens)
        else:
            embedding = model(pixels)
        return simulate_session(
            model,
            embedding,
            masks,
            torch.arange(objects) // task.masks_per_image,
            draws,
            box_share=task.box_share,
            mask_input=task.mask_input,
            multimask=task.multimask,
            alignment=task.alignment,
            at_a_time=task.masks_at_a_time,
        ).loss

    return Workload(build, loss)


def pretraining_cost(
    config: MAEConfig, precision: str, device: torch.device, optim: OptimConfig = ADAMW, averaged: bool = False
) -> TrainingCost:
    """Returns the cost of masked pre-training on `device`; `averaged`: with an average of the encoder's weights."""
    flops = pretraining_flops(config), executed_pretraining_flops(config)
    cost = count_cost(
        pretraining(config, device)._replace(optim=optim),
        DRY_BATCH,
        {"decoder": ("decoder", "mask_token")},
        flops,
        precision,
    )
    return cost._replace(average=FLOAT32 * cost.parameters["encoder"] if averaged else 0)


def classification_cost(
    config: MAEConfig,
    classes: int,
    drop_path: float,
    precision: str,
    device: torch.device,
    optim: OptimConfig = ADAMW,
    averaged: bool = False,
) -> TrainingCost:
    """Returns the cost of fine-tuning a classifier on `device`; `averaged`: with an average of all weights."""
    flops = classification_flops(config, classes), executed_classification_flops(config, classes)
    workload = classification(config, classes, drop_path, device)._replace(optim=optim)
    cost = count_cost(workload, DRY_BATCH, {"head": ("fc_norm", "head")}, flops, precision)
    return cost._replace(average=cost.kept.weights if averaged else 0)


def segmentation_cost(
    config: MAEConfig, task: SegmentConfig, precision: str, optim: OptimConfig = ADAMW, averaged: bool = False
) -> TrainingCost:
    """Returns the cost of task=segment; `averaged`: with an average of all weights."""
    encoder = sam_config(config, task.sam_fields)
    answers, trained = count_answers(task.clicks, task.mask_input), task.decoder == "trained"
    sessions = session_flops(encoder, task.masks_per_image, task.clicks, task.mask_input)
    flops = ENCODER_PASSES[task.encoder] * sam_flops(encoder) + (3 if trained else 2) * sessions
    repeated = executed_sam_flops(encoder) - 3 * sam_flops(encoder)
    executed = flops + (2 * neck_flops(encoder) if task.encoder == "frozen" else repeated)
    parts = {
        "neck": ("encoder.neck",),
        "prompt encoder": ("prompt_encoder",),
        "mask decoder": ("mask_decoder",),
        "gate": ("relevance",),
    }
    cost = count_cost(segmentation(config, task)._replace(optim=optim), 1, parts, (flops, executed), precision)
    taken = (
        f"Each photograph is taken to have task.masks_per_image={task.masks_per_image} objects, "
        f"the most there can be, each answered {answers} times: memory and FLOPs of these sessions grow with both. "
        "task.masks_at_a_time bounds the memory."
    )
    if task.embeddings is not None:
        taken += " The encoder, whose tokens task.embeddings keeps, is counted as in the first epoch."
    return cost._replace(average=cost.kept.weights if averaged else 0, taken=taken)


def count_cost(
    workload: Workload, images: int, parts: dict[str, tuple[str, ...]], flops: tuple[int, int], precision: str
) -> TrainingCost:
    """Counts parameters and runs the dry steps.

    images  of the dry steps
    parts   name of each part beside the encoder, and prefixes of its parameters' names
    """
    with torch.device("meta"):
        model: Any = workload.build(False)
    counts = {
        part: sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
        for part, prefixes in parts.items()
    }
    total = sum(p.numel() for p in model.parameters())
    counts = {"encoder": total - sum(counts.values())} | {part: count for part, count in counts.items() if count}
    blocks = [sum(p.nbytes for p in block.parameters()) for block in _blocks(model)]
    kept, recomputed = (
        dry_step(workload, images, precision, recompute=recompute).at(1 / images) for recompute in (False, True)
    )
    return TrainingCost(
        counts,
        *flops,
        kept=kept,
        recomputed=recomputed,
        average=0,
        update=update_flops(model.named_parameters()) if workload.optim.name == "muon" else 0,
        block=max(blocks),
        unblocked=sum(p.nbytes for p in model.parameters()) - sum(blocks),
    )


def _blocks(model: Any) -> Iterable[nn.Module]:
    """Returns the blocks, which are checkpointed and sharded one by one, but for the decoder's last: `last_tokens`."""
    if isinstance(model, MaskedAutoencoder):
        return model.whole_blocks
    return model.encoder.blocks if isinstance(model, Segmenter) else model.blocks
