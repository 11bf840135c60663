"""The images of a data set that a model finds most like a photograph, from what eval.py has kept of them."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mae.demo.model import DemoModel
from mae.probes.feature_cache import FeatureCache, thumbnails_key, weights_fingerprint
from mae.probes.features import Features, Kind
from mae.probes.knn import neighbours


class Neighbour(NamedTuple):
    """An image of the data set.

    image       uint8 [C, h, w]
    label       -1 where there is none
    similarity  cosine
    """

    image: Tensor
    sample: int
    label: int
    similarity: float


class Gallery(NamedTuple):
    """Features [n, D] of images and their thumbnails, uint8 [n, C, h, w]."""

    kind: Kind
    features: Features
    thumbnails: Tensor

    def nearest(self, feature: Tensor, count: int) -> list[Neighbour]:
        """The `count` images that are most like a feature [1, D], nearest first."""
        found = neighbours(self.features.values, feature, count)
        return [
            Neighbour(
                self.thumbnails[row], int(self.features.samples[row]), int(self.features.labels[row]), float(similarity)
            )
            for similarity, row in zip(*(column[0] for column in found), strict=True)
        ]


def kept_features(path: Path) -> Path:
    """Where eval.py checkpoint=PATH keeps features."""
    return (path if path.is_dir() else path.parent) / "eval" / "features"


def open_gallery(model: DemoModel) -> Gallery | None:
    """The newest features of exactly these weights whose images have thumbnails; None where there are none."""
    cache = FeatureCache(kept_features(model.path), 0)
    for key, features in cache.kept(weights=weights_fingerprint(model.encoder)):
        if key["kind"] in ("patches", "class_token"):
            for _, small in cache.kept(**thumbnails_key(key["images"])):
                if torch.isin(small.samples, features.samples).all():
                    return Gallery(key["kind"], features.take(small.samples), small.values)
    return None
