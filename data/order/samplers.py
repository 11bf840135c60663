"""Samplers: the micro-batches that a rank reads."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from data.order.mixture import Mixture
from data.order.order import Order, steps_per_epoch


class MicroBatch(NamedTuple):
    """What to read for one micro-batch."""

    epoch: int
    positions: np.ndarray  # [B] int64, in the epoch
    samples: np.ndarray  # [B] int64, in the index
    slot: int | None = None  # of the shared memory that its images go to, see data/loader/shared_batches.py


class MicroBatches(Sampler[MicroBatch]):
    """Yields the micro-batches of one rank, from the current step to the end of its epoch.

    Step s of an epoch has the positions [s·G, (s+1)·G). Rank r of R takes the rows [⌊r·G/R⌋, ⌊(r+1)·G/R⌋) of these, so
    that the union over the ranks is the same for every R. All ranks have as many micro-batches as the largest share
    needs at M images each. Where G does not divide, shares, and the micro-batches of a share, differ by one unit.

    step    called when an iteration starts, so that resuming needs no state of the sampler
    views   repeated augmentation: neighbouring positions of the same sample; an epoch has samples · views positions
    unit    a multiple of `views` that divides all micro-batches, M and G among them
    rows    [accumulate + 1] where this rank's micro-batches begin and end among the G rows of a step
    """

    def __init__(
        self,
        order: Order | Mixture,
        step: Callable[[], int],
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        ranks: int = 1,
        views: int = 1,
        unit: int | None = None,
    ):
        unit = unit or views
        assert global_batch % unit == micro_batch % unit == unit % views == 0, f"{global_batch}, {micro_batch}, {unit}"
        self.order, self.step, self.views = order, step, views
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.ranks = rank, ranks
        self.steps_per_epoch = steps_per_epoch(len(order), global_batch, views)
        units = global_batch // unit
        self.accumulate = math.ceil(math.ceil(units / ranks) / (micro_batch // unit))
        first, last = units * rank // ranks, units * (rank + 1) // ranks
        parts = [first + (last - first) * part // self.accumulate for part in range(self.accumulate + 1)]
        self.rows = [part * unit for part in parts]

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        # At the end of an epoch the trainer's current_epoch is still the old one, but its global_step is right.
        epoch, step = divmod(self.step(), self.steps_per_epoch)
        for first in range(step * self.global_batch, self.steps_per_epoch * self.global_batch, self.global_batch):
            for start, stop in pairwise(first + row for row in self.rows):
                samples = self.order.samples(epoch, start // self.views, stop // self.views)
                yield MicroBatch(epoch, np.arange(start, stop), np.repeat(samples, self.views))


class AllSamples(Sampler[MicroBatch]):
    """Yields each sample once, in order, divided over the ranks; positions are sample numbers.

    Each rank gets the same number of batches, whose sizes differ by one at most: where a forward pass is collective,
    ranks would otherwise wait for one that has no batch left.

    epoch  for drawing random crops, if there are any
    """

    def __init__(self, samples: np.ndarray, batch: int, rank: int = 0, ranks: int = 1, epoch: int = 0):
        count = math.ceil(len(samples) / (batch * ranks)) * ranks
        self.batches, self.epoch = np.array_split(samples, count)[rank::ranks], epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        for samples in self.batches:
            yield MicroBatch(self.epoch, samples, samples)


def spread(samples: int, count: int) -> np.ndarray:
    """Returns at most `count` of the numbers 0 … samples - 1, evenly spaced."""
    return np.linspace(0, samples - 1, min(count, samples)).round().astype(np.int64)
