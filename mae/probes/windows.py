"""Windows over photographs of any size: what the encoder of a dense probe sees.

1 scale   a whole photograph to the size asked for, in multiples of the patch
2 cut     windows with a stride of two thirds, the last ones flush with the border
3 merge   what was computed for the windows, averaged where they overlap
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]  # height, width
STRIDE = 2 / 3  # of a window


def shown_size(photograph: Size, wanted: int | Size | None, patch: int, window: Size | None) -> Size:
    """Returns the size to which a photograph is resized before windows are cut.

    wanted  its shorter side; both sides; or None: as it is
    window  the result is at least as large, at the aspect of the photograph

    Sides are rounded to the nearest multiple of the patch.
    """
    height, width = photograph
    if isinstance(wanted, tuple):
        height, width = wanted
    elif wanted is not None:
        height, width = (round(side * wanted / min(photograph)) for side in photograph)
    if window is not None and (height < window[0] or width < window[1]):
        enlarged = max(window[0] / height, window[1] / width)
        height, width = max(window[0], round(height * enlarged)), max(window[1], round(width * enlarged))
    rows, columns = (max(1, round(side / patch)) for side in (height, width))
    return rows * patch, columns * patch


def cut_windows(size: Size, window: Size | None) -> list[tuple[int, int]]:
    """Returns (top, left) of the windows that cover an image; one of its own size if `window` is None."""
    if window is None:
        return [(0, 0)]
    tops, lefts = (_starts(side, part) for side, part in zip(size, window, strict=True))
    return [(top, left) for top in tops for left in lefts]


def _starts(side: int, window: int) -> list[int]:
    stride = max(1, int(window * STRIDE))
    count = -(-(side - window) // stride) + 1
    return [min(number * stride, side - window) for number in range(count)]


def crop_windows(images: Tensor, places: Sequence[tuple[int, int]], window: Size) -> Tensor:
    """Cuts windows out of an image or a map: [..., H, W] -> [len(places), ..., h, w]."""
    height, width = window
    return torch.stack([images[..., top : top + height, left : left + width] for top, left in places])


def merge_windows(values: Tensor, places: Sequence[tuple[int, int]], size: Size) -> Tensor:
    """Averages the values of overlapping windows at each pixel: [W, C, h, w] -> [C, *size]."""
    if len(places) == 1:
        return values[0]
    height, width = values.shape[-2:]
    total = values.new_zeros(values.shape[1], *size)
    count = values.new_zeros(size)
    for (top, left), part in zip(places, values, strict=True):
        total[:, top : top + height, left : left + width] += part
        count[top : top + height, left : left + width] += 1
    return total / count


def resize_nearest(truth: Tensor, size: Size) -> Tensor:
    """Resizes a map [H, W] without mixing its values: each pixel takes that of the map at its centre."""
    rows, columns = (
        ((torch.arange(to) + 0.5) * (of / to)).long().clamp_max(of - 1)
        for to, of in zip(size, truth.shape, strict=True)
    )
    return truth[rows[:, None], columns]


def upsample(values: Tensor, size: Size, align_corners: bool) -> Tensor:
    """Resizes [W, C, h, w] to [W, C, *size] bilinearly."""
    if values.shape[-2:] == size:
        return values
    return F.interpolate(values, size, mode="bilinear", align_corners=align_corners)
