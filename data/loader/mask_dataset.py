"""Map-style dataset: the samples of one micro-batch → a batch of whole photographs with instance masks.

Samples are located, read and replaced as in data/loader/dataset.py. In the place of crop and augmentation:

1 record  SA-1B record beside the image → run-length codes of its masks    data/images/masks.py
2 choose  some masks, drawn from (seed, epoch, position) or evenly spread
3 frame   photograph and masks scaled, and mirrored, into a square
"""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data.errors import DataError, NoObject
from data.images import decode, masks
from data.images.masks import CodedMasks
from data.index.index import ShardIndex
from data.loader.dataset import Batch, CropSpec, ShardDataset, Uniforms
from data.loader.photograph_dataset import fit, lay_into_frame
from data.order.hashing import key, permutation
from data.order.samplers import spread
from data.storage.read import read


class Frame(NamedTuple):
    """Square that a photograph is laid into, top left, its longer side filling it.

    side             of the square in pixels
    masks_per_image  at most, drawn for training, evenly spread otherwise; None: all of them, coded and at the
                     resolution of the photograph, and one photograph in a batch
    stride           pixels per cell of the masks: 4 is the resolution of SAM's mask decoder
    flip             mirror half of the training images
    min_area         share of the frame that a training mask has to cover, unless all masks of its image are smaller
    """

    side: int
    masks_per_image: int | None = 64
    stride: int = 4
    flip: bool = True
    min_area: float = 0.0


class Annotated(NamedTuple):
    """Annotations of one image of a batch."""

    inside: tuple[int, int]  # height, width of the photograph in the frame
    original: tuple[int, int]  # height, width of the photograph that the masks are of
    masks: np.ndarray | CodedMasks  # bool [N, side / stride, side / stride], or all of the photograph
    numbers: np.ndarray  # int64 [N], of the annotations in the record


class MaskDataset(ShardDataset):
    """Map-style dataset over indexed shards with SA-1B records: micro-batch → batch.

    returns  images Tensor uint8 [B, 3, S, S], zero outside the photographs; arrays inside, originals int64 [B, 2]
             (height, width in the frame and of the masks), masks bool [N, S/4, S/4] of all images one after the other,
             rows int64 [N], the image of each mask, numbers int64 [N] of the annotations; positions, samples, keys,
             bad as in ShardDataset

    A photograph without an object in the frame is replaced like one that cannot be read, but counts as no damage. With
    all masks at the resolution of the photograph (`masks_per_image` None) it stays, with none, as CodedMasks.
    """

    def __init__(self, index: ShardIndex, frame: Frame, seed: int | None = None, replace: bool = True):
        super().__init__(index, CropSpec((frame.side, frame.side)), seed, replace)
        self.frame = frame

    def _load(self, rows: Tensor, sample: int, uniforms: Uniforms) -> Annotated:
        """Writes one photograph into `rows` [1, 3, S, S] and returns its masks."""
        data = self.index.read(sample)
        header = decode.read_header(data)
        try:
            codes, original = masks.read_record(self.record(sample), header[:2])
        except NoObject:
            if self.frame.masks_per_image is not None:
                raise
            codes, original = [], (header.height, header.width)
        inside = fit(header.height, header.width, self.frame.side)
        mirrored = uniforms is not None and self.frame.flip and uniforms[0][0] < 0.5
        if self.frame.masks_per_image is None:
            chosen, numbers = _all_masks(codes, original)
        else:
            choice = None if uniforms is None else uniforms[0][1]
            chosen, numbers = self._frame_masks(codes, self.frame.masks_per_image, original, inside, mirrored, choice)
        lay_into_frame(rows, data, header, inside, mirrored)
        return Annotated(inside, original, chosen, numbers)

    def record(self, sample: int) -> bytes:
        """Returns the SA-1B record beside an image. Raises DataError if there is none."""
        found = [member for member in self.index.members(sample) if member.name.lower().endswith(".json")]
        if not found:
            raise DataError("it has no .json with masks beside it")
        member = min(found, key=lambda member: len(member.name))  # KEY.json, and not a KEY.meta.json beside it
        shard = self.index.shards[self.index.shard_of(sample)]
        return read(shard, member.offset, member.size, self.index.cache)

    def _frame_masks(
        self,
        codes: list[masks.RLE],
        at_most: int,
        original: tuple[int, int],
        inside: tuple[int, int],
        mirrored: bool,
        choice: float | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns masks in the frame and their numbers, drawn by `choice` in [0, 1), evenly spread if it is None.

        Masks smaller than `frame.min_area` are left out unless the image has no larger one.
        """
        stride, side = self.frame.stride, self.frame.side // self.frame.stride
        order = np.arange(len(codes))
        # Unused ones follow the chosen, in case some of these vanish in the frame.
        if choice is None:
            first = spread(len(codes), at_most)
            order = np.concatenate([first, np.setdiff1d(order, first)])
        else:
            order = permutation(key(int(choice * 2**53)), order)
        rows = masks.nearest(original[0], inside[0], stride)
        columns = masks.nearest(original[1], inside[1], stride, mirrored)
        min_cells = 1 if choice is None else int(np.ceil(self.frame.min_area * side**2))
        large: list[tuple[np.ndarray, int]] = []
        small: list[tuple[np.ndarray, int]] = []
        for number in order:
            if len(large) == at_most:
                break
            mask = masks.decode(codes[number])[rows][:, columns]
            if cells := int(mask.sum()):
                framed = np.zeros((side, side), bool)
                framed[: len(rows), : len(columns)] = mask
                (large if cells >= min_cells else small).append((framed, number))
        chosen = large or small[:at_most]
        if not chosen:
            raise NoObject(f"none of its {len(codes)} masks covers a cell of the {side}x{side} mask frame")
        return np.stack([mask for mask, _ in chosen]), np.array([number for _, number in chosen], np.int64)

    def _collate(self, samples: np.ndarray, loaded: list[Any]) -> Batch:
        """Returns the masks of a batch one after the other, `loaded` being the Annotated of each sample."""
        found: list[Any] = [annotated.masks for annotated in loaded]
        if self.frame.masks_per_image is None:
            together = found[0] if found else CodedMasks([], (0, 0))
        else:
            together = np.concatenate(found) if found else np.zeros((0, 0, 0), bool)
        return {
            "inside": np.array([annotated.inside for annotated in loaded], np.int64).reshape(-1, 2),
            "originals": np.array([annotated.original for annotated in loaded], np.int64).reshape(-1, 2),
            "masks": together,
            "rows": np.repeat(np.arange(len(found)), np.array([len(each) for each in found], np.int64)),
            "numbers": np.concatenate([np.zeros(0, np.int64), *(annotated.numbers for annotated in loaded)]),
        }


def _all_masks(codes: list[masks.RLE], size: tuple[int, int]) -> tuple[CodedMasks, np.ndarray]:
    """Returns the masks that have a pixel, and their numbers."""
    numbers = [number for number, code in enumerate(codes) if masks.area(code)]
    return CodedMasks([codes[number] for number in numbers], size), np.array(numbers, np.int64)
