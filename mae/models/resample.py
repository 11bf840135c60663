"""Weights for another grid or another patch size."""

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """A grid of positions, resized bicubically: [1, h, w, D] -> [1, *grid, D].

    The very tensor when the grid is the same. Antialiased, as timm does it.
    """
    if positions.shape[1:3] == grid:
        return positions
    channels_first = rearrange(positions, "one h w d -> one d h w").float()
    resized = F.interpolate(channels_first, grid, mode="bicubic", align_corners=False, antialias=True)
    return rearrange(resized, "one d h w -> one h w d").to(positions.dtype)
