"""torch's DataLoader around a stream: workers, shared memory, and what happens when something dies."""

import multiprocessing
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info

from data.errors import DataError
from data.index.index import ShardIndex
from data.loader.dataset import Batch, ShardDataset
from data.loader.faults import Faults
from data.loader.shared_batches import Ring
from data.order.samplers import MicroBatch

AHEAD = 2  # batches that each worker has under way
KEPT = 3  # batches that whoever takes them may hold at a time before fresh memory is used
SETTLING = 0.2  # seconds before workers are forked beside other ranks


class ShardLoader(DataLoader):
    """The batches of some draws; what it yields does not depend on the number of workers.

    stream      what makes batches of the draws, and cut, how it makes images
    batch       rows at most
    faults      told of the samples that could not be read
    persistent  workers outlive an iteration

    Workers hand their images over in a ring of shared batches, so that only one iteration at a time makes sense.
    """

    def __init__(
        self,
        index: ShardIndex,
        cut: Any,
        draws: Sampler[MicroBatch],
        *,
        stream: type[ShardDataset] = ShardDataset,
        batch: int,
        workers: int,
        faults: Faults,
        seed: int | None = None,
        persistent: bool = False,
    ):
        fork = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
        self.ring = None
        if fork:
            self.ring = Ring(workers * AHEAD + KEPT, (batch, *cut.shape), cut.dtype)
        self.index, self.faults = index, faults
        self.reading = torch.zeros(max(1, workers), 2, dtype=torch.int64).share_memory_().numpy()
        _loaders.add(self)
        super().__init__(
            stream(index, cut, seed, self.ring, self.reading),
            batch_size=None,
            collate_fn=_as_it_is,
            sampler=Lent(draws, self.ring) if self.ring else draws,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            persistent_workers=persistent and workers > 0,
            worker_init_fn=_init_worker,
            pin_memory=torch.cuda.is_available() and not self.ring,
            multiprocessing_context="fork" if fork else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers and torch.distributed.is_available() and torch.distributed.is_initialized():
            # Threads of gloo let go of the last collective's tensors. A worker that is forked while one of them
            # enters or leaves Python waits for it for ever (CPython before 3.12).
            time.sleep(SETTLING)
        with explained_deaths():
            for batch in super().__iter__():
                count = len(batch["positions"])
                self.faults.note(count, batch.pop("bad"))
                if self.ring and self.persistent_workers:  # Others are forked again for every iteration.
                    self.ring.pin()
                if self.ring and "slot" in batch:
                    batch["images"] = self.ring.hand_out(batch.pop("slot"), count)
                yield {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in batch.items()}


class Lent(Sampler[MicroBatch]):
    """Draws, each with a slot of the ring."""

    def __init__(self, draws: Sampler[MicroBatch], ring: Ring):
        self.draws, self.ring = draws, ring

    def __len__(self) -> int:
        return len(self.draws)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[MicroBatch]:
        # The loader asks for the first draw when its workers are through with those of an iteration broken off.
        self.ring.take_back()
        for draw in self.draws:
            yield draw._replace(slot=self.ring.lend())


def _as_it_is(batch: Any) -> Batch:
    """torch would make tensors of the arrays in the worker, and pass each on by a file descriptor of its own."""
    return batch


_loaders: weakref.WeakSet[ShardLoader] = weakref.WeakSet()


@contextmanager
def explained_deaths() -> Iterator[None]:
    """A worker that was killed becomes a DataError that names the sample it was at.

    torch raises in the trainer's process the moment it happens, wherever that is.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        message = _cause(error)
        if "DataLoader worker (pid" not in message:
            raise
        pids = re.search(r"\(pid(?:\(s\))? ([\d, ]+)\)", message)
        died = {int(pid) for pid in pids[1].split(",")} if pids else set()
        cause = re.search(r"killed by signal: ([^.]*)|exit(?:ed)? (?:code \d+|unexpectedly)", message)
        at = [
            f"{loader.index.shards[loader.index.locate(sample)[0]]}, sample {loader.index.key(sample)}"
            for loader in _loaders
            for pid, sample in loader.reading.tolist()
            if pid in died
        ]
        raise DataError(
            f"a loader worker died ({cause[0] if cause else message}) while it read {' and '.join(at) or 'a sample'}. "
            "If the machine ran out of memory, lower data.workers or micro_batch; start the same command again."
        ) from None


def _cause(error: Exception) -> str:
    """The message of torch's handler of SIGCHLD, which knows the signal, where another was the first to notice.

    The handler would raise as well, in whatever happened to run then.
    """
    until = time.monotonic() + 1
    noticed_first = not isinstance(error, RuntimeError) or "unexpectedly" in str(error)
    while noticed_first and time.monotonic() < until:
        try:
            torch._C._error_if_any_worker_fails()
        except RuntimeError as cause:
            return str(cause)
        time.sleep(0.01)
    return str(error)


def _init_worker(worker: int) -> None:
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, ShardDataset)
    info.dataset.worker = worker
    info.dataset.reading[worker, 0] = os.getpid()
    quiet_worker(worker)


def quiet_worker(worker: int) -> None:
    """What every worker of a loader begins with."""
    torch.set_num_threads(1)
    # Ctrl-C, torchrun and SLURM signal every process of a run; the trainer alone decides when to stop, and still needs
    # its batches then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_trainer_says_so, daemon=True).start()


def _end_when_the_trainer_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
