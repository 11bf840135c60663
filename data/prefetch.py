"""Downloads ahead of the reader: the shards of the present window and of the next one."""

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from data.cache import ShardCache
from data.errors import DataError
from data.index import ShardIndex
from data.pins import Pins
from data.protocols import is_remote
from data.samplers import Draw, MicroBatches


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
        self._pins.set(self.cache.place(url) for url in urls)
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
                self.cache.local_path(url)


class Ahead(Sampler[Draw]):
    """The draws of micro-batches, unchanged, whose shards are downloaded ahead while they are drawn."""

    def __init__(self, draws: MicroBatches, index: ShardIndex):
        self.draws, self.index = draws, index
        self._prefetcher: Prefetcher | None = None

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[Draw]:
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self.index.cache)
            weakref.finalize(self, self._prefetcher.close)  # A sweep has many runs in one process.
        window = None
        for draw in self.draws:
            shard = self.index.shard_of(int(draw.samples[0]))
            if window is None or window[0] != draw.epoch or shard not in window[1]:
                now, after = self.draws.order.windows(draw.epoch, int(draw.positions[0]) // self.draws.views)
                window = draw.epoch, now
                self._prefetcher.want(self._within_limit(now, after))
            yield draw

    def _within_limit(self, now: list[int], after: list[int]) -> list[str]:
        """URLs of this window's shards, and of the next one's as far as the cache has room for them."""
        limit = self.index.cache.limit
        shards = list(dict.fromkeys([*now, *after]))
        if limit is not None:
            total = np.cumsum(self.index.bytes[shards])
            if total[len(now) - 1] > limit and self.draws.rank == 0:
                _warn_once(len(now), int(total[len(now) - 1]), limit)
            shards = shards[: max(len(now), int(np.searchsorted(total, limit, side="right")))]
        return [url for shard in shards if is_remote(url := self.index.shards[shard])]


def ahead(draws: MicroBatches, index: ShardIndex) -> Sampler[Draw]:
    """The draws; if any shard is remote, its download runs ahead of them."""
    return Ahead(draws, index) if any(map(is_remote, index.shards)) else draws


_warned: set[tuple[int, float]] = set()


def _warn_once(shards: int, needed: int, limit: float) -> None:
    if (shards, limit) not in _warned:
        _warned.add((shards, limit))
        print(
            f"warning: data.cache_gb={limit / 1e9:.3g} holds less than one window: its {shards} shards take "
            f"{needed / 1e9:.3g} GB and are all kept while they are read. Raise data.cache_gb or lower data.window.",
            file=sys.stderr,
        )
