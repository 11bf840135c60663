"""Forecast of a training run: memory on each device, speed, time, price, data, disk. Arithmetic on plain numbers."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mae.plan.devices import Hardware
from mae.plan.training_cost import TrainingCost

# Share of a device's memory for what is no tensor: CUDA context, libraries, gaps between allocations.
MEMORY_RESERVE = 0.1
NODE = 8  # devices of a usual node of GPUs
BACKWARD = 2 / 3  # share of a step's time, beside which DDP sums gradients
ALIKE = 0.01  # difference in speed below which the simpler layout is recommended


class Layout(NamedTuple):
    """Memory of each device in bytes under one strategy, and the speed.

    strategy             one device | DDP | FSDP
    recompute            activation checkpointing of all blocks
    average              of the weights (task.ema)
    frozen               weights of a teacher (task=distill), which no strategy shards
    gathered             weights and gradients that FSDP holds unsharded for a while
    activations          of the micro-batch, and copies of weights in the precision of autocast
    micro_batch          images of a forward pass
    largest_micro_batch  images that fit, 0 if not even one does
    waiting              share of the time in which devices wait for weights or gradients of the others
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
    micro_batch: int
    largest_micro_batch: int
    waiting: float
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
    network      bytes per second that each device sends to another node
    unit         images that a micro-batch is a multiple of
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
    network: float
    unit: int = 1

    @property
    def layouts(self) -> list[Layout]:
        """Returns memory and speed under each strategy, without and with activation checkpointing."""
        strategies = ["one device"] if self.ranks == 1 else ["DDP", "FSDP"]
        return [self.layout(strategy, recompute) for strategy in strategies for recompute in (False, True)]

    def layout(self, strategy: str, recompute: bool, micro_batch: int | None = None) -> Layout:
        """Returns memory and speed under one strategy, with the micro-batch of the settings or another."""
        sizes = {"ranks": self.ranks, "global_batch": self.global_batch, "micro_batch": micro_batch or self.micro_batch}
        return layout(
            strategy, recompute, self.cost, self.hardware, mfu=self.mfu, network=self.network, node=self.node, **sizes
        )

    @property
    def recommended(self) -> Layout | None:
        """Returns the fastest layout that fits, each with the largest micro-batch that divides the share of a device.

        Of those that are as fast the first: DDP before FSDP, all activations kept. None if nothing fits.
        """
        share = self.global_batch // self.ranks
        found = []
        for each in self.layouts:
            fits = [size for size in range(self.unit, share + 1, self.unit) if share % size == 0]
            fits = [size for size in fits if size <= each.largest_micro_batch]
            if fits:
                found.append(self.layout(each.strategy, each.recompute, max(fits)))
        fastest = max((each.images_per_s for each in found), default=0.0)
        return next((each for each in found if each.images_per_s >= (1 - ALIKE) * fastest), None)

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
            "recommended": None if (best := self.recommended) is None else best._asdict() | self.budget(best),
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
    network: float = math.inf,
    node: int = NODE,
) -> Layout:
    """Returns memory and speed under one strategy.

    network  bytes per second that each device sends to another node, of `node` devices

    DDP keeps gradients in its buckets, so each device holds the same as one alone. FSDP holds a share of weights,
    gradients, moments and average, and gathers weights and gradients of everything outside the blocks, of the current
    block and of the next.

    Both send along rings, in which each device passes (ranks - 1) / ranks of all bytes on. Between nodes the rings run
    beside each other, one over the network of each device. DDP sums the gradients once a step, beside the last backward
    pass. FSDP gathers the weights in each forward and in each backward pass, and sums the gradients in the latter, all
    beside the computation. Devices wait for what takes longer than that.
    """
    step = cost.recomputed if recompute else cost.kept
    share = ranks if strategy == "FSDP" else 1
    rate = hardware.flops * mfu
    pass_seconds = micro_batch * cost.flops * step.flops / cost.kept.flops / rate
    passes = global_batch / (ranks * micro_batch)
    around = (ranks - 1) / ranks / (hardware.link if ranks <= node else min(hardware.link, node * network))
    if strategy == "FSDP":
        waits = passes * max(0.0, around * (2 * step.weights + step.gradients) - pass_seconds)
    else:
        waits = max(0.0, around * 2 * step.gradients - BACKWARD * pass_seconds)
    seconds = passes * pass_seconds + cost.update / (ranks * rate) + waits
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
        micro_batch=micro_batch,
        largest_micro_batch=0,
        waiting=waits / seconds,
        images_per_s=global_batch / seconds,
    )
    free = hardware.memory * (1 - MEMORY_RESERVE) - empty.total
    return empty._replace(
        activations=step.at(micro_batch).activations + step.copies,
        largest_micro_batch=max(0, int(free // step.activations)),
    )
