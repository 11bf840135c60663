"""The images of an evaluation: training and test samples by their numbers, the same on every machine."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from data.datamodule import ShardDataModule
from data.errors import DataError
from data.index.index import ShardIndex
from data.loader.dataset import Batch
from data.order.samplers import spread

Split = Literal["train", "test"]


class EvaluationImages:
    """One rank's view of the training and the test images of `data`; test are its validation images.

    batch_size  of a rank
    """

    def __init__(self, data: ShardDataModule, batch_size: int, rank: int = 0, ranks: int = 1):
        self.data, self.batch_size, self.rank, self.ranks = data, batch_size, rank, ranks

    def has(self, split: Split) -> bool:
        return split == "train" or self.data.val_index is not None

    def index(self, split: Split) -> ShardIndex:
        index = self.data.train_index if split == "train" else self.data.val_index
        if index is None:
            raise DataError("there are no test images: set data.val_path")
        return index

    def samples(self, split: Split, at_most: int | None) -> Tensor:
        """The numbers of all samples, or of at most so many, evenly spread, ascending."""
        index = self.index(split)
        return torch.from_numpy(spread(len(index), at_most or len(index)))

    def labels(self, split: Split, samples: Tensor) -> Tensor:
        """Classes, -1 where there is none; nothing is decoded."""
        index = self.index(split)
        return torch.tensor([index.label(sample) for sample in samples.tolist()])

    def crops(self, split: Split, samples: Tensor) -> Tensor:
        """Centre crops uint8 or uint16 [B, C, H, W] of a few samples."""
        return self.data.crops(self.index(split), samples.numpy())["images"]

    def batches(self, split: Split, samples: Tensor, view: int | None = None) -> Iterable[Batch]:
        """This rank's share of the samples, as centre crops or under random crops and flips that follow from `view`."""
        return self.data.evaluation_loader(
            self.index(split), self.batch_size, self.rank, self.ranks, samples.numpy(), view
        )

    def identity(self, split: Split, view: int | None = None) -> dict[str, Any]:
        """Everything that the pixels of a sample depend on."""
        config, cut = self.data.config, self.data.cut
        identity = {
            "fingerprint": self.index(split).fingerprint,
            "size": list(cut.size),
            "channels": cut.channels,
            "val_crop": cut.keep,
            "exact": cut.exact,
            "bits": cut.bits,
            "mean": list(config.mean),
            "std": list(config.std),
        }
        if view is None:
            return identity
        return identity | {"view": view, "seed": self.data.seed, "scale": list(cut.scale), "flip": cut.flip}
