"""Masking: noise ranks the patches of each image; the lowest K stay visible, and the encoder gets only those.

Block and grid masks rank the patches by rectangles or a pattern first, and by noise within them; masks of cells rank
whole squares of patches. Rows of a batch never depend on each other.
"""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.models.noise import further_noise


class Masking(NamedTuple):
    """Visible and hidden patches of a batch, as many in every image.

    ids_keep    [B, K]    visible patches, ascending
    ids_hidden  [B, N-K]  hidden patches, ascending
    mask        [B, N]    1 hidden, 0 visible
    """

    ids_keep: Tensor
    ids_hidden: Tensor
    mask: Tensor


def random_masking(noise: Tensor, keep: int) -> Masking:
    """Masks each image at random: the `keep` patches with the lowest noise stay visible (He et al. 2022, section 3).

    noise  [B, N]  uniform; of equal values the earlier patch comes first

    The paper shuffles the patches and keeps the inverse permutation. Attention does not depend on order, so both sets
    stay ascending and no token is moved back: see `Decoder.decode`.
    """
    ids = torch.argsort(noise, dim=1, stable=True)
    ids_keep = ids[:, :keep].sort(dim=1).values
    ids_hidden = ids[:, keep:].sort(dim=1).values
    mask = torch.ones_like(noise, dtype=torch.float32).scatter_(1, ids_keep, 0.0)
    return Masking(ids_keep, ids_hidden, mask)


def choose_predicted(noise: Tensor, ids_hidden: Tensor, count: int) -> Tensor:
    """Returns the `count` hidden patches with the lowest noise: [B, N-K] -> [B, count], ascending."""
    order = noise.gather(1, ids_hidden).argsort(dim=1, stable=True)[:, :count]
    return ids_hidden.gather(1, order.sort(dim=1).values)


MAX_RECTANGLES = 32  # per image
AREA = (0.1, 0.3)  # range of the area of a rectangle, as a share of the hidden patches
MIN_ASPECT = 0.3  # height / width of the flattest rectangle; of the tallest it is the inverse (Bao et al. 2022, alg. 1)


def draw_masking(noise: Tensor, config: MAEConfig) -> Masking:
    """Draws a masking of the kind `config.masking` from noise, with `config.visible` visible patches per image.

    noise  [B, N]  uniform in [0, 1)
    """
    if config.masking == "block":
        noise = block_ranking(noise, config.grid, config.patches - config.visible)
    elif config.masking == "grid":
        noise = grid_ranking(noise, config.grid)
    elif config.mask_cell > 1:
        noise = cell_ranking(noise, config.grid, config.mask_cell)
    return random_masking(noise, config.visible)


def given_masking(mask: Tensor, images: int, patches: int) -> Masking:
    """Returns the masking of a user's mask.

    mask  [B, N]  hidden where it is not zero

    Raises ConfigError unless every image has the same number of hidden patches, and some visible and some hidden.
    """
    if mask.shape != (images, patches):
        raise ConfigError(
            f"mask has the shape {tuple(mask.shape)}: {images} images of {patches} patches need {(images, patches)}"
        )
    counts = sorted(set(mask.bool().sum(dim=1).tolist()))
    if len(counts) > 1:
        raise ConfigError(
            f"mask hides from {counts[0]} to {counts[-1]} patches of an image: hide as many in every image of a batch"
        )
    if counts[0] in (0, patches):
        raise ConfigError(
            f"mask hides {counts[0]} of {patches} patches: at least one has to be visible and one hidden in every image"
        )
    return random_masking(mask.bool().float(), patches - counts[0])


def grid_ranking(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """Ranks patches by a regular pattern, which starts at the patch with the lowest noise.

    The pattern is ordered dithering in cells of 4 x 4 (Bayer 1973): the lowest rank is every fourth patch in both
    directions, the lowest 4 every second, the lowest 8 a checkerboard.

    Noise ranks the patches of equal rank, so that any grid and mask ratio is met exactly.

    noise    [B, N]
    returns  [B, N]
    """
    h, w = grid
    start = noise.argmin(dim=1, keepdim=True)
    place = torch.arange(h * w, device=noise.device)
    row, column = (place // w - start // w) % 4, (place % w - start % w) % 4
    unlike = row ^ column
    return 8 * (unlike & 1) + 4 * (row & 1) + 2 * (unlike >> 1) + (row >> 1) + noise


def cell_ranking(noise: Tensor, grid: tuple[int, int], cell: int) -> Tensor:
    """Ranks the cells of `cell` x `cell` patches, each by the noise of its first patch (Yang et al. 2025, section 3).

    noise    [B, N]
    returns  [B, N]  the rank of a patch's cell: the patches of a cell stay neighbours in the order
    """
    first = rearrange(noise, "b (h w) -> b h w", h=grid[0])[:, ::cell, ::cell].flatten(1)
    rank = first.argsort(dim=1, stable=True).argsort(dim=1)
    return repeat(rank, "b (r c) -> b (r i c j)", r=grid[0] // cell, i=cell, j=cell)


def block_ranking(noise: Tensor, grid: tuple[int, int], hidden: int) -> Tensor:
    """Ranks patches so that the `hidden` highest lie in rectangles, drawn one after another (Bao et al. 2022).

    Noise ranks the patches inside the last rectangle, and those outside of all.

    noise    [B, N]
    returns  [B, N]
    """
    h, w = grid
    area, aspect, *corner = rearrange(further_noise(noise, 4 * MAX_RECTANGLES), "b (r four) -> four b r", four=4)
    area = hidden * (AREA[0] + (AREA[1] - AREA[0]) * area)
    aspect = MIN_ASPECT ** (1 - 2 * aspect)
    inside = [
        _inside(side, (area * ratio).sqrt(), start)
        for side, ratio, start in ((h, aspect, corner[0]), (w, 1 / aspect, corner[1]))
    ]
    covered = rearrange(inside[0], "b r h -> b r h 1") & rearrange(inside[1], "b r w -> b r 1 w")
    number = rearrange(torch.arange(MAX_RECTANGLES, device=noise.device), "r -> r 1 1")
    first = torch.where(covered, number, MAX_RECTANGLES).amin(dim=1)
    return noise - rearrange(first, "b h w -> b (h w)")


def _inside(side: int, length: Tensor, start: Tensor) -> Tensor:
    """Returns which of `side` places an interval covers.

    length   [B, R]        in places
    start    [B, R]        [0, 1), spread evenly over the possible starts
    returns  [B, R, side]  bool
    """
    length = length.round().clamp(1, side)
    first = (start * (side - length + 1)).floor()
    place = torch.arange(side, device=length.device)
    return (place >= first[..., None]) & (place < (first + length)[..., None])
