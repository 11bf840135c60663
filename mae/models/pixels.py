"""Integers, as images are stored, and what a model sees of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Pixels(nn.Module):
    """The scale of a data set's images.

    mean, std  per channel, in units of 1 (ImageNet: .485 ...)
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255, persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 or uint16 [B, C, H, W] -> float32 with the mean and deviation of the data set taken out."""
        return (_of_255(images) - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """The other way round, to the unit interval."""
        return (images * self.std + self.mean) / 255

    def unit(self, images: Tensor) -> Tensor:
        """uint8 or uint16 -> float32 in [0, 1]."""
        return _of_255(images) / 255


def _of_255(images: Tensor) -> Tensor:
    return images.float() / 257 if images.dtype == torch.uint16 else images.float()
