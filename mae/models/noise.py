"""Mask noise: counter-based random numbers (SplitMix64), a pure function of (seed, step, row, patch)."""

import torch
from torch import Tensor


def uniform_noise(seed: int, step: int, rows: Tensor, patches: int) -> Tensor:
    """Draws mask noise for rows of the global batch of a step.

    rows     [B]     int64, row of each image in the global batch
    returns  [B, N]  float32 in [0, 1), on the device of `rows`

    A hash (the finaliser of SplitMix64, Steele et al. 2014) instead of a generator: a rank computes its own rows only,
    and every device and version of torch gives the same masks.
    """
    start = _mix_integer(_mix_integer(seed) ^ step)  # not of a tensor, whose copy to a GPU the host would wait for
    counter = rows.to(torch.int64)[:, None] * patches + torch.arange(patches, device=rows.device)
    return _unit(_mix(_mix(start + counter * _GOLDEN)))


def further_noise(noise: Tensor, count: int) -> Tensor:
    """Draws more numbers for each image, from a hash of its own noise alone.

    noise    [B, N]      in [0, 1)
    returns  [B, count]  float32 in [0, 1)
    """
    places = torch.arange(1, noise.shape[1] + 1, device=noise.device)
    start = _mix(((noise * 2.0**24).to(torch.int64) * (places * _GOLDEN)).sum(dim=1, keepdim=True))
    return _unit(_mix(start + torch.arange(count, device=noise.device) * _GOLDEN))


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_ALL = (1 << 64) - 1


def _unit(bits: Tensor) -> Tensor:
    """Returns the 24 high bits, which fit a float32 exactly, as a number in [0, 1)."""
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts logically; torch shifts signed integers arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_integer(x: int) -> int:
    """Applies the SplitMix64 finaliser to a signed 64-bit integer."""
    x = (x + _GOLDEN) & _ALL
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _ALL
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x


def _mix(x: Tensor) -> Tensor:
    """Applies the SplitMix64 finaliser; int64 products wrap like unsigned ones."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)
