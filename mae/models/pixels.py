"""Pixel scale: integers, as images are stored, to the normalised input of a model and back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Pixels(nn.Module):
    """Normalisation by mean and deviation of a data set.

    mean, std  per channel, for pixels in [0, 1] (ImageNet: .485 ...)
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255, persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        """Normalises uint8 or uint16 images [B, C, H, W] to float32 by the mean and deviation of the data set."""
        return (_to_255(images) - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """Maps normalised images to [0, 1]."""
        return (images * self.std + self.mean) / 255

    def unit(self, images: Tensor) -> Tensor:
        """Maps uint8 or uint16 images to float32 in [0, 1]."""
        return _to_255(images) / 255


def _to_255(images: Tensor) -> Tensor:
    """Maps uint8 or uint16 images to float32 in [0, 255]."""
    return images.float() / 257 if images.dtype == torch.uint16 else images.float()
