"""Downloads ahead of the reader: the shards of the present window and of the next one."""

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


class Prefetcher:
    """Fills a cache in the background, a few shards at a time, and keeps what it was told of from being evicted.

    An error ends nothing here: who reads the shard meets it again, and raises it.
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
        """The shards to have from now on, most urgent first; earlier wishes that are not among them are dropped."""
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


class Ahead(Sampler[MicroBatch]):
    """The draws of micro-batches, unchanged, whose shards are downloaded ahead while they are drawn.

    under_way  draws before the newest one that workers may still be reading: their shards must not be evicted
    """

    def __init__(self, draws: MicroBatches, index: ShardIndex, under_way: int):
        self.draws, self.index, self.under_way = draws, index, under_way
        self._prefetcher: Prefetcher | None = None

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[MicroBatch]:
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self.index.cache)
            weakref.finalize(self, self._prefetcher.close)  # A sweep has many runs in one process.
        now: list[int] = []
        before: deque[list[int]] = deque(maxlen=self.under_way)
        for draw in self.draws:
            if self.index.shard_of(int(draw.samples[0])) not in now:
                now, after = self.draws.order.windows(draw.epoch, int(draw.positions[0]) // self.draws.views)
                self._prefetcher.want(self._within_limit([*itertools.chain(*before), *now], after))
            before.append(now)
            yield draw

    def _within_limit(self, now: list[int], after: list[int]) -> list[str]:
        """URLs of the shards that are read now, and of those read after them as far as the cache has room."""
        limit = self.index.cache.limit
        shards, needed = list(dict.fromkeys([*now, *after])), len(set(now))
        if limit is not None:
            total = np.cumsum(self.index.bytes[shards])
            if total[needed - 1] > limit and self.draws.rank == 0:
                _warn_once(needed, int(total[needed - 1]), limit)
            shards = shards[: max(needed, int(np.searchsorted(total, limit, side="right")))]
        return [url for shard in shards if is_remote(url := self.index.shards[shard])]


def ahead(draws: MicroBatches, index: ShardIndex, under_way: int) -> Sampler[MicroBatch]:
    """The draws; if any shard is remote, its download runs ahead of them. `under_way`: see `Ahead`."""
    return Ahead(draws, index, under_way) if any(map(is_remote, index.shards)) else draws


_warned: set[float] = set()


def _warn_once(shards: int, needed: int, limit: float) -> None:
    if limit not in _warned:
        _warned.add(limit)
        print(
            f"warning: data.cache_gb={limit / 1e9:.3g} holds less than is read at a time: {shards} shards take "
            f"{needed / 1e9:.3g} GB and are kept all the same. Raise data.cache_gb or lower data.window.",
            file=sys.stderr,
        )
