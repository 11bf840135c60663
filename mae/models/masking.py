"""Which patches the encoder sees: noise ranks the patches of each image, and the lowest stay visible.

Other kinds of masks rank by something else first: see mask_kinds.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """One masking of a batch, the same number of patches hidden in every image.

    ids_keep    [B, K]    visible patches, ascending
    ids_hidden  [B, N-K]  hidden patches, ascending
    mask        [B, N]    1 hidden, 0 visible
    """

    ids_keep: Tensor
    ids_hidden: Tensor
    mask: Tensor


def visible_patches(patches: int, mask_ratio: float) -> int:
    """K, the number of patches that stay visible: int(N * (1 - mask_ratio)) (He et al. 2022, section 3)."""
    return int(patches * (1 - mask_ratio))


def random_masking(noise: Tensor, keep: int) -> Masking:
    """Per-sample random masking: the `keep` patches with the lowest noise stay (He et al. 2022, section 3).

    noise  [B, N]  uniform; ties go to the earlier patch

    The paper shuffles the patches and carries the inverse permutation. Attention does not care about order, so both
    sets stay ascending here and no token is ever moved back: see `Decoder.decode`.
    """
    ids = torch.argsort(noise, dim=1, stable=True)
    ids_keep = ids[:, :keep].sort(dim=1).values
    ids_hidden = ids[:, keep:].sort(dim=1).values
    mask = torch.ones_like(noise, dtype=torch.float32).scatter_(1, ids_keep, 0.0)
    return Masking(ids_keep, ids_hidden, mask)


def some_hidden(noise: Tensor, ids_hidden: Tensor, count: int) -> Tensor:
    """`count` of the hidden patches, those with the lowest noise: [B, N-K] -> [B, count], ascending."""
    order = noise.gather(1, ids_hidden).argsort(dim=1, stable=True)[:, :count]
    return ids_hidden.gather(1, order.sort(dim=1).values)


def uniform_noise(seed: int, step: int, rows: Tensor, patches: int) -> Tensor:
    """Mask noise as a pure function of (seed, step, row of the global batch, patch).

    rows     [B]     int64, row of each image in the global batch
    returns  [B, N]  float32 in [0, 1), on the device of `rows`

    A counter-based hash (the finaliser of splitmix64, Steele et al. 2014) instead of a generator: a rank computes its
    own rows only, and every device and version of torch gives the same masks.
    """
    start = _mix(_mix(torch.tensor(seed, dtype=torch.int64)) ^ step).to(rows.device)
    counter = rows.to(torch.int64)[:, None] * patches + torch.arange(patches, device=rows.device)
    return _unit(_mix(_mix(start + counter * _GOLDEN)))


def further_noise(noise: Tensor, count: int) -> Tensor:
    """More numbers for each image, a hash of its own noise alone.

    noise    [B, N]      in [0, 1)
    returns  [B, count]  float32 in [0, 1)
    """
    places = torch.arange(1, noise.shape[1] + 1, device=noise.device)
    start = _mix(((noise * 2.0**24).to(torch.int64) * (places * _GOLDEN)).sum(dim=1, keepdim=True))
    return _unit(_mix(start + torch.arange(count, device=noise.device) * _GOLDEN))


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


def _unit(bits: Tensor) -> Tensor:
    """Of 64 bits the 24 high ones, which fill a float32 exactly, as a number in [0, 1)."""
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own is arithmetic on signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64, whose products wrap as the unsigned ones do."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)
