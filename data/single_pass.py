"""Every image once: those of shards, or of a plain folder, which is not packed.

1 number  the files of a folder, as an index numbers the samples of shards
2 load    centre crops in order; an image that cannot be read is missing, and none takes its place
"""

import hashlib
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from data.errors import DataError
from data.index.index import ShardIndex
from data.index.passed_over import PassedOver
from data.loader.dataset import CropSpec, ShardDataset
from data.loader.faults import Faults
from data.loader.loader import ShardLoader
from data.order.samplers import AllSamples
from data.pack.image_folder import find_images


class Photographs(ShardIndex):
    """Stands in for the index of shards: the images of a folder, by their paths; sub-folders are classes.

    class_names  of the sub-folders, by label
    fingerprint  of paths and lengths

    Raises DataError if there is no image, or the sub-folders are splits.
    """

    def __init__(self, folder: str):
        self.passed_over = PassedOver()
        source = find_images(Path(folder), None, self.passed_over)
        self.files, self.class_names = source.samples, source.classes
        self.shards, self.sizes, self.ends = [folder], np.array([len(self.files)]), [len(self.files)]
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(f"{file.origin} {os.stat(f'{folder}/{file.origin}').st_size}\n"))
        self.fingerprint = digest.hexdigest()

    def read(self, sample: int) -> bytes:
        try:
            return self.files[int(sample)].read()
        except OSError as error:
            raise DataError(f"{self.key(sample)} cannot be read: {error.strerror}") from None

    def key(self, sample: int) -> str:
        return self.files[int(sample)].origin

    def label(self, sample: int) -> int:
        label = self.files[int(sample)].label
        return -1 if label is None else label

    @property
    def labels(self) -> np.ndarray:
        return np.array([self.label(sample) for sample in range(len(self))], np.int64)

    def _record(self, sample: int) -> NoReturn:
        raise DataError(f"{self.key(sample)} is a file of its own and lies in no shard")


def is_plain_folder(path: Any) -> bool:
    """Returns whether a path is a folder of this machine without tars in it or in its sub-folders."""
    if not isinstance(path, str) or not os.path.isdir(path):
        return False
    return not any(any(Path(path).glob(pattern)) for pattern in ("*.tar*", "*/*.tar*"))


def read_once(
    index: ShardIndex,
    crop: CropSpec,
    samples: np.ndarray,
    batch: int,
    workers: int,
    dataset: type[ShardDataset] = ShardDataset,
) -> ShardLoader:
    """Loads these samples once, in order; those that cannot be read are missing in their batch."""
    return ShardLoader(
        dataset(index, crop, replace=False),
        AllSamples(samples, batch),
        max_rows=batch,
        workers=workers,
        faults=Faults(None, 1.0),
    )
