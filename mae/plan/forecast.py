"""Forecast of a training run: memory on each device, speed, time, price, data, disk. Arithmetic on plain numbers."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mae.plan.devices import Hardware
from mae.plan.training_cost import TrainingCost

# Share of a device's memory for what is no tensor: CUDA context, libraries, gaps between allocations.
MEMORY_RESERVE = 0.1
NODE = 8  # devices of a usual node of GPUs


class Layout(NamedTuple):
    """Memory of each device in bytes under one strategy, and the speed.

    strategy             one device | DDP | FSDP
    recompute            activation checkpointing of all blocks
    average              of the weights (task.ema)
    frozen               weights of a teacher (task=distill), which no strategy shards
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
    average: int
    frozen: int
    gathered: int
    activations: int
    largest_micro_batch: int
    images_per_s: float

    @property
    def total(self) -> int:
        held = self.weights + self.gradients + self.optimiser + self.average + self.frozen
        return held + self.gathered + self.activations


@dataclass(frozen=True)
class Forecast:
    """Forecast of training on `ranks` devices.

    mfu          expected model FLOPs utilisation: FLOPs by formula as a share of the peak
    images       seen by the run, repetitions counted; None if the size of the data is unknown
    samples      training images; None if unknown
    sampling     how many of them an epoch shows, in words; None: all
    shards       of the training images, and their bytes, as far as they are known
    loading      images per second that one core of this machine loads; None if it was not measured
    price        of an hour of one device, in any currency
    checkpoints  on disk at a time, one of them being written
    saving       seconds that writing one takes on this machine; None if nothing can be written
    """

    cost: TrainingCost
    hardware: Hardware
    ranks: int
    global_batch: int
    micro_batch: int
    accumulate: int
    precision: str
    mfu: float
    images: int | None
    samples: int | None
    sampling: str | None
    shards: int | None
    shard_bytes: int | None
    loading: float | None
    price: float | None
    checkpoints: int
    saving: float | None

    @property
    def layouts(self) -> list[Layout]:
        """Returns memory and speed under each strategy, without and with activation checkpointing."""
        sizes = {"ranks": self.ranks, "micro_batch": self.micro_batch, "global_batch": self.global_batch}
        return [
            layout(strategy, recompute, self.cost, self.hardware, mfu=self.mfu, **sizes)
            for strategy in (["one device"] if self.ranks == 1 else ["DDP", "FSDP"])
            for recompute in (False, True)
        ]

    @property
    def node(self) -> int:
        """Returns the number of devices of a node, at most NODE."""
        return min(self.ranks, NODE)

    @property
    def image_bytes(self) -> float | None:
        """Returns the bytes that are read for one image, None if they are unknown."""
        return self.shard_bytes / self.samples if self.shard_bytes and self.samples else None

    def hours(self, layout: Layout) -> float | None:
        """Returns the length of the run, None if the number of images is unknown."""
        return None if self.images is None else self.images / layout.images_per_s / 3600

    def budget(self, layout: Layout) -> dict[str, float | None]:
        """Returns hours and days of the run, hours of all devices together, their price, images/s of each node."""
        hours = self.hours(layout)
        devices = None if hours is None else hours * self.ranks
        return {
            "hours": hours,
            "days": None if hours is None else hours / 24,
            "device_hours": devices,
            "price": None if devices is None or self.price is None else devices * self.price,
            "node_images_per_s": layout.images_per_s * self.node / self.ranks,
        }

    def plain(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        steps = {name: getattr(self.cost, name)._asdict() for name in ("kept", "recomputed")}
        fields = asdict(self)
        del fields["cost"]
        stored = {name: fields.pop(name) for name in ("samples", "shards", "shard_bytes", "checkpoints", "saving")}
        return fields | {
            "work": self.cost._asdict() | steps,
            "hardware": self.hardware._asdict(),
            "layouts": [x._asdict() | {"total": x.total} | self.budget(x) for x in self.layouts],
            "devices_of_a_node": self.node,
            "stored": stored | {"checkpoint_bytes": self.cost.checkpoint_bytes},
        }


def layout(
    strategy: str,
    recompute: bool,
    cost: TrainingCost,
    hardware: Hardware,
    *,
    ranks: int,
    micro_batch: int,
    global_batch: int,
    mfu: float,
) -> Layout:
    """Returns memory and speed under one strategy.

    DDP keeps gradients in its buckets, so each device holds the same as one alone. FSDP holds a share of weights,
    gradients, moments and average, and gathers weights and gradients of everything outside the blocks, of the current
    block and of the next.
    """
    step = cost.recomputed if recompute else cost.kept
    share = ranks if strategy == "FSDP" else 1
    per_image = cost.flops * step.flops / cost.kept.flops + cost.update / global_batch
    empty = Layout(
        strategy,
        recompute,
        weights=step.weights // share,
        gradients=step.gradients // share,
        optimiser=step.optimiser // share,
        average=cost.average // share,
        frozen=cost.frozen,
        gathered=2 * (cost.unblocked + 2 * cost.block) if strategy == "FSDP" else 0,
        activations=step.copies,
        largest_micro_batch=0,
        images_per_s=ranks * hardware.flops * mfu / per_image,
    )
    free = hardware.memory * (1 - MEMORY_RESERVE) - empty.total
    return empty._replace(
        activations=step.at(micro_batch).activations + step.copies,
        largest_micro_batch=max(0, int(free // step.activations)),
    )
