"""Images of an evaluation: training and test samples by their numbers, the same on every machine.

An image that cannot be read is missing, and none takes its place, so that each counts once.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.datamodule import ShardDataModule
from data.errors import DataError
from data.index.classes import read_classes
from data.index.index import ShardIndex
from data.index.naming import read_naming
from data.label_maps import MappedPhotographs, Photograph, Size, Target, load, require_extension
from data.loader.dataset import Batch
from data.order.samplers import MicroBatch, spread


class EvaluationImages:
    """The splits "train" and "test" of `data`, as one rank reads them; the test images are its validation images.

    batch_size  of one rank
    """

    def __init__(self, data: ShardDataModule, batch_size: int, rank: int = 0, ranks: int = 1):
        self.data, self.batch_size, self.rank, self.ranks = data, batch_size, rank, ranks
        self._digests: dict[str, str] = {}

    def has(self, split: str) -> bool:
        return split == "train" or self.data.val_index is not None

    def index(self, split: str) -> ShardIndex:
        index = self.data.train_index if split == "train" else self.data.val_index
        if index is None:
            raise DataError("there are no test images: set data.val_path")
        return index

    def samples(self, split: str, at_most: int | None) -> Tensor:
        """Returns the numbers of all samples, or of `at_most` evenly spread ones, ascending."""
        index = self.index(split)
        return torch.from_numpy(spread(len(index), at_most or len(index)))

    def labels(self, split: str, samples: Tensor) -> Tensor:
        """Returns the classes, -1 where there is none, without decoding."""
        return torch.from_numpy(self.index(split).labels[samples.numpy()])

    def explain_label(self, split: str, sample: int) -> str:
        """Says why a sample has no label."""
        return self.index(split).explain_label(sample)

    def class_names(self, *splits: str) -> list[str]:
        """Returns the names of the classes by label, [] if no manifest.json has them or these parts do not agree."""
        return self._classes(splits)[0]

    def differing_classes(self, *splits: str) -> str:
        """Says where these parts number their classes differently, "" if they agree."""
        return self._classes(splits)[1]

    def _classes(self, splits: tuple[str, ...]) -> tuple[list[str], str]:
        return read_classes(shard for split in splits for shard in self.index(split).shards)

    def remarks_on_labels(self) -> list[str]:
        """Returns a sentence for each thing about the labels of both parts that may not be meant."""
        return self.data.remarks_on_labels()

    def keys(self, split: str, samples: Tensor) -> list[str]:
        """Returns the keys of some samples."""
        return [self.index(split).key(sample) for sample in samples.tolist()]

    def crops(self, split: str, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Returns centre crops uint8 or uint16 [B, C, H, W] of a few samples, and bool [B]: which could be read.

        Those that could not are black.
        """
        batch = read_now(self.data, self.index(split), samples.numpy())
        there = np.isin(samples.numpy(), batch["positions"])
        found = batch["images"].numpy()
        images = np.zeros((len(samples), *found.shape[1:]), found.dtype)
        images[there] = found
        return torch.from_numpy(images), torch.from_numpy(there)

    def explain_unreadable(self, split: str, sample: int) -> str:
        """Says why a sample cannot be read."""
        return explain_unreadable(self.data, self.index(split), sample)

    def batches(self, split: str, samples: Tensor, view: int | None = None) -> Iterable[Batch]:
        """Loads this rank's share of the samples: centre crops, or random crops and flips that follow from `view`."""
        return self.data.evaluation_loader(
            self.index(split), self.batch_size, self.rank, self.ranks, samples.numpy(), view, replace=False
        )

    def lacks_maps(self, target: Target) -> str:
        """Says why there are no maps of classes or depth, "" if their extension is set."""
        try:
            require_extension(self.data, target)
        except DataError as error:
            return str(error)
        return ""

    def naming(self, split: str) -> tuple[list[str], int | None]:
        """Returns the names of the classes in label maps, [] if unknown, and the number that stands for none."""
        found = read_naming(self.index(split).shards)
        return found.names, found.void

    def photographs(
        self, split: str, samples: Tensor, target: Target, size: Callable[[int, int], Size], unit: float = 1.0
    ) -> Iterator[Photograph | None]:
        """Loads this rank's share of whole photographs with their maps, each rank equally many: the last may be None.

        size, unit  as of MappedPhotographs
        """
        share = samples.numpy()[self.rank :: self.ranks]
        missing = -(-len(samples) // self.ranks) - len(share)
        photographs = MappedPhotographs(self.data, self.index(split), share, target, size, unit)
        return itertools.chain(load(photographs, self.data.config.workers), itertools.repeat(None, missing))

    def identity(self, split: str, view: int | None = None) -> dict[str, Any]:
        """Returns everything that pixels and label of a sample depend on, as the key of cached features."""
        config, crop = self.data.config, self.data.crop
        identity = {
            "fingerprint": self.index(split).fingerprint,
            "labels": self._label_digest(split),  # which a pack with other numbers changes alone
            "size": list(crop.size),
            "channels": crop.channels,
            "val_crop": crop.keep,
            "exact": crop.exact,
            "bits": crop.bits,
            "mean": list(config.mean),
            "std": list(config.std),
        }
        if view is None:
            return identity
        return identity | {"view": view, "seed": self.data.seed, "scale": list(crop.scale), "flip": crop.flip}

    def _label_digest(self, split: str) -> str:
        if split not in self._digests:
            self._digests[split] = hashlib.sha256(self.index(split).labels.tobytes()).hexdigest()[:16]
        return self._digests[split]


def read_now(data: ShardDataModule, index: ShardIndex, samples: np.ndarray) -> Batch:
    """Reads a few samples in this process; "bad" holds a record of each that cannot be read."""
    return data.dataset(index.without_downloads(), replace=False)[MicroBatch(0, samples, samples)]


def explain_unreadable(data: ShardDataModule, index: ShardIndex, sample: int) -> str:
    """Says why a sample cannot be read."""
    bad = read_now(data, index, np.array([sample]))["bad"]
    return bad[0]["reason"] if bad else "now it can"


def left_out_sentence(part: str, keys: Sequence[str], of: int, reason: str = "") -> str:
    """Says which images cannot be read, and of how many of this part.

    reason  why the first cannot
    """
    named = [f"{keys[0]} ({reason})" if reason else keys[0], *keys[1:5]]
    return (
        f"left out, because they cannot be read: {len(keys):,} of {of:,} images of {part}: "
        f"{', '.join(named)}{' …' if len(keys) > 5 else ''}"
    )
