"""Prompts, masks and their losses: the same function as the libraries', the draws a function of the seed."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mae.errors import ConfigError
from mae.formats.sam_names import from_segment_anything, to_segment_anything
from mae.formats.segment_anything import peer_sam
from mae.sam.encoder import SamConfig, SamEncoder
from mae.sam.loss import dice_loss, focal_loss, intersection_over_union, mask_losses
from mae.sam.prompts import Draws, add_click, bounding_boxes, click, first_prompts
from mae.sam.scores import innermost_click
from mae.sam.segmenter import BACKGROUND, FOREGROUND, NONE, STRIDE, Prompts, Segmenter
from mae.sam.session import draw_session, simulate_session
from tests.test_sam import randomised

pytest.importorskip("transformers")
SMALL = SamConfig(image_size=64, width=48, depth=2, num_heads=3, window=2, global_blocks=(1,), out_channels=64)


def small(**settings) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(SamEncoder(SMALL), **settings).eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(objects: int = 6, clicks: int = 0, seed: int = 0, mask_input: bool = True) -> Draws:
    return draw_session(objects, clicks, mask_input, generator(seed))


def some_masks(count: int = 6, side: int = 16) -> Tensor:
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for number in range(count):
        masks[number, number : number + 6, 2 : 5 + number] = True
    return masks


# The model.


@torch.no_grad()
def test_autocast_does_not_move_prompts() -> None:
    model, masks = randomised(small()), some_masks()
    assert isinstance(model, Segmenter)
    prompts = first_prompts(masks, 0.5, draws())._replace(logits=torch.randn(6, 1, 16, 16).bfloat16())
    (points, dense), positions = model.embed(prompts), model.positions()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.embed(prompts), (points, dense))
        torch.testing.assert_close(model.positions(), positions)


@pytest.mark.parametrize("logits", [False, True])
@torch.no_grad()
def test_segmenter_answers_each_kind_of_prompt_as_segment_anything(logits: bool) -> None:
    model = randomised(small())
    assert isinstance(model, Segmenter)
    peer = peer_sam(SMALL)
    peer.load_state_dict(to_segment_anything(model.other_parts()), strict=False)
    peer.image_encoder.load_state_dict(model.encoder.state_dict())
    back = from_segment_anything(peer.state_dict())
    assert all(torch.equal(value, model.other_parts()[key]) for key, value in back.items())
    assert back.keys() == model.other_parts().keys()

    embedding = model(torch.randn(2, 3, 64, 64))
    rows = torch.tensor([0, 1, 1])
    points = torch.tensor([[[3.0, 5], [60, 2]], [[0, 0], [20, 33]], [[9, 9], [1, 50]]])
    labels = torch.tensor([[FOREGROUND, BACKGROUND], [NONE, FOREGROUND], [NONE, NONE]])
    boxes = torch.tensor([[0.0] * 4, [8, 4, 40, 30], [0, 0, 64, 64]])
    before = torch.randn(3, 1, 16, 16) if logits else None
    prompts = Prompts(points, labels, boxes, torch.tensor([False, True, True]), before)
    for several in (True, False):
        answer = model.answer(embedding, rows, prompts, several=several)
        for number in range(3):
            one = slice(number, number + 1)
            boxed = bool(prompts.boxed[number])
            asked = (points[one, int(boxed) :], labels[one, int(boxed) :])
            sparse, dense = peer.prompt_encoder(
                asked, boxes[one] if boxed else None, None if before is None else before[one]
            )
            image = embedding[rows[one]]
            masks, ious = peer.mask_decoder(image, peer.prompt_encoder.get_dense_pe(), sparse, dense, several)
            torch.testing.assert_close(answer.logits[one], masks, rtol=1e-4, atol=1e-4 * float(masks.abs().max()))
            torch.testing.assert_close(answer.ious[one], ious, rtol=1e-4, atol=1e-4)


def test_segmenter_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small(checkpointing=checkpointing).train()
        embedding = model(torch.ones(1, 3, 64, 64))
        masks, rows = some_masks(), torch.zeros(6, dtype=torch.long)
        simulate_session(model, embedding, masks, rows, draws(clicks=2), box_share=0.5).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if name == "prompt_encoder.shared_embedding.positional_embedding":
            assert gradient is None  # fixed, as segment-anything has it
            continue
        assert gradient is not None, f"{name} gets no gradient: ranks would wait for it"
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_untrained_gate_changes_no_mask_and_learns_from_alignment_only() -> None:
    plain, gated = small(), small(relevance=True)
    gated.load_state_dict(plain.state_dict(), strict=False)
    embedding, rows = plain(torch.ones(1, 3, 64, 64)), torch.zeros(6, dtype=torch.long)
    prompts = first_prompts(some_masks(), 0.5, draws())
    one, other = (model.answer(embedding, rows, prompts, several=True) for model in (plain, gated))
    torch.testing.assert_close(other.logits, one.logits)
    assert one.gate is None and other.gate is not None and other.gate.shape == (6, 4, 4)
    with torch.enable_grad():
        for alignment in (0.0, 0.3):
            asked = gated, embedding, some_masks(), rows, draws()
            session = simulate_session(*asked, box_share=0.5, alignment=alignment)
            gated.zero_grad()
            session.loss.backward()
            bias = gated.get_parameter("relevance.gate.bias").grad
            assert bias is not None and bool(bias.abs() > 0.01) == (alignment > 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (64, 96)}, r"image_size=\[64, 96\] is not square, .*: set task.image_size to one number"),
        ({"patch_size": 8}, "patch_size=8 does not fit SAM's masks, .*: set it to 16"),
        ({"out_channels": 48}, "out_channels=48 is not a multiple of 32, .*: set task.out_channels"),
    ],
)
def test_architecture_that_sam_cannot_have_raises_config_error(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Segmenter(SamEncoder(SamConfig(**SMALL.model_dump() | fields)))


def test_segmenter_without_transformers_raises_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers.models.sam.modeling_sam", None)
    with pytest.raises(ConfigError, match=r"pip install 'mae-pretrain\[sam\]'"):
        small()


# Losses.


def test_mask_losses_and_iou_equal_their_formulae() -> None:
    logits, masks = torch.randn(3, 5, 5), torch.rand(3, 5, 5) < 0.4
    p = logits.sigmoid()
    focal = torch.where(masks, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()).mean((1, 2))
    torch.testing.assert_close(focal_loss(logits, masks), focal)
    dice = 1 - (2 * (p * masks).sum((1, 2)) + 1) / (p.sum((1, 2)) + masks.sum((1, 2)) + 1)
    torch.testing.assert_close(dice_loss(logits, masks), dice)
    one, other = logits > 0, masks
    expected = [float((a & b).sum() / (a | b).sum()) for a, b in zip(one, other, strict=True)]
    assert intersection_over_union(one, other).tolist() == pytest.approx(expected)
    empty = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert intersection_over_union(empty, empty).item() == 1


def test_loss_corrects_the_best_of_three_masks_and_all_three_ious() -> None:
    masks = some_masks(2)
    logits = torch.randn(2, 3, 16, 16)
    logits[0, 1] = torch.where(masks[0], 4.0, -4.0)
    logits[1, 2] = torch.where(masks[1], 4.0, -4.0)
    logits.requires_grad_()
    ious = torch.rand(2, 3, requires_grad=True)
    losses = mask_losses(logits, ious, masks)
    losses.sum().backward()
    assert logits.grad is not None and ious.grad is not None
    changed = logits.grad.flatten(2).abs().sum(-1) > 0
    assert changed.tolist() == [[False, True, False], [False, False, True]]
    assert (ious.grad != 0).all()
    reached = intersection_over_union(logits > 0, masks[:, None].expand(2, 3, 16, 16))
    best = [20 * focal_loss(logits[0, 1], masks[0]) + dice_loss(logits[0, 1], masks[0]),
            20 * focal_loss(logits[1, 2], masks[1]) + dice_loss(logits[1, 2], masks[1])]  # fmt: skip
    expected = torch.stack(best) + (ious - reached).square().mean(1)
    torch.testing.assert_close(losses, expected)


# Prompts.


@given(st.integers(0, 2**31), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_clicks_fall_into_the_error_with_the_label_of_the_object(seed: int, count: int) -> None:
    drawn = generator(seed)
    masks = torch.rand(count, 16, 16, generator=drawn) < 0.3
    masks[:, 4, 4] = True
    predicted = torch.rand(count, 16, 16, generator=drawn) < 0.3
    predicted[0] = masks[0]
    points, labels = click(masks, predicted, torch.rand(count, 1, generator=drawn))
    cells = ((points + 0.5) / STRIDE).floor().long()
    assert torch.equal((cells + 0.5) * STRIDE - 0.5, points)
    for number, ((x, y), label) in enumerate(zip(cells.tolist(), labels.tolist(), strict=True)):
        assert bool(masks[number, y, x]) == (label == FOREGROUND)
        assert number == 0 or masks[number, y, x] != predicted[number, y, x]
    assert labels[0] == FOREGROUND  # nothing is wrong: a point of the object


def test_clicks_are_uniform_over_the_error() -> None:
    masks = torch.zeros(4000, 4, 4, dtype=torch.bool)
    masks[:, 1, 1:3] = masks[:, 3, 3] = True
    points, _ = click(masks, torch.zeros_like(masks), torch.rand(4000, 1, generator=generator()))
    _, counts = points.unique(dim=0, return_counts=True)
    assert len(counts) == 3 and (counts - 4000 / 3).abs().max() < 150


def test_prompt_boxes_are_tight_with_bounded_noise() -> None:
    masks = some_masks()
    tight = bounding_boxes(masks) * STRIDE
    assert tight[2].tolist() == [2 * STRIDE, 2 * STRIDE, 7 * STRIDE, 8 * STRIDE]
    large = torch.ones(300, 256, 256, dtype=torch.bool)
    large[:, :64] = large[:, 192:] = large[:, :, :64] = large[:, :, 192:] = False
    prompts = first_prompts(large, 1.0, draws(300))
    noise = prompts.boxes - bounding_boxes(large) * STRIDE
    assert prompts.boxed.all() and (prompts.labels == NONE).all()
    assert noise.abs().max() == 20  # a tenth of 512 is more than the limit of 20 pixels in 1024
    small = torch.zeros(1000, 256, 256, dtype=torch.bool)
    small[:, 100:110, 100:120] = True
    noise = first_prompts(small, 1.0, draws(1000)).boxes - bounding_boxes(small) * STRIDE
    assert noise.std(0).tolist() == pytest.approx([8, 4, 8, 4], rel=0.15)
    shares = first_prompts(small, 0.25, draws(1000)).boxed.float().mean()
    assert abs(float(shares) - 0.25) < 0.05


def test_session_loss_is_determined_by_its_generator() -> None:
    model = small()
    embedding = model(torch.ones(2, 3, 64, 64)).detach()
    rows = torch.tensor([0, 0, 0, 1, 1, 1])

    def loss(seed: int) -> float:
        torch.rand(3)  # what torch's own generator has drawn before is without effect
        drawn = draws(clicks=3, seed=seed)
        return float(simulate_session(model, embedding, some_masks(), rows, drawn, box_share=0.5).loss.detach())

    assert loss(1) == loss(1) != loss(2)


def test_session_of_eight_clicks_has_eleven_answers_two_to_the_mask_alone(monkeypatch) -> None:
    model, asked = small(), []
    answer = Segmenter.answer

    def listening(self, embedding, rows, prompts, *, several):
        asked.append((prompts.points.shape[1], prompts.logits is not None, several))
        return answer(self, embedding, rows, prompts, several=several)

    monkeypatch.setattr(Segmenter, "answer", listening)
    embedding = model(torch.ones(1, 3, 64, 64)).detach()
    for seed in range(3):
        asked.clear()
        rows = torch.zeros(6, dtype=torch.long)
        simulate_session(model, embedding, some_masks(), rows, draws(clicks=8, seed=seed), box_share=0.5)
        points = [count for count, _, _ in asked]
        assert len(asked) == 11 and points[0] == 1 and points[-1] == points[-2] == 9
        assert sum(b == a for a, b in pairwise(points)) == 2
        assert [logits for _, logits, _ in asked] == [False] + [True] * 10
        assert [several for _, _, several in asked] == [True] + [False] * 10


def test_session_without_mask_input_and_with_one_mask_asks_for_a_click_each_time(monkeypatch) -> None:
    model, asked = small(), []
    answer = Segmenter.answer

    def listening(self, embedding, rows, prompts, *, several):
        asked.append((prompts.points.shape[1], prompts.logits is not None, several))
        return answer(self, embedding, rows, prompts, several=several)

    monkeypatch.setattr(Segmenter, "answer", listening)
    embedding, rows = model(torch.ones(1, 3, 64, 64)).detach(), torch.zeros(6, dtype=torch.long)
    drawn = draws(clicks=3, mask_input=False)
    simulate_session(model, embedding, some_masks(), rows, drawn, box_share=0.5, mask_input=False, multimask=False)
    assert asked == [(points, False, False) for points in (1, 2, 3, 4)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_session_of_a_few_masks_at_a_time_has_the_same_loss_and_gradients(checkpointing: bool) -> None:
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    found = []
    for at_a_time in (None, 4, 1):
        model = small(checkpointing=checkpointing, relevance=True).train()
        embedding = model(torch.ones(2, 3, 64, 64))
        session = simulate_session(
            model, embedding, some_masks(), rows, draws(clicks=2), box_share=0.5, alignment=0.3, at_a_time=at_a_time
        )
        session.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((torch.stack([value.detach() for value in session]), gradients))
    for values, gradients in found[1:]:
        torch.testing.assert_close(values, found[0][0])
        assert gradients.keys() == found[0][1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_innermost_click_falls_in_the_middle_of_the_largest_error() -> None:
    missed, wrong = np.zeros((40, 50), bool), np.zeros((40, 50), bool)
    missed[2:5, 3:6] = True
    wrong[10:31, 20:41] = True
    assert innermost_click(missed, wrong) == (30, 20, BACKGROUND)
    assert innermost_click(missed, wrong & False) == (4, 3, FOREGROUND)
    missed[:] = True
    x, y, label = innermost_click(missed, wrong & False)
    assert label == FOREGROUND and 19 <= y <= 20 and 19 <= x <= 30  # the edge of the image is an edge


def test_added_click_keeps_the_earlier_prompts() -> None:
    masks = some_masks()
    prompts = first_prompts(masks, 0.5, draws())
    more = add_click(prompts, masks, torch.zeros_like(masks), torch.rand(6, 1))
    assert torch.equal(more.points[:, :1], prompts.points) and more.points.shape == (6, 2, 2)
    assert (more.labels[:, 1] == FOREGROUND).all()
    assert F.one_hot(more.labels[:, 0] + 1, 3).sum() == 6
