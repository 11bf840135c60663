"""From draws to batches of uint8 images."""

import os
import signal
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.decode import decode, image_size
from data.draw import uniforms
from data.errors import DataError
from data.index import ShardIndex
from data.read import read
from data.transforms import DRAWS, Box, centre_crop, flipped, random_resized_crop

Draw = tuple[int, np.ndarray, np.ndarray]  # epoch, positions in it [B], samples [B]
Batch = dict[str, Any]


class ShardStream(Dataset[Batch]):
    """A map from draws to batches: `stream[epoch, positions, samples]`.

    seed     of the random crops and flips, which follow from (seed, epoch, position); None for centre crops
    scale    share of the area that a random crop keeps; keep: share of the shorter side that a centre crop keeps
    returns  images uint8 [B, C, H, W], labels int64 [B] (-1 unknown), positions, samples int64 [B], keys list[str]

    DataError: names the shard, the key and the reason for an image that cannot be read.
    """

    def __init__(
        self,
        index: ShardIndex,
        size: tuple[int, int],
        channels: int,
        *,
        seed: int | None = None,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        keep: float = 1.0,
    ):
        self.index, self.size, self.channels = index, size, channels
        self.seed, self.scale, self.flip, self.keep = seed, scale, flip, keep

    def __getitem__(self, draw: Draw) -> Batch:
        epoch, positions, samples = draw
        images = torch.empty(len(samples), self.channels, *self.size, dtype=torch.uint8)
        draws = [None] * len(samples) if self.seed is None else uniforms(self.seed, epoch, positions, DRAWS).tolist()
        for image, sample, u in zip(images, samples, draws, strict=True):
            self._fill(image, int(sample), u)
        return {
            "images": images,
            "labels": torch.tensor([self.index.label(sample) for sample in samples]),
            "positions": torch.from_numpy(positions),
            "samples": torch.from_numpy(samples),
            "keys": [self.index.key(sample) for sample in samples],
        }

    def _fill(self, image: torch.Tensor, sample: int, u: list[float] | None) -> None:
        shard, offset, size = self.index.locate(sample)
        data = read(self.index.shards[shard], offset, size, self.index.cache)
        try:
            image.copy_(self.cut(data, u))
        except DataError as error:
            raise DataError(
                f"{self.index.shards[shard]}, sample {self.index.key(sample)}: {error}. "
                "Pack the images again: `python -m data.pack` leaves out what cannot be decoded."
            ) from None

    def cut(self, data: bytes, u: list[float] | None) -> torch.Tensor:
        """The crop of an encoded image that the draws u choose, mirrored if they say so; None for the centre."""
        height, width = image_size(data)
        pixels = decode(data, self._box(height, width, u), self.size, self.channels)
        return pixels.flip(-1) if u is not None and self.flip and flipped(u) else pixels

    def _box(self, height: int, width: int, u: list[float] | None) -> Box:
        if u is None:
            return centre_crop(height, width, self.size, self.keep)
        # Relative to the aspect of the result, so that a rectangular one is stretched no more than a square one.
        aspect = self.size[1] / self.size[0]
        return random_resized_crop(height, width, u, self.scale, (3 / 4 * aspect, 4 / 3 * aspect))


def loader(stream: ShardStream, draws: Sampler[Draw] | Iterable[Draw], workers: int, *, persistent: bool) -> DataLoader:
    """torch's loader over the batches of a stream; what it yields does not depend on the number of workers."""
    return DataLoader(
        stream,
        batch_size=None,
        sampler=draws,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=quiet_worker,
        pin_memory=torch.cuda.is_available(),
    )


def quiet_worker(worker: int) -> None:
    # Ctrl-C, torchrun and SLURM signal every process of a run; the trainer alone decides when to stop, and still needs
    # its batches then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_trainer_says_so, daemon=True).start()
    torch.set_num_threads(1)


def _end_when_the_trainer_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
