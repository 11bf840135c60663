"""Simulated interactive session: a prompt, then corrections, a loss for every answer."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mae.sam.loss import intersection_over_union, mask_losses, relevance_alignment_loss
from mae.sam.prompts import Draws, add_click, draw_uniform, first_prompts
from mae.sam.segmenter import Segmenter

ANSWERS_WITHOUT_CLICK = 2
PLACE = 0x5EED  # tells the draw of the place of a repeated answer from the others


class Session(NamedTuple):
    """Loss, mean over objects and answers, with gradients; mean IoU of the first and of the last answer."""

    loss: Tensor
    first_iou: Tensor
    last_iou: Tensor


def count_answers(clicks: int, mask_input: bool) -> int:
    """Returns the number of answers in a session: to the first prompt, to each click, and to the mask alone."""
    return 1 + clicks + (ANSWERS_WITHOUT_CLICK if mask_input else 0)


def draw_session(objects: int, clicks: int, mask_input: bool, generator: torch.Generator) -> Draws:
    """Draws the random numbers of the sessions of a batch, on the generator's device."""
    device, answers = generator.device, count_answers(clicks, mask_input)
    boxed, first = (draw_uniform(objects, generator) for _ in range(2))
    noise = torch.randn(objects, 4, generator=generator, device=device)
    repeats: tuple[int, ...] = ()
    if mask_input:
        # Of the same seed on the host, which would wait for a number that is drawn on a GPU.
        seed = generator.initial_seed() ^ PLACE
        place = int(torch.randint(1, answers - 1, (1,), generator=torch.Generator().manual_seed(seed)))
        repeats = place, answers - 1
    further = [draw_uniform(objects, generator) for _ in range(clicks)]
    return Draws(boxed, noise, torch.stack([first, *further]), repeats)


def simulate_session(
    model: Segmenter,
    embedding: Tensor,
    masks: Tensor,
    rows: Tensor,
    draws: Draws,
    *,
    box_share: float,
    mask_input: bool = True,
    multimask: bool = True,
    alignment: float = 0.0,
    at_a_time: int | None = None,
) -> Session:
    """Simulates the sessions of a batch (Kirillov et al. 2023, appendix A, "Training algorithm").

    1  a point or a box, answered by three masks of which the best counts
    2  `clicks` corrections: each adds a click into the error of the answer before, and that answer's logits
    3  two answers to the logits without a new click: one at a random place among the corrections, one at the end

    8 clicks make 11 answers, as in the paper.

    embedding   [B, C, h, w]
    masks       [N, S/4, S/4]  true inside the object
    rows        [N]            the image of each
    draws       of `draw_session`, with the same number of clicks and `mask_input`
    mask_input  give the logits of the answer before as a prompt; without them there is no step 3
    multimask   answer the first prompt by three masks; else by one, as all later ones
    alignment   weight of `relevance_alignment_loss`, for a model with relevance
    at_a_time   objects whose activations are held at a time: the others' are computed again in the backward pass. The
                same loss to rounding; None: those of all
    """
    asking: dict[str, Any] = {"mask_input": mask_input, "multimask": multimask, "alignment": alignment}
    simulate = partial(_simulate, model, embedding, box_share=box_share, **asking)
    if at_a_time is None or at_a_time >= len(masks):
        return simulate(masks, rows, draws)
    parts = []
    for first in range(0, len(masks), at_a_time):
        part = slice(first, first + at_a_time)
        asked = masks[part], rows[part], draws.of(part)
        if torch.is_grad_enabled():
            means: Any = checkpoint(simulate, *asked, use_reentrant=False, preserve_rng_state=False)
        else:
            means = simulate(*asked)
        parts.append(torch.stack(means) * len(asked[0]) / len(masks))
    return Session(*torch.stack(parts).sum(0))


def _simulate(
    model: Segmenter,
    embedding: Tensor,
    masks: Tensor,
    rows: Tensor,
    draws: Draws,
    *,
    box_share: float,
    mask_input: bool,
    multimask: bool,
    alignment: float,
) -> Session:
    """Simulates the sessions of some objects, all at once."""
    prompts = first_prompts(masks, box_share, draws)
    clicks = iter(draws.clicks[1:])
    losses, ious = [], []
    predicted = torch.zeros_like(masks)
    for number in range(len(draws.clicks) + len(draws.repeats)):
        if number > 0 and number not in draws.repeats:
            prompts = add_click(prompts, masks, predicted, next(clicks))
        answer = model.answer(embedding, rows, prompts, several=multimask and number == 0)
        losses.append(mask_losses(answer.logits, answer.ious, masks).mean())
        if answer.gate is not None and alignment:
            losses[-1] = losses[-1] + alignment * relevance_alignment_loss(answer.gate, masks[:, None])
        best = answer.best().detach().float()
        predicted = best[:, 0] > 0
        ious.append(intersection_over_union(predicted, masks).mean())
        if mask_input:
            prompts = prompts._replace(logits=best)
    return Session(torch.stack(losses).mean(), ious[0], ious[-1])
