"""The order of the samples: a pure function of (samples per shard, seed, epoch)."""

import numpy as np

from data.draw import SAMPLES, SHARDS, key, permutation

ORDER_VERSION = 1  # To be raised whenever the same arguments would give another order.


def usable(samples: int, global_batch: int) -> int:
    """Positions visited in an epoch; the order puts other samples behind them in each epoch."""
    return samples // global_batch * global_batch


class Order:
    """Shards permuted per epoch, cut into windows, samples permuted inside each window.

    sizes   [S]  samples in each shard; sample numbers run through the shards in this order
    window       shards that are read at a time: more mixes better and opens more files

    Each epoch is a permutation of all samples. Finding a position costs a sort of the shards and of one window.
    """

    def __init__(self, sizes: np.ndarray, seed: int, window: int = 16):
        self.sizes = np.asarray(sizes, np.int64)
        self.seed, self.window = seed, window
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Sample numbers [stop - start], int64, at the positions start … stop - 1 of an epoch."""
        assert 0 <= start <= stop <= len(self), f"positions {start}…{stop} of {len(self)}"
        _, bounds = self._layout(epoch)
        parts = [np.empty(0, np.int64)]
        while start < stop:
            number = int(np.searchsorted(bounds, start, side="right")) - 1
            end = min(stop, int(bounds[number + 1]))
            parts.append(self._window(epoch, number)[start - bounds[number] : end - bounds[number]])
            start = end
        return np.concatenate(parts)

    def windows(self, epoch: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of the window at a position, and those of the window after it, be it in the next epoch."""
        shards, bounds = self._layout(epoch)
        stop = self.window * int(np.searchsorted(bounds, position, side="right"))
        after = shards[stop : stop + self.window] if stop < len(shards) else self._layout(epoch + 1)[0][: self.window]
        return shards[stop - self.window : stop], after

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards of an epoch in their order, and the positions at which its windows begin (and the last ends)."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = permutation(key(self.seed, SHARDS, epoch), np.arange(len(self.sizes)))
            ends = np.cumsum(self.sizes[shards])
            bounds = np.concatenate([[0], ends[self.window - 1 : -1 : self.window], ends[-1:]])
            self._epoch = epoch, shards, bounds
        return self._epoch[1:]

    def _window(self, epoch: int, number: int) -> np.ndarray:
        """The samples of one window in their order; the last two windows asked for are kept."""
        if (epoch, number) not in self._windows:
            shards = self._layout(epoch)[0][number * self.window : (number + 1) * self.window]
            samples = np.concatenate([np.arange(*self.starts[[shard, shard + 1]].tolist()) for shard in shards])
            if len(self._windows) == 2:
                self._windows.pop(next(iter(self._windows)))
            self._windows[epoch, number] = permutation(key(self.seed, SAMPLES, epoch), samples)
        return self._windows[epoch, number]
