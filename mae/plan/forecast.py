"""Forecast of a training run: memory on each device, speed, days, disk. Arithmetic on plain numbers."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mae.plan.devices import Hardware
from mae.plan.training_cost import TrainingCost

# Share of a device's memory for what is no tensor: CUDA context, libraries, gaps between allocations.
MEMORY_RESERVE = 0.1


class Layout(NamedTuple):
    """Memory of each device in bytes under one strategy, and the speed.

    strategy             one device | DDP | FSDP
    recompute            activation checkpointing of all blocks
    gathered             weights and gradients that FSDP holds unsharded for a while
    activations          of the micro-batch, and copies of weights in the precision of autocast
    largest_micro_batch  images that fit, 0 if not even one does
    images_per_s         over all devices
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


@dataclass(frozen=True)
class Forecast:
    """Forecast of training on `ranks` devices.

    mfu          expected model FLOPs utilisation: FLOPs by formula as a share of the peak
    images       seen by the run, repetitions counted; None if the size of the data is unknown
    shards       of the training images, and their bytes, as far as they are known
    checkpoints  on disk at a time, one of them being written
    """

    cost: TrainingCost
    hardware: Hardware
    ranks: int
    micro_batch: int
    accumulate: int
    precision: str
    mfu: float
    images: int | None
    shards: int | None
    shard_bytes: int | None
    checkpoints: int

    @property
    def layouts(self) -> list[Layout]:
        """Returns memory and speed under each strategy, without and with activation checkpointing."""
        sizes = {"ranks": self.ranks, "micro_batch": self.micro_batch}
        return [
            layout(strategy, recompute, self.cost, self.hardware, mfu=self.mfu, **sizes)
            for strategy in (["one device"] if self.ranks == 1 else ["DDP", "FSDP"])
            for recompute in (False, True)
        ]

    @property
    def checkpoint_bytes(self) -> int:
        return self.cost.kept.weights + self.cost.kept.optimiser

    def days(self, layout: Layout) -> float | None:
        """Returns the length of the run, None if the number of images is unknown."""
        return None if self.images is None else self.images / layout.images_per_s / 86_400

    def plain(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        steps = {name: getattr(self.cost, name)._asdict() for name in ("kept", "recomputed")}
        fields = asdict(self)
        del fields["cost"]
        stored = {name: fields.pop(name) for name in ("shards", "shard_bytes", "checkpoints")}
        return fields | {
            "work": self.cost._asdict() | steps,
            "hardware": self.hardware._asdict(),
            "layouts": [x._asdict() | {"total": x.total, "days": self.days(x)} for x in self.layouts],
            "stored": stored | {"checkpoint_bytes": self.checkpoint_bytes},
        }


def layout(
    strategy: str, recompute: bool, cost: TrainingCost, hardware: Hardware, *, ranks: int, micro_batch: int, mfu: float
) -> Layout:
    """Returns memory and speed under one strategy.

    DDP keeps gradients in its buckets, so each device holds the same as one alone. FSDP holds a share of weights,
    gradients and moments, and gathers weights and gradients of everything outside the blocks, of the current block and
    of the next.
    """
    step = cost.recomputed if recompute else cost.kept
    share = ranks if strategy == "FSDP" else 1
    empty = Layout(
        strategy,
        recompute,
        weights=step.weights // share,
        gradients=step.gradients // share,
        optimiser=step.optimiser // share,
        gathered=2 * (cost.unblocked + 2 * cost.block) if strategy == "FSDP" else 0,
        activations=step.copies,
        largest_micro_batch=0,
        images_per_s=ranks * hardware.flops * mfu / cost.flops * cost.kept.flops / step.flops,
    )
    free = hardware.memory * (1 - MEMORY_RESERVE) - empty.total
    return empty._replace(
        activations=step.at(micro_batch).activations + step.copies,
        largest_micro_batch=max(0, int(free // step.activations)),
    )
