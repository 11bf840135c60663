"""Checkpoint writing: whole or not at all, and in training beside the steps that follow."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from mae.atomic import write_atomically
from mae.errors import CheckpointError

USUAL = 20  # seconds for saving, of the half a minute that most schedulers leave between a warning and the end
SAMPLE = 64 * 2**20  # bytes written to find out how fast the disk is


def write_checkpoint(contents: dict[str, Any], path: Path) -> None:
    """Writes a file of torch.save atomically (`write_atomically`).

    Raises CheckpointError if it cannot be written (disk full, quota, limit of the file size).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary, open(temporary, "wb") as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:
        # torch replaces the OSError by a RuntimeError of its own.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(reason, OSError):
            raise
        raise CheckpointError(f"{path} cannot be written ({reason.strerror})") from reason


def seconds_to_write(size: int, folder: Path) -> float:
    """Estimates how long a checkpoint of `size` bytes takes to write, by writing up to 64 MiB into the folder.

    Makes no folder: one that does not exist yet is taken to lie on the disk of the next above it.

    Raises CheckpointError if nothing can be written there.
    """
    folder = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    sample = max(1, min(size, SAMPLE))
    noise = torch.frombuffer(bytearray(os.urandom(sample)), dtype=torch.uint8)  # which no file system makes smaller
    path = folder / "step-speed.ckpt.tmp"  # a name that the next start removes, should this one be killed
    since = time.perf_counter()
    try:
        write_checkpoint({"noise": noise}, path)
        seconds = time.perf_counter() - since
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Make room for checkpoints and start the same command again") from error
    finally:
        path.unlink(missing_ok=True)
    return seconds * size / sample


def refuse_full_disk(size: int, folder: Path) -> None:
    """Raises CheckpointError if the folder has no room for the next checkpoint, of `size` bytes."""
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < size:  # some network folders report nothing
        raise CheckpointError(
            f"{folder} has room for {disk.free / 1e9:.3g} GB, and the next checkpoint takes {size / 1e9:.3g} GB. "
            "Make room and start the same command again"
        )


def describe_saving(size: int, every: int, folder: Path) -> str:
    """Returns the size of a checkpoint, how often one is saved and how long it takes to write (`seconds_to_write`)."""
    seconds = seconds_to_write(size, folder)
    notice = f"; a warning before the end has to leave {2 * seconds:.0f} s and a step" if 2 * seconds > USUAL else ""
    amount = f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
    return f"{amount} every {every:,} steps, {seconds:.2g} s each beside the training{notice}"


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint writer: copies to host memory, then writes the copy in a thread while training goes on.

    One checkpoint at a time: `save_checkpoint` waits for the one before. The host memory (pinned beside a GPU) is used
    again for the next copy. A program that ends by an error or a signal still writes what it has begun.

    seconds  that the latest checkpoint took to write, without the copy
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.under_way: Future[None] | None = None
        self.buffers: list[Tensor] = []
        self.seconds = 0.0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.wait()
        copy = self._copy_to_host(checkpoint)
        self.under_way = self.thread.submit(self._write, copy, Path(path))

    def then(self, work: Callable[[], None]) -> None:
        """Has the thread do `work` once the latest checkpoint is on disk; never if it could not be written."""
        assert self.under_way is not None
        self.under_way = self.thread.submit(_after, self.under_way, work)

    @property
    def failed(self) -> bool:
        """True once it is known that the latest checkpoint could not be written. Does not wait."""
        return self.under_way is not None and self.under_way.done() and self.under_way.exception() is not None

    def wait(self) -> None:
        """Waits until the latest checkpoint is on disk. Raises CheckpointError if it could not be written."""
        under_way, self.under_way = self.under_way, None
        if under_way is not None:
            under_way.result()

    def _write(self, copy: dict[str, Any], path: Path) -> None:
        since = time.perf_counter()
        write_checkpoint(copy, path)
        self.seconds = time.perf_counter() - since

    def _copy_to_host(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Copies all tensors and containers: the training changes them in place."""
        before, self.buffers = iter(self.buffers), []
        devices = set[torch.device]()

        def copy(tensor: Tensor) -> Tensor:
            buffer = _buffer_for(tensor, before)
            self.buffers.append(buffer.copy_(tensor, non_blocking=tensor.is_cuda))
            devices.add(tensor.device)
            return buffer

        with torch.no_grad():
            copied = apply_to_collection(checkpoint, Tensor, copy)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return copied


def _buffer_for(tensor: Tensor, before: Iterator[Tensor]) -> Tensor:
    """Returns host memory for a tensor: that of the checkpoint before, whose tensors came in the same order."""
    buffer = next(before, None)
    if buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype):
        return buffer
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _after(before: Future[None], work: Callable[[], None]) -> None:
    before.result()
    work()
