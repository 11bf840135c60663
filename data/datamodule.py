"""Batches for training and validation: what the Lightning trainer asks for."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import lightning
import numpy as np
from pydantic import BaseModel, Field, model_validator
from torch.utils.data import DataLoader, Sampler

from data import builtin
from data.cache import ShardCache
from data.errors import DataError
from data.index import ShardIndex, open_shards
from data.order import ORDER_VERSION, Order, usable
from data.prefetch import ahead
from data.splits import has_split
from data.stream import Batch, Draw, ShardStream, loader
from data.webdataset_stream import StreamLoader, StreamShards, first_samples


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """Which images, and how they are cut. `path` wins over `source`; without `val_path` the val or test part of
    `path` is used, if it has one.
    """

    source: Literal["digits", "photos"] | None = None  # built-in images, packed into `root` on first use
    root: str = "datasets"
    path: str | list[str] | None = None  # a folder, a glob, a list, URLs; of a folder with parts the train part
    val_path: str | list[str] | None = None
    mode: Literal["index", "stream"] = "index"  # stream: for what cannot be indexed, see data/webdataset_stream.py
    samples: int | None = Field(default=None, ge=1)  # in an epoch, for mode stream only
    cache: str | None = None  # folder for copies of remote shards, on a disk of the machine; None: see data/cache.py
    cache_gb: float | None = Field(default=None, gt=0)  # 10^9 bytes of copies; None: as much as the disk holds
    workers: int = Field(default=2, ge=0)
    window: int = Field(default=16, ge=1)  # shards that are mixed at a time
    scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that a random crop keeps
    flip: bool = True
    val_crop: float = Field(default=1.0, gt=0, le=1)  # share of the shorter side that the centre crop keeps
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if not self.path and not self.source:
            raise ValueError("neither path nor source is set. Set data.path to shards, or data.source=digits")
        if (self.mode == "stream") != (self.samples is not None):
            raise ValueError("mode=stream and samples go together: a stream has no length. Set both or neither of them")
        if self.mode == "stream" and not self.path:
            raise ValueError("mode=stream has no path. Set data.path to commands (pipe:…) or URLs")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={list(self.scale)} has to be two rising shares of the area, 0 < low <= high <= 1")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} channels and std {len(self.std)}. Give one of each per channel"
            )
        if min(self.std, default=0) <= 0:
            raise ValueError(f"std={list(self.std)} has to be positive in each channel")
        return self

    @property
    def shard_cache(self) -> ShardCache:
        return ShardCache(self.cache, self.cache_gb and self.cache_gb * 1e9)


class MicroBatches(Sampler[Draw]):
    """The draws of one rank's micro-batches, from the present step to the end of its epoch.

    The global batch of step s of an epoch is its positions [s·G, (s+1)·G). Of it, micro-batch j of rank r of R takes
    the rows [(j·R + r)·M, (j·R + r + 1)·M), so that the union over the ranks is the same for every R and M.

    step    asked when an iteration starts: nothing has to be saved to carry on
    """

    def __init__(
        self, order: Order, step: Callable[[], int], global_batch: int, micro_batch: int, rank: int = 0, ranks: int = 1
    ):
        assert global_batch % (micro_batch * ranks) == 0, f"{global_batch} over {ranks} ranks of {micro_batch}"
        self.order, self.step = order, step
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.ranks = rank, ranks
        self.steps_per_epoch = usable(len(order), global_batch) // global_batch
        self.accumulate = global_batch // (micro_batch * ranks)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[Draw]:
        # The trainer's current_epoch is one behind at the edge of an epoch, its global_step is right.
        epoch, step = divmod(self.step(), self.steps_per_epoch)
        for first in range(step * self.global_batch, self.steps_per_epoch * self.global_batch, self.global_batch):
            for j in range(self.accumulate):
                start = first + (j * self.ranks + self.rank) * self.micro_batch
                stop = start + self.micro_batch
                yield epoch, np.arange(start, stop), self.order.samples(epoch, start, stop)


class AllSamples(Sampler[Draw]):
    """Every sample of an index (or at most `at_most`, evenly spread) once, in order, over the ranks together; positions
    are sample numbers.

    Each rank gets the same number of batches, their sizes differ by one at most: a rank without a batch would leave
    the others waiting where a forward pass is collective.
    """

    def __init__(self, samples: int, batch: int, rank: int = 0, ranks: int = 1, at_most: int | None = None):
        chosen = spread(samples, at_most or samples)
        batches = math.ceil(len(chosen) / (batch * ranks)) * ranks
        self.draws = np.array_split(chosen, batches)[rank::ranks]

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[Draw]:
        for samples in self.draws:
            yield 0, samples, samples


def spread(samples: int, count: int) -> np.ndarray:
    """At most `count` of the numbers 0 ... samples - 1, evenly spread."""
    return np.linspace(0, samples - 1, min(count, samples)).round().astype(np.int64)


class ShardDataModule(lightning.LightningDataModule):
    """The training and validation batches of one data set.

    Batches are dicts of images uint8 [B, C, H, W], labels int64 [B] (-1 unknown), positions int64 [B] in the epoch,
    samples int64 [B] in the index, keys list[str] [B].

    train_index, val_index   the shards; val_index is None where there is nothing to validate on
    steps_per_epoch          whole global batches in an epoch
    identity                 what the order of the samples depends on beside the seed: kept in checkpoints and compared

    DataError: bad shards (see `open_shards`), or fewer samples than one global batch.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image_size: tuple[int, int],
        channels: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
    ):
        super().__init__()
        if channels not in (1, 3) or len(config.mean) != channels:
            raise DataError(
                f"the model takes {channels} channels, data.mean and data.std have {len(config.mean)}. "
                "Images are read as grey (1) or RGB (3): set all of them to the same number."
            )
        self.config, self.image_size, self.channels, self.seed = config, image_size, channels, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        path = config.path or builtin.ensure(config.source or "digits", config.root)
        self.train_index = (
            StreamShards(path, config.samples)
            if config.mode == "stream" and config.samples
            else open_shards(path, "train", config.shard_cache)
        )
        self.val_index = validation_shards(path, config)
        self.order = Order(self.train_index.sizes, seed, config.window)
        self.steps_per_epoch = len(self.order) // global_batch
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{path} has {len(self.order)} training samples, fewer than global_batch={global_batch}: an epoch "
                f"would have no step. Set global_batch to at most {len(self.order)}, or add images."
            )

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "order_version": ORDER_VERSION,
            "window": self.config.window,
            "fingerprint": self.train_index.fingerprint,
            "samples": len(self.train_index),
        }

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        return self.train_loader(lambda: trainer.global_step, trainer.global_rank, trainer.world_size)

    def val_dataloader(self) -> DataLoader | list:
        if self.val_index is None:
            return []
        trainer = self.trainer
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return self.frozen_loader(self.val_index, self.micro_batch, rank, ranks)

    def train_loader(self, step: Callable[[], int], rank: int = 0, ranks: int = 1) -> DataLoader:
        """The augmented micro-batches of one rank, from the step that `step()` says when an iteration starts."""
        config = self.config
        stream = ShardStream(
            self.train_index, self.image_size, self.channels, seed=self.seed, scale=config.scale, flip=config.flip
        )
        draws = MicroBatches(self.order, step, self.global_batch, self.micro_batch, rank, ranks)
        if config.mode == "stream":
            return StreamLoader(stream, draws, config.workers)
        return loader(stream, ahead(draws, self.order, self.train_index, rank), config.workers, persistent=True)

    def frozen_loader(
        self, index: ShardIndex, batch_size: int, rank: int = 0, ranks: int = 1, at_most: int | None = None
    ) -> DataLoader:
        """All samples of an index (or at most `at_most`, evenly spread) once, in order, as centre crops."""
        stream = ShardStream(index, self.image_size, self.channels, keep=self.config.val_crop)
        draws = AllSamples(len(index), batch_size, rank, ranks, at_most)
        return loader(stream, draws, self.config.workers, persistent=False)

    def examples(self, count: int) -> Batch:
        """At most `count` centre crops spread over the validation (else the training) images: always the same ones."""
        index = (self.val_index or self.train_index).sparing()
        samples = spread(len(index), count)
        stream = ShardStream(index, self.image_size, self.channels, keep=self.config.val_crop)
        return first_samples(stream, count) if isinstance(index, StreamShards) else stream[0, samples, samples]


def validation_shards(path: str | list[str], config: DataConfig) -> ShardIndex | None:
    """The val part, else the test part, of `val_path` or of `path`; without parts all of `val_path`, none of `path`."""
    source = config.val_path or path
    split = next((split for split in ("val", "test") if has_split(source, split)), None)
    return open_shards(source, split or "val", config.shard_cache) if split or config.val_path else None
