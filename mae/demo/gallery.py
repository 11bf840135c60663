"""Nearest training images of a photograph, from the features and thumbnails that probe=neighbours has kept."""

from typing import NamedTuple

import torch
from torch import Tensor

from mae.demo.model import DemoModel
from mae.probes.feature_cache import FeatureCache, thumbnails_key, weights_fingerprint
from mae.probes.features import Features, Kind
from mae.probes.knn import neighbours


class Neighbour(NamedTuple):
    """A training image.

    image       thumbnail, uint8 [C, h, w]
    label       -1 if there is none
    similarity  cosine
    """

    image: Tensor
    sample: int
    label: int
    similarity: float


class Gallery(NamedTuple):
    """Features [n, D] of training images and their thumbnails, uint8 [n, C, h, w]."""

    kind: Kind
    features: Features
    thumbnails: Tensor

    def nearest(self, feature: Tensor, count: int) -> list[Neighbour]:
        """Returns the `count` images whose features are most similar to one [1, D], nearest first."""
        found = neighbours(self.features.values, feature, count)
        return [
            Neighbour(
                self.thumbnails[row], int(self.features.samples[row]), int(self.features.labels[row]), float(similarity)
            )
            for similarity, row in zip(*(column[0] for column in found), strict=True)
        ]


def open_gallery(model: DemoModel) -> Gallery | None:
    """Returns the newest features of exactly these weights whose images have thumbnails; None if there are none."""
    folder = model.path if model.path.is_dir() else model.path.parent
    cache = FeatureCache(folder / "eval" / "features", 0)  # where eval.py checkpoint=PATH keeps them
    for key, features in cache.kept(weights=weights_fingerprint(model.encoder)):
        if key["kind"] in ("patches", "class_token"):
            for _, small in cache.kept(**thumbnails_key(key["images"])):
                if torch.isin(small.samples, features.samples).all():
                    return Gallery(key["kind"], features.take(small.samples), small.values)
    return None
