"""Simulated interactive session: a prompt, then corrections, a loss for every answer."""

from typing import NamedTuple

import torch
from torch import Tensor

from mae.sam.loss import intersection_over_union, mask_losses, relevance_alignment_loss
from mae.sam.prompts import add_click, first_prompts
from mae.sam.segmenter import Segmenter

ANSWERS_WITHOUT_CLICK = 2


class Session(NamedTuple):
    """Loss, mean over objects and answers, with gradients; mean IoU of the first and of the last answer."""

    loss: Tensor
    first_iou: Tensor
    last_iou: Tensor


def simulate_session(
    model: Segmenter,
    embedding: Tensor,
    masks: Tensor,
    rows: Tensor,
    *,
    clicks: int,
    box_share: float,
    alignment: float = 0.0,
    generator: torch.Generator,
) -> Session:
    """Simulates the sessions of a batch (Kirillov et al. 2023, appendix A, "Training algorithm").

    1  a point or a box, answered by three masks of which the best counts
    2  `clicks` corrections: each adds a click into the error of the answer before, and that answer's logits
    3  two answers to the logits without a new click: one at a random place among the corrections, one at the end

    8 clicks make 11 answers, as in the paper.

    embedding  [B, C, h, w]
    masks      [N, S/4, S/4]  true inside the object
    rows       [N]            the image of each
    alignment  weight of `relevance_alignment_loss`, for a model with relevance
    """
    prompts = first_prompts(masks, box_share, generator)
    answers = 1 + clicks + ANSWERS_WITHOUT_CLICK
    place = int(torch.randint(1, answers - 1, (1,), generator=generator, device=masks.device))
    losses, ious = [], []
    for number in range(answers):
        if number > 0 and number not in (place, answers - 1):
            assert prompts.logits is not None
            prompts = add_click(prompts, masks, prompts.logits[:, 0] > 0, generator)
        answer = model.answer(embedding, rows, prompts, several=number == 0)
        losses.append(mask_losses(answer.logits, answer.ious, masks).mean())
        if answer.gate is not None and alignment:
            losses[-1] = losses[-1] + alignment * relevance_alignment_loss(answer.gate, masks[:, None])
        best = answer.best().detach().float()
        ious.append(intersection_over_union(best[:, 0] > 0, masks).mean())
        prompts = prompts._replace(logits=best)
    return Session(torch.stack(losses).mean(), ious[0], ious[-1])
