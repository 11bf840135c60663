"""FLOPs of the SAM-style encoder and of the sessions by formula, counted as in mae/models/flops.py."""

from collections.abc import Iterator
from math import ceil

from mae.models.flops import attention, linear
from mae.sam.encoder import SamConfig

# Passes through the encoder of a training step, by task.encoder: the forward pass, the gradients of its inputs, and of
# its weights.
ENCODER_PASSES = {"all": 3, "lora": 2, "frozen": 1}
MASK_TOKENS, HEADS_LAYERS = 4, 3  # of SAM's mask decoder


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
    return flops + _sam_attention(config) + neck_flops(config)


def neck_flops(config: SamConfig) -> int:
    """Counts the forward pass of the neck, which is a part of `sam_flops`."""
    (h, w), width = config.grid, config.out_channels
    return linear(h * w, config.width, width) + 9 * linear(h * w, width, width)


def executed_sam_flops(config: SamConfig) -> int:
    """Counts forward and backward as `SamEncoder` computes them: the backward pass repeats the scores."""
    return 3 * sam_flops(config) + _sam_attention(config) // 2


def session_flops(config: SamConfig, objects: int, clicks: int, mask_input: bool) -> int:
    """Counts the forward pass of the sessions of one image: prompts and masks of every object, in every answer.

    The gate of task.relevance is not counted.
    """
    points = [1, *range(2, 2 + clicks)] + ([1, 1 + clicks] if mask_input else [])
    return objects * sum(_answer(config, count, mask_input) for count in points)


def _answer(config: SamConfig, points: int, mask_input: bool) -> int:
    """Counts one answer for one object: two layers between tokens and image, upscaling, heads."""
    (h, w), width, half = config.grid, config.out_channels, config.out_channels // 2
    image, tokens = h * w, 1 + MASK_TOKENS + points + 1  # the last is "not a point" or a corner
    ends = 2 * linear(tokens, width, half) + 2 * linear(image, width, half)
    across = ends + attention(tokens, image, half)
    layer = 4 * linear(tokens, width, width) + attention(tokens, tokens, width) + 2 * linear(tokens, width, 8 * width)
    flops = 2 * (layer + 2 * across) + across
    flops += linear(image, width, width) + linear(4 * image, width // 4, width // 2)  # upscaling
    heads = (MASK_TOKENS + 1) * (HEADS_LAYERS - 1) * linear(1, width, width)
    flops += heads + MASK_TOKENS * linear(1, width, width // 8) + linear(16 * image, width // 8, MASK_TOKENS)
    if mask_input:
        flops += linear(4 * image, 4, 4) + linear(image, 16, 16) + linear(image, 16, width)
    return flops


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
