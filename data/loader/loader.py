"""torch's DataLoader over a ShardDataset: forked workers, shared memory, and an error if a worker dies."""

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
from data.loader.dataset import Batch, ShardDataset
from data.loader.faults import Faults
from data.loader.shared_batches import Ring
from data.order.samplers import MicroBatch

PREFETCH_FACTOR = 2  # batches that each worker has under way
EXTRA_SLOTS = 3  # batches that the trainer may hold at a time before new memory is used
SETTLE_SECONDS = 0.2  # before workers are forked beside other ranks

_datasets: weakref.WeakSet[ShardDataset] = weakref.WeakSet()  # those that loaders read from


class ShardLoader(DataLoader[Batch]):
    """The batches of these micro-batches; what it yields does not depend on the number of workers.

    dataset     reads for this loader alone
    max_rows    most images of a batch
    faults      counts the samples that could not be read
    persistent  keeps the workers from one iteration to the next

    Workers write their images into a ring of shared batches, so only one iteration at a time makes sense.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        micro_batches: Sampler[MicroBatch],
        *,
        max_rows: int,
        workers: int,
        faults: Faults,
        persistent: bool = False,
    ):
        fork = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
        self.faults, self.replaces, self.ring = faults, dataset.replace, None
        if fork:
            slots = workers * PREFETCH_FACTOR + EXTRA_SLOTS
            self.ring = Ring(slots, (max_rows, *dataset.spec.shape), dataset.spec.dtype)
        dataset.ring = self.ring
        dataset.reading = torch.zeros(max(1, workers), 2, dtype=torch.int64).share_memory_().numpy()
        _datasets.add(dataset)
        super().__init__(
            dataset,
            batch_size=None,
            collate_fn=_unchanged,
            sampler=SlotSampler(micro_batches, self.ring) if self.ring else micro_batches,
            num_workers=workers,
            prefetch_factor=PREFETCH_FACTOR if workers else None,
            persistent_workers=persistent and workers > 0,
            worker_init_fn=_init_shard_worker,
            pin_memory=torch.cuda.is_available() and not self.ring,
            multiprocessing_context="fork" if fork else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers and torch.distributed.is_available() and torch.distributed.is_initialized():
            # gloo's threads may still release tensors of the last collective. Forking while one of them holds
            # CPython's thread-state lock deadlocks the worker (before 3.12), so let them finish.
            time.sleep(SETTLE_SECONDS)
        with explain_worker_death():
            for batch in super().__iter__():
                count, bad = len(batch["positions"]), batch.pop("bad")
                self.faults.note(count if self.replaces else count + len(bad), bad)
                if self.ring and self.persistent_workers:  # Workers that are not kept are forked again later.
                    self.ring.pin()
                if self.ring and "slot" in batch:
                    batch["images"] = self.ring.hand_out(batch.pop("slot"), count)
                yield {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in batch.items()}


class SlotSampler(Sampler[MicroBatch]):
    """Lends each micro-batch a slot of the ring."""

    def __init__(self, micro_batches: Sampler[MicroBatch], ring: Ring):
        self.micro_batches, self.ring = micro_batches, ring

    def __len__(self) -> int:
        return len(self.micro_batches)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[MicroBatch]:
        # torch asks for the first micro-batch only when its workers are through with an iteration that was broken off.
        self.ring.take_back()
        for micro_batch in self.micro_batches:
            yield micro_batch._replace(slot=self.ring.lend())


def _unchanged(batch: Any) -> Batch:
    """Keeps torch from making tensors of the arrays in the worker and passing each on by a file descriptor."""
    return batch


@contextmanager
def explain_worker_death() -> Iterator[None]:
    """Raises DataError if a worker is killed, and names the sample that it was reading.

    torch raises RuntimeError in the trainer's process the moment it happens, whatever runs there.
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
            f"{dataset.index.shards[dataset.index.shard_of(sample)]}, sample {dataset.index.key(sample)}"
            for dataset in _datasets
            for pid, sample in dataset.reading.tolist()
            if pid in died
        ]
        raise DataError(
            f"a loader worker died ({cause[0] if cause else message}) while it read {' and '.join(at) or 'a sample'}. "
            "If the machine ran out of memory, lower data.workers or micro_batch; start the same command again."
        ) from None


def _cause(error: Exception) -> str:
    """Returns the message of torch's SIGCHLD handler, which knows the signal, even if another part noticed first.

    Waits for it up to a second: otherwise the handler would raise later, in whatever runs then.
    """
    until = time.monotonic() + 1
    noticed_by_another = not isinstance(error, RuntimeError) or "unexpectedly" in str(error)
    while noticed_by_another and time.monotonic() < until:
        try:
            torch._C._error_if_any_worker_fails()
        except RuntimeError as cause:
            return str(cause)
        time.sleep(0.01)
    return str(error)


def _init_shard_worker(worker: int) -> None:
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, ShardDataset)
    info.dataset.worker = worker
    info.dataset.reading[worker, 0] = os.getpid()
    init_worker(worker)


def init_worker(worker: int) -> None:
    """Initialises a worker: one thread, and none of the signals by which a run is stopped."""
    torch.set_num_threads(1)
    # Ctrl-C, torchrun and SLURM signal every process of a run; the trainer alone decides when to stop, and still needs
    # its batches then.
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_trainer, daemon=True).start()


def _exit_on_sigterm_of_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
