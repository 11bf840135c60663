"""What a training run would take: memory on each device, speed, days, disk. From plain numbers."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mae.plan.devices import Hardware
from mae.plan.training_cost import Workload

# Of a device's memory, for what no count of tensors knows: the CUDA context, libraries, gaps between allocations.
RESERVE = 0.1


class Layout(NamedTuple):
    """Bytes on each device under one strategy, and what follows from them.

    strategy             one device, DDP, FSDP
    recompute            blocks are computed a second time in the backward pass instead of being kept
    gathered             weights and gradients that FSDP has whole for a while
    activations          of the micro-batch, with the copies of weights in the precision of autocast
    largest_micro_batch  images that fit beside the rest, 0 for none
    images_per_s         of all devices together
    """

    strategy: str
    recompute: bool
    weights: int
    gradients: int
    optimiser: int
    gathered: int
    activations: int
    largest_micro_batch: int
    images_per_s: float

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.gathered + self.activations


class Stored(NamedTuple):
    """The training shards, and the checkpoints that lie on disk at the same time, one of them being written."""

    shards: int | None
    shard_bytes: int | None
    checkpoints: int
    checkpoint_bytes: int


@dataclass(frozen=True)
class Forecast:
    """The plan of a run of `images` images, each time that one is seen counted; None where that is unknown."""

    work: Workload
    hardware: Hardware
    ranks: int
    micro_batch: int
    accumulate: int
    precision: str
    mfu: float
    images: int | None
    layouts: list[Layout]
    stored: Stored

    def days(self, layout: Layout) -> float | None:
        return None if self.images is None else self.images / layout.images_per_s / 86_400

    def plain(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        layouts = [x._asdict() | {"total": x.total, "days": self.days(x)} for x in self.layouts]
        steps = {name: getattr(self.work, name)._asdict() for name in ("kept", "recomputed")}
        return asdict(self) | {
            "work": self.work._asdict() | steps,
            "hardware": self.hardware._asdict(),
            "layouts": layouts,
            "stored": self.stored._asdict(),
        }


def forecast(
    work: Workload,
    hardware: Hardware,
    *,
    ranks: int,
    micro_batch: int,
    accumulate: int,
    precision: str,
    mfu: float,
    images: int | None,
    shards: tuple[int, int | None] | None,
    checkpoints: int,
) -> Forecast:
    """The plan of training by `work` on `ranks` devices.

    mfu          share of the peak that the FLOPs of the formula are expected to reach
    shards       their number and bytes, as far as they are known
    checkpoints  that are kept
    """
    strategies = ["one device"] if ranks == 1 else ["DDP", "FSDP"]
    layouts = [
        layout(strategy, recompute, work, hardware, ranks=ranks, micro_batch=micro_batch, mfu=mfu)
        for strategy in strategies
        for recompute in (False, True)
    ]
    checkpoint_bytes = work.kept.weights + work.kept.optimiser
    stored = Stored(*(shards or (None, None)), checkpoints + 1, checkpoint_bytes)
    return Forecast(work, hardware, ranks, micro_batch, accumulate, precision, mfu, images, layouts, stored)


def layout(
    strategy: str, recompute: bool, work: Workload, hardware: Hardware, *, ranks: int, micro_batch: int, mfu: float
) -> Layout:
    """One strategy. DDP's gradients lie in its buckets, so a device holds what one alone does. FSDP holds a share of
    weights, gradients and moments; and whole, weights and gradients of what lies outside the blocks, of the block at
    work and of the next.
    """
    step = work.recomputed if recompute else work.kept
    share = ranks if strategy == "FSDP" else 1
    empty = Layout(
        strategy,
        recompute,
        weights=step.weights // share,
        gradients=step.gradients // share,
        optimiser=step.optimiser // share,
        gathered=2 * (work.unblocked + 2 * work.block) if strategy == "FSDP" else 0,
        activations=step.copies,
        largest_micro_batch=0,
        images_per_s=ranks * hardware.flops * mfu / work.flops * work.kept.flops / step.flops,
    )
    free = hardware.memory * (1 - RESERVE) - empty.total
    return empty._replace(
        activations=step.at(micro_batch).activations + step.copies,
        largest_micro_batch=max(0, int(free // step.activations)),
    )
