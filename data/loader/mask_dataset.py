"""From draws to batches of whole photographs with instance masks, for segmentation."""

from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from data.images import decode, masks
from data.index.index import ShardIndex
from data.loader.dataset import Batch, Cut, ShardDataset
from data.loader.shared_batches import Ring
from data.order.hashing import key, permutation, uniforms
from data.order.samplers import MicroBatch, spread
from data.storage.read import read


class Frame(NamedTuple):
    """The square that a photograph is laid into, top left, its longer side filling it.

    side             of the square in pixels
    masks_per_image  at most, drawn for training, evenly spread otherwise; None: all of them, at the resolution of the
                     photograph, and one photograph in a batch
    stride           pixels per cell of the masks: 4 is the resolution that SAM's mask decoder answers in
    flip             mirror half of the training images
    min_area         share of the frame that an object of a training image covers, unless all of its are smaller
    """

    side: int
    masks_per_image: int | None = 64
    stride: int = 4
    flip: bool = True
    min_area: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.side, self.side

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint8


class Annotated(NamedTuple):
    """What goes with one image of a batch."""

    inside: tuple[int, int]  # height, width of the photograph in the frame
    original: tuple[int, int]  # height, width of the photograph that the masks are of
    masks: np.ndarray  # bool [N, side / stride, side / stride], or [N, height, width]
    numbers: np.ndarray  # int64 [N], of the annotations in the record


def fit(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) of a photograph whose longer side is brought to `side`, rounded as segment-anything does."""
    scale = side / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


class MaskDataset(ShardDataset):
    """A map from draws to batches of photographs with masks.

    returns  images Tensor uint8 [B, 3, S, S], zero outside the photographs; arrays inside, originals int64 [B, 2]
             (height, width in the frame and of the masks), masks bool [N, S/4, S/4] of all images one after the other,
             rows int64 [N], the image of each mask, numbers int64 [N] of the annotations; positions, samples, keys,
             bad as in ShardDataset

    A sample without a usable mask is replaced like one that cannot be read.
    """

    def __init__(
        self,
        index: ShardIndex,
        cut: Frame,
        seed: int | None = None,
        ring: Ring | None = None,
        reading: np.ndarray | None = None,
    ):
        super().__init__(index, Cut((cut.side, cut.side), flip=cut.flip), seed, ring, reading)
        self.frame = cut

    def __getitem__(self, draw: MicroBatch) -> Batch:
        count = len(draw.samples)
        images = self.empty(count) if draw.slot is None or not self.ring else self.ring.slot(draw.slot, count)
        draws = None if self.seed is None else uniforms(self.seed, draw.epoch, draw.positions, 2).tolist()
        samples, found, bad = draw.samples.copy(), [], []
        for row in range(count):
            samples[row], annotated = self._fill(images[row], draw, row, draws and draws[row], bad)
            found.append(annotated)
        return {
            "images" if draw.slot is None else "slot": images if draw.slot is None else draw.slot,
            "inside": np.array([annotated.inside for annotated in found], np.int64).reshape(-1, 2),
            "originals": np.array([annotated.original for annotated in found], np.int64).reshape(-1, 2),
            "masks": np.concatenate([annotated.masks for annotated in found]) if found else np.zeros((0, 0, 0), bool),
            "rows": np.repeat(np.arange(count), np.array([len(annotated.masks) for annotated in found], np.int64)),
            "numbers": np.concatenate([np.zeros(0, np.int64), *(annotated.numbers for annotated in found)]),
            "positions": draw.positions,
            "samples": samples,
            "keys": [self.index.key(sample) for sample in samples],
            "bad": bad,
        }

    def _read(self, images: Any, sample: int, draws: Any) -> Any:
        """Writes one photograph into `images` [3, S, S] and returns its masks; draws: (mirror, choice of masks)."""
        shard, offset, size = self.index.locate(sample)
        tar = self.index.shards[shard]
        data = read(tar, offset, size, self.index.cache)
        header = decode.read_header(data)
        codes, original = masks.read_record(self._record_of(sample, tar), header[:2])
        inside = fit(header.height, header.width, self.frame.side)
        mirrored = draws is not None and self.frame.flip and draws[0] < 0.5
        if self.frame.masks_per_image is None:
            kept = np.stack([masks.decode(code) for code in codes])
            annotated = Annotated(inside, original, kept, np.arange(len(codes)))
        else:
            annotated = self._chosen(codes, self.frame.masks_per_image, original, inside, mirrored, draws)
        whole = (0, 0, header.height, header.width)
        (image,) = decode.decode(data, header, [whole], inside, exact=True, filter="bilinear")
        images.zero_()
        images[:, : inside[0], : inside[1]] = image.flip(-1) if mirrored else image
        return annotated

    def _record_of(self, sample: int, tar: str) -> bytes:
        member = next((m for m in self.index.members(sample) if m.name.lower().endswith(".json")), None)
        if member is None:
            raise DataError("it has no .json with masks beside it")
        return read(tar, member.offset, member.size, self.index.cache)

    def _chosen(
        self,
        codes: list[masks.RLE],
        at_most: int,
        original: tuple[int, int],
        inside: tuple[int, int],
        mirrored: bool,
        draws: Any,
    ) -> Annotated:
        stride, side = self.frame.stride, self.frame.side // self.frame.stride
        order = np.arange(len(codes))
        # Unused ones follow the chosen, in case some of these vanish in the frame.
        if draws is None:
            first = spread(len(codes), at_most)
            order = np.concatenate([first, np.setdiff1d(order, first)])
        else:
            order = permutation(key(int(draws[1] * 2**53)), order)
        rows = masks.nearest(original[0], inside[0], stride)
        columns = masks.nearest(original[1], inside[1], stride, mirrored)
        least = 1 if draws is None else int(np.ceil(self.frame.min_area * side**2))
        kept, numbers = masks.in_frame([codes[number] for number in order], at_most, least, side, rows, columns)
        if not len(kept):
            raise DataError(f"none of its {len(codes)} masks covers a cell of the {side}x{side} mask frame")
        return Annotated(inside, original, kept, order[numbers])
