"""Simulated users: points and boxes for masks, all drawn from one generator."""

import torch
from torch import Tensor

from mae.sam.segmenter import BACKGROUND, FOREGROUND, NONE, STRIDE, Prompts

BOX_NOISE, BOX_NOISE_LIMIT = 0.1, 20 / 1024  # deviation as a share of the box, its limit as a share of the frame


def first_prompts(masks: Tensor, box_share: float, generator: torch.Generator) -> Prompts:
    """A random point of each mask, or with probability `box_share` its box, shaken (Kirillov et al. 2023, appendix A).

    masks  [N, h, w]  true inside the object, something everywhere
    """
    boxed = uniform(masks, 1, generator)[:, 0] < box_share
    points, labels = click(masks, torch.zeros_like(masks), generator)
    labels = torch.where(boxed, NONE, labels)
    boxes = shaken(boxes_of(masks), masks.shape[-1] * STRIDE, generator)
    return Prompts(points[:, None], labels[:, None], boxes, boxed)


def add_click(prompts: Prompts, masks: Tensor, predicted: Tensor, generator: torch.Generator) -> Prompts:
    """The prompts with a click into what is wrong."""
    points, labels = click(masks, predicted, generator)
    return prompts._replace(
        points=torch.cat([prompts.points, points[:, None]], 1), labels=torch.cat([prompts.labels, labels[:, None]], 1)
    )


def click(masks: Tensor, predicted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A uniformly random point of the error region: foreground where the object was missed, else background.

    masks, predicted  [N, h, w]  bool; where they agree entirely the point is one of the object
    returns           points [N, 2] in pixels of the frame, and their labels [N]
    """
    wrong = masks ^ predicted
    region = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, masks).flatten(1)
    # The k-th cell of the region, k drawn: one number per mask, however many cells there are.
    counts = region.cumsum(1, dtype=torch.int32)
    chosen = (uniform(masks, 1, generator) * counts[:, -1:]).int().clamp(max=counts[:, -1:] - 1)
    cells = (counts > chosen).int().argmax(1)
    rows, columns = cells // masks.shape[-1], cells % masks.shape[-1]
    labels = torch.where(masks.flatten(1).gather(1, cells[:, None])[:, 0], FOREGROUND, BACKGROUND)
    return (torch.stack([columns, rows], 1) + 0.5) * STRIDE - 0.5, labels


def boxes_of(masks: Tensor) -> Tensor:
    """The smallest box round each mask: bool [N, h, w] -> [N, 4], x0, y0, x1, y1 in pixels of the frame, the edges."""
    sides = []
    for across in (masks.any(1), masks.any(2)):
        places = torch.arange(across.shape[1], device=masks.device)
        sides += [torch.where(across, places, across.shape[1]).amin(1), torch.where(across, places + 1, 0).amax(1)]
    x0, x1, y0, y1 = sides
    return torch.stack([x0, y0, x1, y1], 1).float() * STRIDE


def shaken(boxes: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Boxes with normal noise on every coordinate: of a tenth of the box's side, at most 20 pixels of 1024."""
    widths = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = torch.randn(boxes.shape, generator=generator, device=boxes.device) * BOX_NOISE * widths
    limit = BOX_NOISE_LIMIT * side
    return (boxes + noise.clamp(-limit, limit)).clamp(0, side)


def uniform(like: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    return torch.rand(len(like), columns, generator=generator, device=like.device)
