"""Lightning data module: the settings of the data → the training and validation batches of one rank.

1 open    path or built-in images → index of the training and of the validation shards    data/index, data/pack
2 order   (seed, epoch, position) → sample, by windows of shards or a weighted mixture     data/order
3 rows    step → the micro-batches of this rank                                            data/order/samplers.py
4 load    micro-batch → batch of integers, in worker processes                             data/loader
5 move    batch → device, without waiting for the copy                                     here
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig
from data.errors import DataError, say
from data.images.augment import RandAugment
from data.images.decode import LOST_BITS, has_16_bits
from data.index.classes import class_names, remarks_on_labels
from data.index.index import ShardIndex, open_shards
from data.index.splits import find_shards, has_split
from data.loader.dataset import Batch, CropSpec, ShardDataset
from data.loader.faults import Faults
from data.loader.loader import PREFETCH_FACTOR, ShardLoader
from data.loader.prefetch import PrefetchingSampler
from data.order.mixture import Mixture, shares
from data.order.order import ORDER_VERSION, Order, steps_per_epoch
from data.order.samplers import AllSamples, MicroBatch, MicroBatches, spread
from data.storage.protocols import is_remote

if TYPE_CHECKING:
    from data.loader.streaming import StreamLoader
    from data.order.choice import Choice

FORMATS_OF_8_BITS = (".jpg", ".jpeg", ".webp", ".bmp")


class ShardDataModule(lightning.LightningDataModule):
    """The training and validation batches of one data set.

    Batches are dicts of images uint8 or uint16 [B, C, H, W], labels int64 [B] (-1 unknown), positions int64 [B] in the
    epoch, samples int64 [B] in the index, boxes int32 [B, 4] of the crops, keys list[str] [B]. The images lie in a
    ring whose slots are written again when nobody holds them any more.

    train_index, val_index   the shards; val_index is None where there is nothing to validate on
    order                    of the training samples; its length is the number that an epoch shows
    steps_per_epoch          whole global batches in which each of these is shown `views_per_image` times
    identity                 what the order of the samples depends on beside the seed: kept in checkpoints and compared
    bad_samples              a file for the records of bad samples, or None

    Raises DataError if the shards are bad (see `open_shards`) or hold fewer samples than one global batch.
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
        unit: int | None = None,
        bad_samples: Path | None = None,
    ):
        super().__init__()
        if len(config.mean) != channels:
            raise DataError(
                f"model.in_channels={channels}, but data.mean and data.std have {len(config.mean)} values. "
                "Give one per channel: 1 for grey, 3 for RGB, any other number for .npy and TIFF images of so many."
            )
        if not config.named:
            raise DataError("neither data.path nor data.source is set. Set data.path to shards, or data.source=digits")
        views = config.views_per_image
        self.config, self.seed = config, seed
        self.global_batch, self.micro_batch, self.unit = global_batch, micro_batch, unit
        self.crop = CropSpec(
            image_size,
            channels,
            config.scale,
            config.flip,
            config.val_crop,
            views,
            exact=config.decode == "exact",
            bits=config.bits,
            augment=RandAugment(policy, image_size, config.mean) if (policy := config.rand_augment) else None,
        )
        self.faults = Faults(bad_samples, config.max_bad_fraction)
        path = config.path or _built_in_images(config.source or "digits", config.root)
        self.train_index = _open_training(path, config)
        self.val_index = _open_validation(path, config)
        for part, index in (("training", self.train_index), ("validation", self.val_index)):
            if index is not None and index.passed_over:
                say(f"passed over in the {part} shards: {index.passed_over}")
        self.order = _build_order(config, self.train_index, seed, global_batch // views)
        self.steps_per_epoch = steps_per_epoch(len(self.order), global_batch, views)
        if self.steps_per_epoch == 0:
            by = f" by data.sampling={config.sampling}" if config.sampling else ""
            raise DataError(
                f"{path} has {len(self.order)} training samples{by}, fewer than global_batch={global_batch} takes: "
                f"an epoch would have no step. Set global_batch to at most {len(self.order) * views}, or add images."
            )
        if config.bits == 8 and config.mode == "index":
            _say_lost_bits(self.train_index)
        self._copies: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "order_version": ORDER_VERSION,
            "window": self.config.window,
            "lanes": self.config.lanes,
            "weights": self.config.weights,
            "views_per_image": self.config.views_per_image,
            "fingerprint": self.train_index.fingerprint,
            "samples": len(self.train_index),
        } | ({"sampling": self.sampling} if self.sampling else {})

    @property
    def sampling(self) -> dict[str, Any]:
        """Returns the rule of data.sampling, the images of an epoch, a digest of their probabilities; {} without."""
        orders = self.order.orders if isinstance(self.order, Mixture) else [self.order]
        digests = [order.choice.digest for order in orders if order.choice is not None]
        rule, chosen = self.config.rule.given, len(self.order)
        return {**rule, "images": chosen, "probabilities": " ".join(digests)} if digests else {}

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes by label, of the training and the validation images; [] if no manifest.json has them.

        Raises DataError if the parts number their classes differently.
        """
        indexes = [index for index in (self.train_index, self.val_index) if index is not None]
        return class_names(shard for index in indexes for shard in index.shards)

    def remarks_on_labels(self) -> list[str]:
        """Returns a sentence for each thing about the labels of the two parts that may not be meant."""
        streamed = self.config.mode == "stream"
        return [] if streamed else remarks_on_labels(self.train_index, self.val_index)

    def train_dataloader(self) -> "ShardLoader | StreamLoader":
        trainer = self.trainer
        assert trainer is not None
        return self.train_loader(lambda: trainer.global_step, trainer.global_rank, trainer.world_size)

    def val_dataloader(self) -> ShardLoader | list:
        if self.val_index is None:
            return []
        trainer = self.trainer
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return self.evaluation_loader(self.val_index, self.micro_batch, rank, ranks)

    def train_loader(self, step: Callable[[], int], rank: int = 0, ranks: int = 1) -> "ShardLoader | StreamLoader":
        """Loads the augmented micro-batches of one rank, from the step that `step()` says when an iteration starts."""
        workers, dataset = self.config.workers, self.dataset(self.train_index, self.seed)
        views = self.config.views_per_image
        sizes = (self.global_batch, self.micro_batch)
        micro_batches = MicroBatches(self.order, step, *sizes, rank, ranks, views, self.unit)
        if self.config.mode == "stream":
            from data.loader.streaming import StreamLoader

            return StreamLoader(dataset, micro_batches, workers)
        if any(map(is_remote, self.train_index.shards)):
            micro_batches = PrefetchingSampler(micro_batches, self.train_index, under_way=workers * PREFETCH_FACTOR)
        return ShardLoader(
            dataset,
            micro_batches,
            max_rows=self.micro_batch,
            workers=workers,
            faults=self.faults,
            persistent=True,
        )

    def evaluation_loader(
        self,
        index: ShardIndex,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        samples: np.ndarray | None = None,
        view: int | None = None,
        replace: bool = True,
    ) -> ShardLoader:
        """Loads all samples of an index (or these) once, in order, as centre crops.

        view     random crops and flips in their place, other ones for each number
        replace  as in ShardDataset
        """
        chosen = np.arange(len(index)) if samples is None else samples
        return ShardLoader(
            self.dataset(index, None if view is None else self.seed, replace),
            AllSamples(chosen, batch_size, rank, ranks, view or 0),
            max_rows=batch_size,
            workers=self.config.workers,
            faults=self.faults,
        )

    def dataset(self, index: ShardIndex, seed: int | None = None, replace: bool = True) -> ShardDataset:
        """Returns the data set that loads batches from an index: random crops drawn from `seed`, else centre crops."""
        return ShardDataset(index, self.crop, seed, replace)

    def crops(self, index: ShardIndex, samples: np.ndarray) -> Tensor:
        """Returns centre crops of a few samples, without downloading the whole shards that they are in."""
        return self.dataset(index.without_downloads())[MicroBatch(0, samples, samples)]["images"]

    def examples(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns images and positions of at most `count` centre crops of the validation (else training) samples.

        They are the same for every run on these shards.
        """
        index = self.val_index or self.train_index
        if self.config.mode == "stream" and index is self.train_index:
            from data.loader.streaming import first_samples

            return first_samples(self.dataset(index), count)["images"], torch.arange(count)
        samples = spread(len(index), count)
        return self.crops(index, samples), torch.from_numpy(samples)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copies a batch as Lightning does, and holds its slot of the ring until the device has the copy."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
            self._copies.append((copied, batch["images"]))
            while self._copies and self._copies[0][0].query():
                self._copies.popleft()
        return moved


def _built_in_images(source: str, root: str) -> str:
    """Returns the folder of built-in images, which are packed if it is not there yet."""
    folder = os.path.join(root, "built_in", source)
    if not os.path.exists(folder):
        from data.pack import builtin

        builtin.ensure(source, root)
    return folder


def _open_training(path: str | list[str], config: DataConfig) -> ShardIndex:
    """Opens the training shards; those of data.mode=stream have names alone."""
    if config.mode == "stream" and config.samples:
        from data.loader.streaming import StreamShards  # with webdataset, for the few who stream

        return StreamShards(path, config.samples, config.image, config.maps)
    return open_shards(path, "train", config.shard_cache, config.image, config.maps)


def _open_validation(path: str | list[str], config: DataConfig) -> ShardIndex | None:
    """Opens the val part, else the test part, of `val_path` or of `path`.

    Without parts returns all of `val_path`, or None if only `path` is set.
    """
    paths = config.val_path or path
    split = next((split for split in ("val", "test") if has_split(paths, split)), None)
    if split or config.val_path:
        return open_shards(paths, split or "val", config.shard_cache, config.image, config.maps)
    return None


def _say_lost_bits(index: ShardIndex) -> None:
    """Says if images have 16 bits, of which 8 would be kept. Looks at a few that may have them, or at one."""
    index, looked_at = index.without_downloads(), 1 if any(map(is_remote, index.shards)) else 8
    for sample in spread(len(index), looked_at).tolist():
        shard, offset, size = index.locate(sample)
        name = next(member.name for member in index.members(sample) if member.offset == offset)
        if name.lower().endswith(FORMATS_OF_8_BITS):
            continue
        # A sample that cannot be read is reported when its turn comes.
        with contextlib.suppress(DataError, OSError):
            if is_remote(tar := index.shards[shard]):
                data = index.read(sample)
            else:
                with open(tar, "rb") as file:  # not `read`, which keeps it open: it may be replaced before training
                    data = os.pread(file.fileno(), size, offset)
            if has_16_bits(data):
                say(f"{name} {LOST_BITS}")
                return


def _build_order(config: DataConfig, index: ShardIndex, seed: int, batch: int) -> Order | Mixture:
    """Builds the order of the training samples; `batch` of them make a global batch."""
    choose = _open_choice(config, index, seed)

    def order(first: int, stop: int, batch: int) -> Order:
        """Returns the order of the samples of these shards."""
        return Order(index.sizes[first:stop], seed, config.window, config.lanes, batch, choose(first, stop))

    if config.weights is None or not isinstance(config.path, list):
        return order(0, len(index.shards), batch)
    opened = set(index.shards)  # all but those without any file
    ends = np.cumsum([len(opened.intersection(find_shards(path, "train"))) for path in config.path]).tolist()
    counts = shares(config.weights, batch)
    return Mixture([order(*shards, count) for shards, count in zip(pairwise([0, *ends]), counts, strict=True)], counts)


def _open_choice(config: DataConfig, index: ShardIndex, seed: int) -> Callable[[int, int], "Choice | None"]:
    """Returns what makes the choice of samples among shards first … stop - 1: None without data.sampling."""
    if config.sampling is None:
        return lambda first, stop: None
    from data.index.sample_table import SampleTable
    from data.order.choice import ONE, Choice

    table, rule = SampleTable(config.sampling, index), config.rule
    table.refuse_unknown(rule)
    return lambda first, stop: Choice(
        index.sizes[first:stop], lambda shard: table.probabilities(first + shard, rule, ONE), seed
    )
