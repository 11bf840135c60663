"""Crop boxes from given uniform numbers: geometry only, no pixels.

A box is (top, left, height, width) in pixels of the upright image.
"""

import math
from collections.abc import Sequence

Box = tuple[int, int, int, int]

TRIES = 10
# Uniform numbers per image: two per try, two for the position, one for the flip, one to seed RandAugment.
DRAWS = 2 * TRIES + 4


def random_resized_crop(
    height: int,
    width: int,
    u: Sequence[float],
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draws the box of torchvision's RandomResizedCrop: ten tries, then the largest centred box within the ratios.

    u      [≥ 22]  in [0, 1): (area, aspect) of each try, then top and left
    scale          share of the image's area; ratio: width / height, drawn uniformly in its logarithm
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[2 * attempt])
        aspect = math.exp(low + (high - low) * u[2 * attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2 * TRIES] * (height - h + 1)), int(u[2 * TRIES + 1] * (width - w + 1)), h, w
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def flipped(u: Sequence[float]) -> bool:
    """Returns whether to mirror the image."""
    return u[2 * TRIES + 2] < 0.5


def library_seed(u: Sequence[float]) -> int:
    """Returns a seed of 32 bits from the last of the `DRAWS` numbers."""
    return int(u[DRAWS - 1] * 2**32)


def centre_crop(height: int, width: int, out_size: tuple[int, int], keep: float = 1.0) -> Box:
    """Returns the centred box with the aspect of `out_size` that takes the share `keep` of the limiting side.

    keep=0.875 equals ImageNet's resize to 256 and centre crop of 224.
    """
    out_height, out_width = out_size
    factor = keep * min(height / out_height, width / out_width)
    h = min(height, max(1, round(out_height * factor)))
    w = min(width, max(1, round(out_width * factor)))
    return (height - h) // 2, (width - w) // 2, h, w
