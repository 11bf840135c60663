"""Segmentation scores: mean IoU by number of clicks and by box, at the resolution of the photographs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from mae.sam.loss import intersection_over_union
from mae.sam.prompts import bounding_boxes
from mae.sam.segmenter import BACKGROUND, FOREGROUND, NONE, Prompts, Segmenter
from mae.sam.square_frame import Size, blank_padding, boxes_to_frame, maps_to_photograph, points_to_frame

OBJECTS_AT_A_TIME = 16  # bounds the memory of masks at the resolution of the photograph
STABILITY_OFFSET = 1.0  # of the logits


class Photograph(NamedTuple):
    """One photograph in its frame: images [1, 3, S, S] normalised, side S, size in the frame, original size."""

    images: Tensor
    side: int
    inside: Size
    original: Size


class Found(NamedTuple):
    """Answers to prompts on a photograph.

    masks    bool [N, height, width] of the photograph
    ious     [N]                     their IoUs as the model predicts them
    logits   [N, 1, S/4, S/4]        above 0 inside the masks
    prompts  in pixels of the frame
    """

    masks: Tensor
    ious: Tensor
    logits: Tensor
    prompts: Prompts


class Answered(NamedTuple):
    """What one model finds of some objects of a photograph.

    model       its name
    batch       the photograph, with its sample and key and the numbers of all its annotations
    objects     which of these annotations, as a slice
    photograph  in its frame
    truth       bool [N, height, width]
    found       by number of clicks, and "box"
    """

    model: str
    batch: dict[str, Any]
    objects: slice
    photograph: Photograph
    truth: Tensor
    found: dict[int | str, Found]


def innermost_click(missed: np.ndarray, wrong: np.ndarray) -> tuple[int, int, int]:
    """Returns the next click (x, y, label): the innermost point of the largest error (Sofiiuk et al. 2021).

    missed, wrong  bool [height, width], errors inside the object and beside it; the size of an error is the distance of
                   its innermost point from its edge
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


def by_clicks(
    model: Segmenter,
    embedding: Tensor,
    photograph: Photograph,
    truth: Tensor,
    clicks: int,
    *,
    mask_input: bool = True,
    multimask: bool = True,
) -> list[Found]:
    """Segments objects with 1, 2, … clicks, each into the largest error of the answer before.

    The answer to the first click is the mask with the highest predicted IoU of three; later ones are single masks, for
    which the logits before are a prompt too.

    embedding   [1, C, h, w]
    truth       [N, height, width]  bool
    mask_input  give the logits of the answer before as a prompt
    multimask   answer the first click by three masks; else by one, as all later ones
    """
    rows = torch.zeros(len(truth), dtype=torch.long, device=truth.device)
    points, labels = truth.new_empty(len(truth), 0, 2, dtype=torch.float), rows.new_empty(len(truth), 0)
    boxes, boxed = points.new_zeros(len(truth), 4), torch.zeros_like(rows, dtype=torch.bool)
    found, masks, logits = [], torch.zeros_like(truth), None
    for number in range(clicks):
        errors = zip((truth & ~masks).cpu().numpy(), (masks & ~truth).cpu().numpy(), strict=True)
        clicked = torch.tensor([innermost_click(missed, wrong) for missed, wrong in errors], device=truth.device)
        there = points_to_frame(clicked[:, :2].float(), photograph.original, photograph.inside)
        points, labels = torch.cat([points, there[:, None]], 1), torch.cat([labels, clicked[:, 2:]], 1)
        prompts = Prompts(points, labels, boxes, boxed, logits if mask_input else None)
        answer = model.answer(embedding, rows, prompts, several=multimask and number == 0)
        logits = answer.best().float()
        masks = at_photograph(logits, photograph)
        found.append(Found(masks, answer.ious.amax(1), logits, prompts))
    return found


def by_box(
    model: Segmenter, embedding: Tensor, photograph: Photograph, truth: Tensor, *, multimask: bool = True
) -> Found:
    """Segments objects with the smallest box round each: the mask with the highest predicted IoU."""
    boxes = boxes_to_frame(bounding_boxes(truth), photograph.original, photograph.inside)
    boxed = torch.ones(len(truth), dtype=torch.bool, device=truth.device)
    no_point, no_label = boxes.new_zeros(len(truth), 1, 2), torch.full_like(boxed, NONE, dtype=torch.long)[:, None]
    return by_prompts(model, embedding, photograph, Prompts(no_point, no_label, boxes, boxed), multimask=multimask)


def by_prompts(
    model: Segmenter, embedding: Tensor, photograph: Photograph, prompts: Prompts, *, multimask: bool = True
) -> Found:
    """Segments with given prompts: the mask with the highest predicted IoU, of three with `multimask`."""
    rows = torch.zeros_like(prompts.boxed, dtype=torch.long)
    answer = model.answer(embedding, rows, prompts, several=multimask)
    return Found(at_photograph(answer.best(), photograph), answer.ious.amax(1), answer.best(), prompts)


def at_photograph(logits: Tensor, photograph: Photograph) -> Tensor:
    """Returns masks bool [N, height, width] of logits [N, 1, S/4, S/4]."""
    return (maps_to_photograph(logits, photograph.side, photograph.inside, photograph.original) > 0)[:, 0]


def stability(found: Found, photograph: Photograph) -> Tensor:
    """Returns the stability scores [N] of masks: the IoU of those at logits above 1 and above -1, as in SA-1B.

    A mask that is empty at both has 0.
    """
    logits = maps_to_photograph(found.logits, photograph.side, photograph.inside, photograph.original)[:, 0]
    inner, outer = ((logits > limit).sum((1, 2)) for limit in (STABILITY_OFFSET, -STABILITY_OFFSET))
    return inner / outer.clamp(min=1)


@torch.inference_mode()
def score(
    models: dict[str, Segmenter],
    batches: Iterable[dict[str, Any]],
    normalise: Callable[[Tensor], Tensor],
    clicks: Sequence[int],
    device: torch.device,
    *,
    mask_input: bool = True,
    multimask: bool = True,
    keep: Callable[[Answered], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Computes the mean IoU over all objects, for each model.

    batches    one photograph each, with all its masks: images uint8 [1, 3, S, S], inside, originals [1, 2], masks, of
               which `stack(first, stop)` gives some, bool [n, height, width]
    mask_input, multimask  as in `by_clicks`
    keep       called with what each model finds, a few objects at a time
    returns    name -> {"clicks": {number: mIoU}, "box": mIoU, "objects": number}; {} if there is no object
    """
    sums = {name: torch.zeros(max(clicks) + 1, dtype=torch.float64) for name in models}
    objects = 0
    for batch in batches:
        photograph = photograph_of(batch, normalise, device)
        coded = batch["masks"]
        if len(coded) == 0:
            continue
        objects += len(coded)
        embeddings = {name: model(photograph.images) for name, model in models.items()}
        for first in range(0, len(coded), OBJECTS_AT_A_TIME):
            part = slice(first, first + OBJECTS_AT_A_TIME)
            truth = torch.from_numpy(coded.stack(part.start, part.stop)).to(device)
            for name, model in models.items():
                asked = model, embeddings[name], photograph, truth
                found = by_clicks(*asked, max(clicks), mask_input=mask_input, multimask=multimask)
                found.append(by_box(*asked, multimask=multimask))
                sums[name] += torch.stack([intersection_over_union(each.masks, truth).sum() for each in found]).cpu()
                if keep is not None:
                    named: dict[int | str, Found] = {count: found[count - 1] for count in clicks}
                    keep(Answered(name, batch, part, photograph, truth, named | {"box": found[-1]}))
    if objects == 0:
        return {}
    means = {name: (total / objects).tolist() for name, total in sums.items()}
    return {
        name: {"clicks": {number: mean[number - 1] for number in clicks}, "box": mean[-1], "objects": objects}
        for name, mean in means.items()
    }


def photograph_of(batch: dict[str, Any], normalise: Callable[[Tensor], Tensor], device: torch.device) -> Photograph:
    """Returns the one photograph of such a batch, normalised and padded."""
    images = blank_padding(normalise(batch["images"].to(device)), batch["inside"].to(device))
    inside, original = (tuple(batch[name][0].tolist()) for name in ("inside", "originals"))
    return Photograph(images, images.shape[-1], inside, original)
