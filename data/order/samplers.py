"""Which samples a rank reads, batch by batch."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from data.order.mixture import Mixture
from data.order.order import Order, usable


class MicroBatch(NamedTuple):
    """One micro-batch that is to be read."""

    epoch: int
    positions: np.ndarray  # [B] int64, in the epoch
    samples: np.ndarray  # [B] int64, in the index
    slot: int | None = None  # where its images go, see data/loader/shared_batches.py


class MicroBatches(Sampler[MicroBatch]):
    """The draws of one rank's micro-batches, from the present step to the end of its epoch.

    The global batch of step s of an epoch is its positions [s·G, (s+1)·G). Of it, rank r of R takes the rows
    [r·G/R, (r+1)·G/R) in micro-batches of M, so that the union over the ranks is the same for every R and M.

    step    asked when an iteration starts: nothing has to be saved to carry on
    views   neighbouring positions that show the same sample; an epoch has samples · views positions
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
        self.steps_per_epoch = usable(len(order) * views, global_batch) // global_batch
        self.accumulate = global_batch // (micro_batch * ranks)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        # The trainer's current_epoch is one behind at the edge of an epoch, its global_step is right.
        epoch, step = divmod(self.step(), self.steps_per_epoch)
        share = self.global_batch // self.ranks
        for first in range(step * self.global_batch, self.steps_per_epoch * self.global_batch, self.global_batch):
            mine = first + self.rank * share
            for start in range(mine, mine + share, self.micro_batch):
                stop = start + self.micro_batch
                samples = self.order.samples(epoch, start // self.views, stop // self.views)
                yield MicroBatch(epoch, np.arange(start, stop), np.repeat(samples, self.views))


class AllSamples(Sampler[MicroBatch]):
    """Every one of these samples once, in order, over the ranks together; positions are sample numbers.

    Each rank gets the same number of batches, their sizes differ by one at most: a rank without a batch would leave
    the others waiting where a forward pass is collective.

    epoch  from which random crops are drawn, where there are any
    """

    def __init__(self, samples: np.ndarray, batch: int, rank: int = 0, ranks: int = 1, epoch: int = 0):
        batches = math.ceil(len(samples) / (batch * ranks)) * ranks
        self.draws, self.epoch = np.array_split(samples, batches)[rank::ranks], epoch

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[MicroBatch]:
        for samples in self.draws:
            yield MicroBatch(self.epoch, samples, samples)


def spread(samples: int, count: int) -> np.ndarray:
    """At most `count` of the numbers 0 ... samples - 1, evenly spread."""
    return np.linspace(0, samples - 1, min(count, samples)).round().astype(np.int64)
