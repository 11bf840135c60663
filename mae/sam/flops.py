"""FLOPs of the SAM-style encoder by formula, counted as in mae/models/flops.py."""

from collections.abc import Iterator
from math import ceil

from mae.models.flops import attention, linear
from mae.sam.encoder import SamConfig


def sam_flops(config: SamConfig, *, pad: bool = False) -> int:
    """Counts the forward pass of one image of the configured size; forward and backward are three times as much.

    pad  add the projections of the zero tokens that pad windows at the edge, which segment-anything computes
    """
    h, w = config.grid
    tokens, width = h * w, config.width
    flops = linear(tokens, config.patch_size**2 * config.in_channels, width)
    for windows, rows, columns in _windows(config):
        projected = windows * rows * columns if pad else tokens
        flops += 4 * linear(projected, width, width) + 2 * linear(tokens, width, int(width * config.mlp_ratio))
        flops += windows * linear(rows * columns, rows + columns, width)
    neck = linear(tokens, width, config.out_channels) + 9 * linear(tokens, config.out_channels, config.out_channels)
    return flops + _sam_attention(config) + neck


def executed_sam_flops(config: SamConfig) -> int:
    """Counts forward and backward as `SamEncoder` computes them: the backward pass repeats the scores."""
    return 3 * sam_flops(config) + _sam_attention(config) // 2


def _windows(config: SamConfig) -> Iterator[tuple[int, int, int]]:
    """Yields (windows, rows, columns) of each block."""
    h, w = config.grid
    inside = ceil(h / config.window) * ceil(w / config.window), config.window, config.window
    for index in range(config.depth):
        yield (1, h, w) if index in config.global_blocks else inside


def _sam_attention(config: SamConfig) -> int:
    """Counts the part of `sam_flops` in which queries meet keys and weights meet values."""
    return sum(
        count * attention(rows * columns, rows * columns, config.width) for count, rows, columns in _windows(config)
    )
