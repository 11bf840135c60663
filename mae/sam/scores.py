"""How well masks are found: mean IoU by number of clicks and by box, at the resolution of the photographs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from mae.sam.loss import intersection_over_union
from mae.sam.segmenter import BACKGROUND, FOREGROUND, NONE, Prompts, Segmenter
from mae.sam.square_frame import Size, blank_outside, edges_to_frame, to_frame, to_photograph

CHUNK = 16  # objects at a time


class Photograph(NamedTuple):
    """One photograph in its frame: images [1, 3, S, S] normalised, side S, its size there and its own."""

    images: Tensor
    side: int
    inside: Size
    original: Size


class Found(NamedTuple):
    """Masks bool [N, height, width] for one kind of prompt, and the prompts in pixels of the frame."""

    masks: Tensor
    prompts: Prompts


def centre(missed: np.ndarray, wrong: np.ndarray) -> tuple[int, int, int]:
    """The next click of a careful user: (x, y, label), the point farthest from the edge of the largest error.

    missed, wrong  bool [height, width], of the object and beside it; how large an error is, is the distance of its
                   innermost point from its edge (Sofiiuk et al. 2021)
    """
    best = (0.0, 0, 0, FOREGROUND)
    for region, label in ((missed, FOREGROUND), (wrong, BACKGROUND)):
        rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
        if len(rows):
            top, left = rows[0], columns[0]
            part = np.pad(region[top : rows[-1] + 1, left : columns[-1] + 1], 1)
            distance: Any = distance_transform_edt(part)
            y, x = np.unravel_index(distance.argmax(), part.shape)
            best = max(best, (float(distance[y, x]), int(x) - 1 + int(left), int(y) - 1 + int(top), label))
    return best[1:]


def by_clicks(model: Segmenter, embedding: Tensor, photograph: Photograph, truth: Tensor, clicks: int) -> list[Found]:
    """What is found after 1, 2, … clicks, each into the largest error of the answer before.

    The first click is answered by the mask that the model takes for the best of its three, later ones by its single
    one, which also gets the logits before.

    embedding  [1, C, h, w]
    truth      [N, height, width]  bool
    """
    rows = torch.zeros(len(truth), dtype=torch.long, device=truth.device)
    points, labels = truth.new_empty(len(truth), 0, 2, dtype=torch.float), rows.new_empty(len(truth), 0)
    boxes, boxed = points.new_zeros(len(truth), 4), torch.zeros_like(rows, dtype=torch.bool)
    found, masks, logits = [], torch.zeros_like(truth), None
    for number in range(clicks):
        errors = zip((truth & ~masks).cpu().numpy(), (masks & ~truth).cpu().numpy(), strict=True)
        clicked = torch.tensor([centre(missed, wrong) for missed, wrong in errors], device=truth.device)
        there = to_frame(clicked[:, :2].float(), photograph.original, photograph.inside)
        points, labels = torch.cat([points, there[:, None]], 1), torch.cat([labels, clicked[:, 2:]], 1)
        prompts = Prompts(points, labels, boxes, boxed, logits)
        logits = model.answer(embedding, rows, prompts, several=number == 0).best().float()
        masks = at_photograph(logits, photograph)
        found.append(Found(masks, prompts))
    return found


def by_box(model: Segmenter, embedding: Tensor, photograph: Photograph, truth: Tensor) -> Found:
    """What is found in the smallest box round each object: the mask that the model takes for the best of its three."""
    rows = torch.zeros(len(truth), dtype=torch.long, device=truth.device)
    edges = []
    for mask in truth:
        y, x = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        edges.append(torch.stack([x[0], y[0], x[-1] + 1, y[-1] + 1]))
    boxes = edges_to_frame(torch.stack(edges).float(), photograph.original, photograph.inside)
    nowhere = boxes.new_zeros(len(truth), 1, 2)
    prompts = Prompts(nowhere, torch.full_like(rows, NONE)[:, None], boxes, torch.ones_like(rows, dtype=torch.bool))
    answer = model.answer(embedding, rows, prompts, several=True)
    return Found(at_photograph(answer.best(), photograph), prompts)


def at_photograph(logits: Tensor, photograph: Photograph) -> Tensor:
    """Masks bool [N, height, width] of logits [N, 1, S/4, S/4]."""
    return (to_photograph(logits, photograph.side, photograph.inside, photograph.original) > 0)[:, 0]


@torch.inference_mode()
def score(
    models: dict[str, Segmenter],
    batches: Iterable[dict[str, Any]],
    normalise: Callable[[Tensor], Tensor],
    clicks: Sequence[int],
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Mean IoU over all objects, for each model.

    batches    of one photograph with all its masks: images uint8 [1, 3, S, S], inside, originals [1, 2], masks
               [N, height, width]
    returns    name -> {"clicks": {number: mIoU}, "box": mIoU, "objects": number}
    """
    sums = {name: torch.zeros(max(clicks) + 1, dtype=torch.float64) for name in models}
    objects = 0
    for batch in batches:
        photograph = photograph_of(batch, normalise, device)
        everything = batch["masks"].to(device)
        everything = everything[everything.flatten(1).any(1)]
        objects += len(everything)
        for name, model in models.items():
            embedding = model(photograph.images)
            for truth in everything.split(CHUNK):
                found = by_clicks(model, embedding, photograph, truth, max(clicks))
                found.append(by_box(model, embedding, photograph, truth))
                sums[name] += torch.stack([intersection_over_union(each.masks, truth).sum() for each in found]).cpu()
    means = {name: (total / objects).tolist() for name, total in sums.items()}
    return {
        name: {"clicks": {number: mean[number - 1] for number in clicks}, "box": mean[-1], "objects": objects}
        for name, mean in means.items()
    }


def photograph_of(batch: dict[str, Any], normalise: Callable[[Tensor], Tensor], device: torch.device) -> Photograph:
    """The one photograph of such a batch."""
    images = blank_outside(normalise(batch["images"].to(device)), batch["inside"].to(device))
    inside, original = (tuple(batch[name][0].tolist()) for name in ("inside", "originals"))
    return Photograph(images, images.shape[-1], inside, original)
