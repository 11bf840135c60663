"""Several data sets in one stream, each with its share of every global batch."""

from collections.abc import Iterator

import numpy as np

from data.errors import DataError
from data.order.hashing import MIX, key, permutation
from data.order.order import Order


class Mixture:
    """Of every global batch each data set provides a constant number of samples, each in an order of its own.

    orders  of the data sets; sample numbers of the mixture run through the data sets in this sequence
    counts  samples of each in a global batch, see `shares`

    A data set that is through begins its next pass in the middle of an epoch of the mixture; an epoch has as many
    samples as the data sets together. Where a run stands in each of them follows from the position.
    """

    def __init__(self, orders: list[Order], counts: list[int]):
        self.orders, self.counts, self.batch, self.seed = orders, counts, sum(counts), orders[0].seed
        self.bases = np.concatenate([[0], np.cumsum([len(order) for order in orders])])
        self._batch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.bases[-1])

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Sample numbers [stop - start], int64, at the positions start … stop - 1 of an epoch."""
        assert 0 <= start <= stop <= len(self), f"positions {start}…{stop} of {len(self)}"
        first_batch = epoch * (len(self) // self.batch)
        parts = [np.empty(0, np.int64)]
        while start < stop:
            batch, row = divmod(start, self.batch)
            end = min(self.batch, row + stop - start)
            parts.append(self._samples(first_batch + batch)[row:end])
            start += end - row
        return np.concatenate(parts)

    def windows(self, epoch: int, position: int) -> tuple[list[int], list[int]]:
        """As `Order.windows`, of all data sets together."""
        batch = epoch * (len(self) // self.batch) + position // self.batch
        found: tuple[list[int], list[int]] = ([], [])
        before = 0
        for order, count in zip(self.orders, self.counts, strict=True):
            for shards, some in zip(found, order.windows(*divmod(batch * count, len(order))), strict=True):
                shards += [before + shard for shard in some]
            before += len(order.sizes)
        return found

    def _samples(self, batch: int) -> np.ndarray:
        """The samples of one global batch, counted from the beginning of the run, the data sets mixed."""
        if self._batch is None or self._batch[0] != batch:
            parts = [
                base + order.samples(pass_, first, end)
                for base, order, count in zip(self.bases, self.orders, self.counts, strict=False)
                for pass_, first, end in _runs(batch * count, (batch + 1) * count, len(order))
            ]
            rows = permutation(key(self.seed, MIX, batch), np.arange(self.batch))
            self._batch = batch, np.concatenate(parts)[rows]
        return self._batch[1]


def shares(weights: list[float], batch: int) -> list[int]:
    """The batch divided in proportion to the weights: whole numbers by the largest remainders.

    DataError: a weight is so small that its data set would have no sample in a batch.
    """
    exact = np.array(weights) / np.sum(weights) * batch
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: batch - counts.sum()]] += 1
    if counts.min() == 0:
        smallest = int(counts.argmin())
        raise DataError(
            f"data.weights={list(weights)} leave the data set number {smallest + 1} without a sample in a global batch "
            f"of {batch}. Raise its weight or the batch, or leave it out."
        )
    return counts.tolist()


def _runs(start: int, stop: int, length: int) -> Iterator[tuple[int, int, int]]:
    """The places start … stop - 1 of an endless repetition as runs (pass, first, end)."""
    while start < stop:
        pass_, first = divmod(start, length)
        end = min(length, first + stop - start)
        yield pass_, first, end
        start += end - first
