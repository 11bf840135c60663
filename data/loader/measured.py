"""Batches of centre crops together with the size and the colour entropy of each image."""

from typing import Any

import numpy as np
from torch import Tensor

from data.images.decode import read_header
from data.images.entropy import colour_entropy
from data.loader.dataset import Batch, ShardDataset, Uniforms


class MeasuredDataset(ShardDataset):
    """A ShardDataset whose batches also hold sizes int64 [B], pixels of the shorter side, and entropies float32 [B].

    The entropy, in bits, is that of the crop: what the model sees.
    """

    def _load(self, rows: Tensor, sample: int, uniforms: Uniforms) -> Any:
        data = self.index.read(sample)
        boxes = self.decode_views(rows, data, uniforms)
        header = read_header(data, self.spec.channels)
        return boxes, min(header.height, header.width), colour_entropy(rows[0].numpy())

    def _collate(self, samples: np.ndarray, loaded: list[Any]) -> Batch:
        return {
            **super()._collate(samples, [boxes for boxes, _, _ in loaded]),
            "sizes": np.array([size for _, size, _ in loaded], np.int64),
            "entropies": np.array([entropy for _, _, entropy in loaded], np.float32),
        }
