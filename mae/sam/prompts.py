"""Simulated prompts: points and boxes for masks, all drawn from one generator."""

import torch
from torch import Tensor

from mae.sam.segmenter import BACKGROUND, FOREGROUND, NONE, STRIDE, Prompts

BOX_NOISE, BOX_NOISE_LIMIT = 0.1, 20 / 1024  # deviation as a share of the box, limit as a share of the frame


def first_prompts(masks: Tensor, box_share: float, generator: torch.Generator) -> Prompts:
    """Draws a point of each mask, or with probability `box_share` its jittered box (Kirillov et al. 2023, appendix A).

    masks  [N, h, w]  true inside the object, none empty
    """
    boxed = draw_uniform(masks, generator)[:, 0] < box_share
    points, labels = click(masks, torch.zeros_like(masks), generator)
    labels = torch.where(boxed, NONE, labels)
    boxes = jitter_boxes(bounding_boxes(masks) * STRIDE, masks.shape[-1] * STRIDE, generator)
    return Prompts(points[:, None], labels[:, None], boxes, boxed)


def add_click(prompts: Prompts, masks: Tensor, predicted: Tensor, generator: torch.Generator) -> Prompts:
    """Adds to each prompt a click into the error of the predicted mask."""
    points, labels = click(masks, predicted, generator)
    return prompts._replace(
        points=torch.cat([prompts.points, points[:, None]], 1), labels=torch.cat([prompts.labels, labels[:, None]], 1)
    )


def click(masks: Tensor, predicted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws a uniformly random point of the error: foreground where the object was missed, else background.

    masks, predicted  [N, h, w]  bool; if both are equal, the point is one of the object
    returns           points [N, 2] in pixels of the frame, and their labels [N]
    """
    wrong = masks ^ predicted
    region = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, masks).flatten(1)
    # Drawing k and taking the k-th cell uses one random number per mask, however many cells there are.
    counts = region.cumsum(1, dtype=torch.int32)
    chosen = (draw_uniform(masks, generator) * counts[:, -1:]).int().clamp(max=counts[:, -1:] - 1)
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


def jitter_boxes(boxes: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Adds normal noise to every coordinate: deviation a tenth of the box's side, at most 20 pixels of 1024."""
    widths = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = torch.randn(boxes.shape, generator=generator, device=boxes.device) * BOX_NOISE * widths
    limit = BOX_NOISE_LIMIT * side
    return (boxes + noise.clamp(-limit, limit)).clamp(0, side)


def draw_uniform(masks: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(len(masks), 1, generator=generator, device=masks.device)
