"""Map-style dataset: the samples of one micro-batch → a batch of whole photographs, each in a square frame.

Samples are located, read and replaced as in data/loader/dataset.py. In the place of crop and augmentation the whole
photograph is scaled, and mirrored, into a square, top left: SAM's input.
"""

from typing import Any

import numpy as np
from torch import Tensor

from data.images import decode
from data.index.index import ShardIndex
from data.loader.dataset import Batch, CropSpec, ShardDataset, Uniforms


def fit(height: int, width: int, side: int) -> tuple[int, int]:
    """Returns (height, width) of a photograph whose longer side becomes `side`, rounded as segment-anything does."""
    scale = side / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def lay_into_frame(rows: Tensor, data: bytes, header: decode.Header, inside: tuple[int, int], mirrored: bool) -> None:
    """Writes a photograph into `rows` [1, 3, S, S], zero beside it; `inside` is its (height, width) there."""
    box = (0, 0, header.height, header.width)
    (image,) = decode.decode(data, header, [box], inside, exact=True, filter="bilinear")
    rows.zero_()
    rows[0, :, : inside[0], : inside[1]] = image.flip(-1) if mirrored else image


class PhotographDataset(ShardDataset):
    """Map-style dataset over indexed shards: micro-batch → batch of whole photographs.

    side  of the frame in pixels
    flip  mirror half of the training photographs

    returns  images Tensor uint8 [B, 3, S, S], zero outside the photographs; arrays inside int64 [B, 2] (height, width
             in the frame), labels int64 [B]; positions, samples, keys, bad as in ShardDataset
    """

    def __init__(self, index: ShardIndex, side: int, flip: bool, seed: int | None = None, replace: bool = True):
        super().__init__(index, CropSpec((side, side), flip=flip), seed, replace)

    def _load(self, rows: Tensor, sample: int, uniforms: Uniforms) -> tuple[int, int]:
        """Writes one photograph into `rows` [1, 3, S, S] and returns its height and width there."""
        data = self.index.read(sample)
        header = decode.read_header(data)
        inside = fit(header.height, header.width, self.spec.size[0])
        mirrored = uniforms is not None and self.spec.flip and uniforms[0][0] < 0.5
        lay_into_frame(rows, data, header, inside, mirrored)
        return inside

    def _collate(self, samples: np.ndarray, loaded: list[Any]) -> Batch:
        """Returns labels and sizes of a batch, `loaded` being the size of each photograph in the frame."""
        return {
            "labels": np.array([self.index.label(sample) for sample in samples], np.int64),
            "inside": np.array(loaded, np.int64).reshape(-1, 2),
        }
