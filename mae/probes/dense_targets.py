"""What a dense probe is to say of each token: the shares of the classes in its patch, or the mean log of its depths."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mae.errors import ConfigError
from mae.probes.windows import Size, crop_windows

UNKNOWN = 255  # void, where neither settings nor manifest name it
MAX_CLASSES = 4096  # a count of every pair of classes has to fit into memory


class Classes(NamedTuple):
    """Classes of label maps: how many, their names ([] if unknown), and the number that is not scored."""

    count: int
    names: list[str]
    void: int

    def name(self, number: int) -> str:
        return self.names[number] if number < len(self.names) else str(number)

    @property
    def scored(self) -> list[int]:
        return [number for number in range(self.count) if number != self.void]


def find_classes(truths: list[Tensor], names: list[str], void: int) -> Classes:
    """Returns the classes in these maps.

    Raises ConfigError for a class without a name, for numbers that cannot be those of classes, or if there is only one.
    """
    seen = sorted({number for truth in truths for number in truth.unique().tolist()} - {void})
    if names and seen and seen[-1] >= len(names):
        raise ConfigError(
            f"label maps hold the value {seen[-1]}, and manifest.json names {len(names)} classes, 0 … "
            f"{len(names) - 1}, and {void} is void: add its name; if it "
            f"stands for none, make it `void` there, or set probe.void={seen[-1]}"
        )
    if seen and seen[-1] >= MAX_CLASSES:
        raise ConfigError(
            f"label maps hold the value {seen[-1]}, and classes are 0 … {MAX_CLASSES - 1}: those of objects or depths "
            "are no classes. Give maps of classes, or, if it stands for none, make it `void` in manifest.json"
        )
    if len(seen) < 2:
        raise ConfigError(
            f"probe=dense needs several classes, and the label maps hold {seen or 'none'} beside void={void}"
        )
    return Classes(max(len(names), seen[-1] + 1), names, void)


def class_shares(truth: Tensor, places: list[tuple[int, int]], window: Size, patch: int, classes: Classes) -> Tensor:
    """Returns the share of each class in each patch of the windows of a map [H, W]: [W·N, C], void in none of them."""
    cells = _cells(truth.long(), places, window, patch)
    known = (cells != classes.void) & (cells < classes.count)
    numbers = torch.arange(len(cells))[:, None] * classes.count + cells.clamp(0, classes.count - 1)
    counts = torch.bincount(numbers[known], minlength=len(cells) * classes.count)
    return counts.view(len(cells), classes.count).float() / cells.shape[1]


def log_depths(truth: Tensor, places: list[tuple[int, int]], window: Size, patch: int) -> tuple[Tensor, Tensor]:
    """Returns the mean log of the depths in each patch, [W·N, 1], and the share of its pixels that has one, [W·N]."""
    cells = _cells(truth, places, window, patch)
    known = cells > 0
    total = torch.where(known, cells, 1).log().sum(1, keepdim=True)
    return total / known.sum(1, keepdim=True).clamp_min(1), known.float().mean(1)


def _cells(truth: Tensor, places: list[tuple[int, int]], window: Size, patch: int) -> Tensor:
    """Returns the pixels of each patch of each window: [H, W] -> [W·N, patch²]."""
    cut = crop_windows(truth, places, window)
    rows, columns = window[0] // patch, window[1] // patch
    split = cut.view(len(places), rows, patch, columns, patch).transpose(2, 3)
    return split.reshape(len(places) * math.prod((rows, columns)), patch * patch)
