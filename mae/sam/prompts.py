"""Simulated prompts: points and boxes for masks, made of random numbers that are given."""

from typing import NamedTuple

import torch
from torch import Tensor

from mae.sam.segmenter import BACKGROUND, FOREGROUND, NONE, STRIDE, Prompts

BOX_NOISE, BOX_NOISE_LIMIT = 0.1, 20 / 1024  # deviation as a share of the box, limit as a share of the frame


class Draws(NamedTuple):
    """Random numbers of the sessions of N objects.

    boxed    [N, 1]     uniform, whether the first prompt is a box
    noise    [N, 4]     normal, of the corners of that box
    clicks   [P, N, 1]  uniform, the place of each click in its region; the first is in the object
    repeats  numbers of the answers to the mask alone, before which no click is added
    """

    boxed: Tensor
    noise: Tensor
    clicks: Tensor
    repeats: tuple[int, ...]

    def of(self, objects: slice) -> "Draws":
        """Returns those of some objects."""
        return Draws(self.boxed[objects], self.noise[objects], self.clicks[:, objects], self.repeats)


def first_prompts(masks: Tensor, box_share: float, draws: Draws) -> Prompts:
    """Returns a point of each mask, or in `box_share` of them its jittered box (Kirillov et al. 2023, appendix A).

    masks  [N, h, w]  true inside the object, none empty
    """
    boxed = draws.boxed[:, 0] < box_share
    points, labels = click(masks, torch.zeros_like(masks), draws.clicks[0])
    labels = torch.where(boxed, NONE, labels)
    boxes = jitter_boxes(bounding_boxes(masks) * STRIDE, masks.shape[-1] * STRIDE, draws.noise)
    return Prompts(points[:, None], labels[:, None], boxes, boxed)


def add_click(prompts: Prompts, masks: Tensor, predicted: Tensor, uniform: Tensor) -> Prompts:
    """Adds to each prompt a click into the error of the predicted mask; `uniform` [N, 1] as in `click`."""
    points, labels = click(masks, predicted, uniform)
    return prompts._replace(
        points=torch.cat([prompts.points, points[:, None]], 1), labels=torch.cat([prompts.labels, labels[:, None]], 1)
    )


def click(masks: Tensor, predicted: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Chooses a uniformly random point of the error: foreground where the object was missed, else background.

    masks, predicted  [N, h, w]  bool; if both are equal, the point is one of the object
    uniform           [N, 1]     random numbers in [0, 1)
    returns           points [N, 2] in pixels of the frame, and their labels [N]
    """
    wrong = masks ^ predicted
    region = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, masks).flatten(1)
    # Taking the k-th cell takes one random number per mask, however many cells there are.
    counts = region.cumsum(1, dtype=torch.int32)
    chosen = (uniform * counts[:, -1:]).int().clamp(max=counts[:, -1:] - 1)
    cells = (counts > chosen).int().argmax(1)
    rows, columns = cells // masks.shape[-1], cells % masks.shape[-1]
    labels = torch.where(masks.flatten(1).gather(1, cells[:, None])[:, 0], FOREGROUND, BACKGROUND)
    return (torch.stack([columns, rows], 1) + 0.5) * STRIDE - 0.5, labels


def bounding_boxes(masks: Tensor) -> Tensor:
    """Returns the smallest box round each mask: bool [N, h, w] -> edges (x0, y0, x1, y1) in cells, float [N, 4]."""
    sides = []
    for across in (masks.any(1), masks.any(2)):
        places = torch.arange(across.shape[1], device=masks.device)
        sides += [torch.where(across, places, across.shape[1]).amin(1), torch.where(across, places + 1, 0).amax(1)]
    x0, x1, y0, y1 = sides
    return torch.stack([x0, y0, x1, y1], 1).float()


def jitter_boxes(boxes: Tensor, side: int, normal: Tensor) -> Tensor:
    """Adds normal noise to every coordinate: deviation a tenth of the box's side, at most 20 pixels of 1024.

    boxes, normal  [N, 4]
    """
    widths = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = normal * BOX_NOISE * widths
    limit = BOX_NOISE_LIMIT * side
    return (boxes + noise.clamp(-limit, limit)).clamp(0, side)


def draw_uniform(objects: int, generator: torch.Generator) -> Tensor:
    return torch.rand(objects, 1, generator=generator, device=generator.device)
