"""Windowed shuffle: the order of the samples is a pure function of (samples per shard, seed, epoch).

0 choose the samples of the epoch, if data.sampling says how    data/order/choice.py
1 permute the shards, and deal them to the lanes
2 cut each lane into windows of consecutive shards
3 permute the samples inside each window
4 fill every batch with a run of samples of each lane
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.order.hashing import SAMPLES, SHARDS, key, permutation

if TYPE_CHECKING:
    from data.order.choice import Choice

ORDER_VERSION = 1  # Raise it whenever the same arguments would give another order.


def steps_per_epoch(samples: int, global_batch: int, views: int = 1) -> int:
    """Returns how many whole global batches the views of all samples fill. In each epoch other samples are left out."""
    return samples * views // global_batch


class Lane(NamedTuple):
    """A sequence of shards, read a window of them at a time."""

    shards: np.ndarray
    bounds: np.ndarray  # [windows + 1] places in the lane where its windows begin, and where the last one ends


class Order:
    """A permutation of all samples for each epoch. Seeking costs a sort of the shards and of one window.

    sizes   [S]  samples in each shard; sample numbers run through the shards in this order
    window       shards that a lane reads at a time: more mixes better and opens more files
    lanes        sequences of shards that are read side by side, so that ranks, which take neighbouring rows of a
                 global batch, share few shards. Part of the order: any number of ranks reads the same batches
    batch        positions that the lanes share, normally the global batch; without effect if lanes = 1
    choice       of the samples of each epoch; None: all
    """

    def __init__(
        self,
        sizes: np.ndarray,
        seed: int,
        window: int = 16,
        lanes: int = 1,
        batch: int = 1,
        choice: "Choice | None" = None,
    ):
        self.sizes = np.asarray(sizes, np.int64)
        self.seed, self.window, self.choice = seed, window, choice
        self.lanes, self.batch = (1, 1) if lanes == 1 else (min(lanes, len(self.sizes), batch), batch)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._epoch: tuple[int, list[Lane]] | None = None
        self._windows: dict[tuple[int, int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self.choice.n if self.choice else int(self.starts[-1])

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Returns the sample numbers [stop - start], int64, at positions start … stop - 1 of an epoch."""
        assert 0 <= start <= stop <= len(self), f"positions {start}…{stop} of {len(self)}"
        parts = [self._window_samples(epoch, *run) for run in self._runs(epoch, start, stop)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def windows(self, epoch: int, position: int) -> tuple[list[int], list[int]]:
        """Returns the shards that the batch at a position reads from, and those of the windows that follow."""
        start = position // self.batch * self.batch
        now = [(lane, window) for lane, window, _, _ in self._runs(epoch, start, min(start + self.batch, len(self)))]
        after = [shard for lane, window in now for shard in self._shards_of(epoch, lane, window + 1)]
        if not after:
            after = [shard for lane in range(self.lanes) for shard in self._shards_of(epoch + 1, lane, 0)]
        return [shard for lane, window in now for shard in self._shards_of(epoch, lane, window)], after

    def _runs(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Splits positions into runs (lane, window, first, end) of places within one window."""
        lanes = self._lanes(epoch)
        for number, first, end in self._lane_runs(lanes, start, stop):
            bounds = lanes[number].bounds
            while first < end:
                window = int(np.searchsorted(bounds, first, side="right")) - 1
                until = min(end, int(bounds[window + 1]))
                yield number, window, first - int(bounds[window]), until - int(bounds[window])
                first = until

    def _lane_runs(self, lanes: list[Lane], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Splits positions into runs (lane, first, end) of places in a lane.

        While all lanes last, each batch holds a run of each lane. The rests of the lanes follow one after the other.
        """
        lengths = [int(lane.bounds[-1]) for lane in lanes]
        cuts = [lane * self.batch // self.lanes for lane in range(self.lanes + 1)]
        widths = [after - before for before, after in itertools.pairwise(cuts)]
        batches = min(length // width for length, width in zip(lengths, widths, strict=True)) if self.lanes > 1 else 0
        while start < min(stop, batches * self.batch):
            batch, row = divmod(start, self.batch)
            lane = next(number for number in range(self.lanes) if row < cuts[number + 1])
            end = min(cuts[lane + 1], row + stop - start)
            first = batch * widths[lane] - cuts[lane]
            yield lane, first + row, first + end
            start += end - row
        before = batches * self.batch
        for lane, (length, width) in enumerate(zip(lengths, widths, strict=True)):
            used = batches * width
            first, end = max(start - before, 0), min(stop - before, length - used)
            if first < end:
                yield lane, used + first, used + end
            before += length - used

    def _lanes(self, epoch: int) -> list[Lane]:
        if self._epoch is None or self._epoch[0] != epoch:
            sizes = self.choice.counts(epoch) if self.choice else self.sizes
            permuted = permutation(key(self.seed, SHARDS, epoch), np.flatnonzero(sizes))  # no shard without a sample
            lanes = []
            for number in range(self.lanes):
                shards = permuted[number :: self.lanes]
                ends = np.cumsum(sizes[shards])
                lanes.append(Lane(shards, np.concatenate([[0], ends[self.window - 1 : -1 : self.window], ends[-1:]])))
            self._epoch = epoch, lanes
        return self._epoch[1]

    def _shards_of(self, epoch: int, lane: int, window: int) -> list[int]:
        return self._lanes(epoch)[lane].shards[window * self.window : (window + 1) * self.window].tolist()

    def _window_samples(self, epoch: int, lane: int, window: int, first: int, end: int) -> np.ndarray:
        """Returns the samples at places first … end - 1 of a window; caches the last two windows of each lane."""
        at = epoch, lane, window
        if at not in self._windows:
            shards = self._shards_of(epoch, lane, window)
            samples = np.concatenate([self._shard_samples(epoch, shard) for shard in shards])
            if len(self._windows) == 2 * self.lanes:
                self._windows.pop(next(iter(self._windows)))
            self._windows[at] = permutation(key(self.seed, SAMPLES, epoch), samples)
        return self._windows[at][first:end]

    def _shard_samples(self, epoch: int, shard: int) -> np.ndarray:
        return self.choice.pick(epoch, shard) if self.choice else np.arange(*self.starts[[shard, shard + 1]].tolist())
