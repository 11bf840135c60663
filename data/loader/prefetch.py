"""Prefetching: downloads the shards of this window and of the next one before they are read."""

import contextlib
import itertools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from data.errors import DataError
from data.index.index import ShardIndex
from data.order.samplers import MicroBatch, MicroBatches
from data.storage.cache import ShardCache
from data.storage.in_use import Pins
from data.storage.protocols import is_remote


class PrefetchingSampler(Sampler[MicroBatch]):
    """Yields micro-batches unchanged and has their shards downloaded ahead.

    under_way  micro-batches before the newest one that workers may still be reading: their shards are not evicted
    """

    def __init__(self, micro_batches: MicroBatches, index: ShardIndex, under_way: int):
        self.micro_batches, self.index, self.under_way = micro_batches, index, under_way
        self._prefetcher: Prefetcher | None = None

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self.index.cache)
            weakref.finalize(self, self._prefetcher.close)  # A sweep has many runs in one process.
        order, views = self.micro_batches.order, self.micro_batches.views
        now: list[int] = []
        before: deque[list[int]] = deque(maxlen=self.under_way)
        for micro_batch in self.micro_batches:
            if self.index.shard_of(int(micro_batch.samples[0])) not in now:
                now, after = order.windows(micro_batch.epoch, int(micro_batch.positions[0]) // views)
                self._prefetcher.want(self._within_limit([*itertools.chain(*before), *now], after))
            before.append(now)
            yield micro_batch

    def _within_limit(self, now: list[int], after: list[int]) -> list[str]:
        """Returns the URLs of the shards read now, and of those read next as far as the cache has room for them."""
        limit = self.index.cache.limit
        shards, needed = list(dict.fromkeys([*now, *after])), len(set(now))
        if limit is not None:
            total = np.cumsum(self.index.bytes[shards])
            if total[needed - 1] > limit and self.micro_batches.rank == 0:
                _warn_once(needed, int(total[needed - 1]), limit)
            shards = shards[: max(needed, int(np.searchsorted(total, limit, side="right")))]
        return [url for shard in shards if is_remote(url := self.index.shards[shard])]


class Prefetcher:
    """Fills a cache in the background, a few shards at a time, and keeps the wanted ones from being evicted.

    Errors are left to whoever reads the shard, who meets the same one.
    """

    def __init__(self, cache: ShardCache, threads: int = 4):
        self.cache = cache
        cache.make_folder(cache.shards)
        self._pins = Pins(cache.shards)
        self._wanted: list[str] = []
        self._change = threading.Condition()
        self._closed = False
        # Daemons: a long download must not hold up the end of the run.
        for _ in range(threads):
            threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def want(self, urls: Sequence[str]) -> None:
        """Replaces the list of shards to download and to keep, most urgent first."""
        self._pins.set(self.cache.copy_path(url) for url in urls)
        with self._change:
            self._wanted = list(urls)
            self._change.notify_all()

    def close(self) -> None:
        self._pins.close()
        with self._change:
            self._wanted, self._closed = [], True
            self._change.notify_all()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                url = self._wanted.pop(0)
            with contextlib.suppress(DataError):
                self.cache.fetch(url)


_warned: set[float] = set()


def _warn_once(shards: int, needed: int, limit: float) -> None:
    if limit not in _warned:
        _warned.add(limit)
        print(
            f"warning: data.cache_gb={limit / 1e9:.3g} holds less than is read at a time: {shards} shards take "
            f"{needed / 1e9:.3g} GB and are kept all the same. Raise data.cache_gb or lower data.window.",
            file=sys.stderr,
        )
