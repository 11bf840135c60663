"""Nearest training images of a photograph, from the features and thumbnails that probe=neighbours has kept."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae.demo.model import DemoModel
from mae.probes.feature_cache import FeatureCache, thumbnails_key, weights_fingerprint
from mae.probes.features import Features, Kind
from mae.probes.knn import neighbours
from mae.run.of_weights import evaluation_folder


class Neighbour(NamedTuple):
    """A training image.

    image       thumbnail, uint8 [C, h, w]
    name        of its class, else the number of the class or of the image
    similarity  cosine
    """

    image: Tensor
    sample: int
    name: str
    similarity: float


class Gallery(NamedTuple):
    """Features [n, D] of training images, their thumbnails, uint8 [n, C, h, w], and the names of the classes."""

    kind: Kind
    features: Features
    thumbnails: Tensor
    class_names: list[str]

    def nearest(self, feature: Tensor, count: int) -> list[Neighbour]:
        """Returns the `count` images whose features are most similar to one [1, D], nearest first."""
        found = neighbours(self.features.values, feature, count)
        return [
            Neighbour(self.thumbnails[row], int(self.features.samples[row]), self._name(int(row)), float(similarity))
            for similarity, row in zip(*(column[0] for column in found), strict=True)
        ]

    def _name(self, row: int) -> str:
        label = int(self.features.labels[row])
        if label < 0:
            return f"image {int(self.features.samples[row])}"
        return self.class_names[label] if label < len(self.class_names) else f"class {label}"


def open_gallery(model: DemoModel) -> Gallery | None:
    """Returns the newest features of exactly these weights whose images have thumbnails; None if there are none."""
    folder = evaluation_folder(model.path)
    cache = FeatureCache(folder / "features", 0)  # where eval.py checkpoint=PATH keeps them
    for key, features in cache.kept(weights=weights_fingerprint(model.encoder)):
        if key["kind"] in ("patches", "class_token"):
            for _, small in cache.kept(**thumbnails_key(key["images"])):
                if torch.isin(small.samples, features.samples).all():
                    names = _class_names(folder, key["images"])
                    return Gallery(key["kind"], features.take(small.samples), small.values, names)
    return None


def _class_names(folder: Path, images: dict[str, Any]) -> list[str]:
    """Returns the names of the classes that probe=neighbours has left for these images, [] if it has not."""
    for file in (folder / "neighbours.json", *folder.glob("on-*/neighbours.json")):
        with suppress(OSError, ValueError):
            found = json.loads(file.read_text())
            if found.get("images") == images:
                return found["classes"]
    return []
