"""Ring buffer of batches in memory that the trainer shares with its forked workers."""

import mmap
import os
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Ring:
    """A fixed number of batches, allocated once: workers write into them, the trainer reads what they wrote.

    A slot is lent to a worker, handed out when its batch arrives, and free again when nobody holds a tensor of it.
    torch's own transport would map new memory for every batch and copy it once more to pin it.

    slots         number of batches
    shape, dtype  of one batch

    The memory is anonymous: the size of /dev/shm, which is small in containers, does not limit it.
    """

    def __init__(self, slots: int, shape: tuple[int, ...], dtype: type[np.generic]):
        values = int(np.prod(shape))
        self.memory = mmap.mmap(-1, slots * values * np.dtype(dtype).itemsize)
        self.batches = np.frombuffer(self.memory, dtype).reshape(slots, *shape)
        self.free = deque(range(slots))
        self.lent: set[int] = set()
        self.pinned = False

    def lend(self) -> int | None:
        """Returns a free slot for the next batch; None if all are lent or still held by the trainer."""
        if not self.free:
            return None
        slot = self.free.popleft()
        self.lent.add(slot)
        return slot

    def slot(self, slot: int, count: int) -> Tensor:
        """Returns the first `count` rows of a slot, to be written by a worker."""
        return torch.from_numpy(self.batches[slot, :count])

    def hand_out(self, slot: int, count: int) -> Tensor:
        """Returns the first `count` rows of a slot that a worker has filled. Frees the slot when they are garbage."""
        self.lent.discard(slot)
        rows = self.batches[slot, :count]
        tensor = torch.from_numpy(rows)
        # The tensor's storage keeps `rows` alive, and with it every view of the tensor does.
        weakref.finalize(rows, self.free.append, slot)
        return tensor

    def take_back(self) -> None:
        """Frees the slots lent in an iteration that was broken off: nobody will ask for their batches."""
        self.free.extend(self.lent)
        self.lent.clear()

    def pin(self) -> None:
        """Pins the memory, so that a GPU copies from it while the trainer runs. Call it after all workers were forked:
        what a fork makes of pinned memory is up to the driver."""
        if self.pinned or not torch.cuda.is_initialized():
            return
        runtime: Any = torch.cuda.cudart()
        failed = int(runtime.cudaHostRegister(self.batches.ctypes.data, self.batches.nbytes, 0))
        if failed:
            raise MemoryError(f"{self.batches.nbytes >> 20} MB cannot be pinned (CUDA error {failed})")
        self.pinned = True
        # All views keep the array that frombuffer made alive, and that one keeps the memory.
        weakref.finalize(self.batches.base, _unpin, os.getpid(), self.batches.ctypes.data)


def _unpin(process: int, address: int) -> None:
    """Unpins memory before it is unmapped.

    To the driver an address stays pinned until it is told otherwise, and what is mapped there next cannot be copied
    from ("resource already mapped").
    """
    if process == os.getpid():  # not in a fork, which has no use of CUDA
        runtime: Any = torch.cuda.cudart()
        runtime.cudaHostUnregister(address)
