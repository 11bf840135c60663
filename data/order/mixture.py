"""Mixture of data sets: each has a fixed number of samples in every global batch."""

from collections.abc import Iterator

import numpy as np

from data.errors import DataError
from data.order.hashing import MIX, key, permutation
from data.order.order import Order


class Mixture:
    """Order of several data sets, of which each fills a constant number of rows of every global batch.

    orders  of the data sets; sample numbers run through all samples of the data sets in this sequence
    counts  samples of each data set in a global batch, see `shares`

    An epoch has as many samples as those of all data sets together. A data set that ends within it starts its next
    pass. The position in each data set follows from the position in the mixture.
    """

    def __init__(self, orders: list[Order], counts: list[int]):
        self.orders, self.counts, self.batch, self.seed = orders, counts, sum(counts), orders[0].seed
        self.bases = np.concatenate([[0], np.cumsum([order.sizes.sum() for order in orders])])
        self._batch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.orders))

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Returns the sample numbers [stop - start], int64, at positions start … stop - 1 of an epoch."""
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
        """Returns what `Order.windows` does, for all data sets together."""
        batch = epoch * (len(self) // self.batch) + position // self.batch
        found: tuple[list[int], list[int]] = ([], [])
        before = 0
        for order, count in zip(self.orders, self.counts, strict=True):
            for shards, some in zip(found, order.windows(*divmod(batch * count, len(order))), strict=True):
                shards += [before + shard for shard in some]
            before += len(order.sizes)
        return found

    def _samples(self, batch: int) -> np.ndarray:
        """Returns the shuffled samples of a global batch, counted from the beginning of the run."""
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
    """Divides a batch in proportion to the weights, by the largest-remainder method.

    Raises DataError if a data set would have no sample in a batch.
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
    """Splits positions start … stop - 1 of an endless repetition into runs (pass, first, end)."""
    while start < stop:
        pass_, first = divmod(start, length)
        end = min(length, first + stop - start)
        yield pass_, first, end
        start += end - first
