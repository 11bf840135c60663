"""Samplers: the micro-batches that a rank reads."""

import math
from collections.abc import Callable, Iterator
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

    Step s of an epoch has the positions [s·G, (s+1)·G). Rank r of R takes the rows [r·G/R, (r+1)·G/R) of these in
    micro-batches of M, so that the union over the ranks is the same for every R and M.

    step    called when an iteration starts, so that resuming needs no state of the sampler
    views   repeated augmentation: neighbouring positions of the same sample; an epoch has samples · views positions
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
    ):
        assert global_batch % (micro_batch * ranks) == 0, f"{global_batch} over {ranks} ranks of {micro_batch}"
        assert micro_batch % views == 0, f"{views} views in micro-batches of {micro_batch}"
        self.order, self.step, self.views = order, step, views
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.ranks = rank, ranks
        self.steps_per_epoch = steps_per_epoch(len(order), global_batch, views)
        self.accumulate = global_batch // (micro_batch * ranks)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        # At the end of an epoch the trainer's current_epoch is still the old one, but its global_step is right.
        epoch, step = divmod(self.step(), self.steps_per_epoch)
        share = self.global_batch // self.ranks
        for first in range(step * self.global_batch, self.steps_per_epoch * self.global_batch, self.global_batch):
            row = first + self.rank * share
            for start in range(row, row + share, self.micro_batch):
                stop = start + self.micro_batch
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
