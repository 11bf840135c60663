"""Choice: which samples an epoch shows, each with a probability of its own (systematic sampling, Madow 1949).

1 scale   probabilities in whole units of 2^-28, so that they sum to exactly n samples
2 mark    a point at offset + k for k = 0 … n - 1; one offset in [0, 1) per epoch
3 count   points that fall into a shard's part of the cumulative sums: what it gives
4 pick    inside the shard, the samples on which its points fall, along their hashed order of the epoch

All is done with integers, so that every machine and every version of numpy chooses the same samples.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from data.errors import DataError
from data.order.hashing import CHOICE, key, permutation

BITS = 28
ONE = 1 << BITS  # the probability 1; sums of up to 2^34 samples fit in int64


class Choice:
    """Chooses exactly `n` samples for each epoch: a pure function of (probabilities, seed, epoch).

    sizes          [S]  samples in each shard
    probabilities  (shard) → [samples] int64 in 0 … ONE; called for the shards of a window, whenever these change

    n is the sum of the probabilities, rounded. They are scaled so that they sum to n, none of them beyond 1: by a
    factor within 1 ± 1/2n as long as few are close to 1. Over the epochs each sample comes with its scaled probability,
    in an epoch no sample comes twice. All probabilities are looked at once, here; later those of the shards that are
    read.

    digest  of all probabilities as given

    Raises DataError if n is 0.
    """

    def __init__(self, sizes: np.ndarray, probabilities: Callable[[int], np.ndarray], seed: int):
        self.sizes, self.probabilities, self.seed = np.asarray(sizes, np.int64), probabilities, seed
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        whole = np.concatenate([probabilities(shard) for shard in range(len(self.sizes))])
        total = int(whole.sum())
        self.n = (2 * total + ONE) // (2 * ONE)
        if self.n == 0:
            raise DataError(
                f"data.rule leaves no image for an epoch: the probabilities of all {len(whole):,} sum to "
                f"{total / ONE:.2g}. Lower it."
            )
        self.scale = _scale(whole, self.n)
        self.digest = hashlib.sha256(whole.astype("<i8").tobytes()).hexdigest()[:16]
        scaled = _scaled(whole, self.scale)
        lacking = self.n * ONE - int(scaled.sum())
        open_ = np.add.reduceat((whole > 0) & (scaled < ONE), self.starts[:-1], dtype=np.int64)
        # Rounding down leaves fewer units than there are samples below 1: the first of these get one each.
        self.extra = np.diff(np.minimum(np.cumsum(open_), lacking), prepend=0)
        self.ends = np.cumsum(np.add.reduceat(scaled, self.starts[:-1]) + self.extra)
        assert self.ends[-1] == self.n * ONE
        self._epoch: tuple[int, tuple[int, np.ndarray]] | None = None

    def counts(self, epoch: int) -> np.ndarray:
        """Returns how many samples each shard gives in an epoch, [S] int64; their sum is n."""
        return np.diff(self._points_before(epoch, self.ends), prepend=0)

    def pick(self, epoch: int, shard: int) -> np.ndarray:
        """Returns the samples that a shard gives in an epoch, ascending, int64."""
        first, stop = self.starts[shard : shard + 2].tolist()
        hashed = permutation(self._drawn(epoch)[1], np.arange(first, stop))
        begin = int(self.ends[shard - 1]) if shard else 0
        ends = begin + np.cumsum(self.scaled(shard)[hashed - first])
        points = self._points_before(epoch, np.concatenate([[begin], ends]))
        return np.sort(hashed[np.diff(points) > 0])

    def scaled(self, shard: int) -> np.ndarray:
        """Returns the probabilities with which the samples of a shard come, [samples] int64 in 0 … ONE."""
        given = self.probabilities(shard)
        scaled = _scaled(given, self.scale)
        scaled[np.flatnonzero((given > 0) & (scaled < ONE))[: self.extra[shard]]] += 1
        return scaled

    def _points_before(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Counts the points of an epoch below each place on the line of cumulative sums."""
        return (places + (ONE - 1 - self._drawn(epoch)[0])) >> BITS

    def _drawn(self, epoch: int) -> tuple[int, np.ndarray]:
        """Returns the offset of an epoch, in units of 1 / ONE, and the stream of hashes of its samples."""
        if self._epoch is None or self._epoch[0] != epoch:
            offset = int(key(self.seed, CHOICE, epoch, 0)[0]) % ONE
            self._epoch = epoch, (offset, key(self.seed, CHOICE, epoch, 1))
        return self._epoch[1]


def _scaled(probabilities: np.ndarray, scale: int) -> np.ndarray:
    return np.minimum((probabilities * scale) >> BITS, ONE)


def _scale(probabilities: np.ndarray, n: int) -> int:
    """Returns the largest factor, in units of 1 / ONE, under which the scaled probabilities sum to at most n.

    It is at most 2: doubling closes the gap to the next whole number, even if all are cut off at 1.
    """
    total, wanted = int(probabilities.sum()), n * ONE
    if total == wanted:
        return ONE

    def sum_at(scale: int) -> int:
        return int(_scaled(probabilities, scale).sum())

    low, width = max(0, wanted * ONE // total - 1), 2
    while low + width <= 2 * ONE and sum_at(low + width) <= wanted:
        width *= 2
    return low + bisect_right(range(low, low + width), wanted, key=sum_at) - 1
