"""The relevance-aware encoder changes nothing until it is trained, and shows the attention that there really is."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from skimage.data import astronaut
from torch import Tensor, nn

from mae.sam.encoder import SamConfig, SamEncoder
from mae.sam.loss import relevance_alignment_loss
from mae.sam.pictures import overlay, save_overlays
from mae.sam.relevance import RelevanceAwareEncoder

image_encoder = pytest.importorskip("segment_anything.modeling.image_encoder")

# A grid of 5 x 5 in windows of 3: the windows at two edges are filled up.
SMALL = SamConfig(image_size=80, patch_size=16, width=32, depth=3, num_heads=2, window=3, global_blocks=(1,))


def encoder_of(config: SamConfig = SMALL) -> SamEncoder:
    """Nothing left at zero: positions, relative positions, biases and norms too."""
    torch.manual_seed(0)
    encoder = SamEncoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim != 4 else 0.05))
    return encoder


def trained() -> RelevanceAwareEncoder:
    """Draws all weights, as if it had been trained."""
    model = RelevanceAwareEncoder(encoder_of())
    with torch.no_grad():
        for parameter in (*model.projection.parameters(), *model.gate.parameters(), *model.attention.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompts", [None, 3])
def test_untrained_relevance_encoder_gives_the_embedding_of_its_encoder(
    prompts: int | None, precision: torch.dtype
) -> None:
    encoder = encoder_of()
    model = RelevanceAwareEncoder(encoder)
    images = torch.randn(2, 3, 80, 80)
    asked = None if prompts is None else torch.randn(2, prompts, 256)
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        features, maps = model(images, asked)
        assert torch.equal(features, encoder(images))
    assert (maps.gate is None) == (asked is None)


def test_features_without_prompts_equal_the_projected_ones() -> None:
    model = trained()
    features, maps = model(torch.randn(1, 3, 80, 80))
    assert torch.equal(features, maps.propositional)
    assert not torch.equal(features, model.encoder(torch.randn(1, 3, 80, 80)))


def test_prompts_scale_the_features_by_the_gate_in_any_prompt_order() -> None:
    model = trained()
    images, prompts = torch.randn(2, 3, 80, 80), torch.randn(2, 4, 256)
    features, maps = model(images, prompts)
    assert torch.allclose(features, maps.propositional * 2 * maps.gate[:, None])
    shuffled = model(images, prompts[:, torch.tensor([2, 0, 3, 1])])[0]
    assert torch.allclose(features, shuffled, atol=1e-5)
    assert not torch.allclose(features, model(images, torch.randn(2, 4, 256))[0], atol=1e-3)


def test_relevance_maps_have_the_grid_of_the_image() -> None:
    features, maps = trained()(torch.randn(2, 3, 96, 64), torch.randn(2, 4, 256), procedural=True)
    assert features.shape == maps.propositional.shape == (2, 256, 6, 4)
    assert maps.gate.shape == (2, 6, 4)
    assert maps.prompts.shape == (2, 8, 4, 6, 4)
    assert maps.perspectival.shape == (2, 8, 32, 6, 4)
    assert maps.procedural.attention.shape == (2, 3, 2, 6, 4)
    assert maps.procedural.rollout.shape == maps.procedural.mean.shape == (2, 3, 6, 4)
    assert torch.allclose(maps.prompts.sum(2), torch.ones(2, 8, 6, 4))
    for shares in maps.procedural:
        assert torch.allclose(shares.sum((-2, -1)), torch.ones(()), atol=1e-5)


def peers_attention(encoder: SamEncoder, images: Tensor) -> list[Tensor]:
    """Returns the softmax of segment-anything's own blocks, [B, heads, N, N] over the image, padding left out."""
    config = encoder.config
    theirs = image_encoder.ImageEncoderViT(
        img_size=80,
        patch_size=16,
        embed_dim=32,
        depth=3,
        num_heads=2,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=config.window,
        global_attn_indexes=config.global_blocks,
    )
    theirs.load_state_dict(encoder.state_dict())
    seen: list[Tensor] = []
    for block in theirs.blocks:
        block.attn.register_forward_pre_hook(lambda attn, args: seen.append(_explicit(attn, args[0])))
    with torch.no_grad():
        theirs(images)
    found = []
    numbers = torch.arange(25).view(1, 5, 5, 1).float() + 1
    for weights in seen:
        if len(weights) == len(images):
            found.append(weights)
            continue
        windows, _ = image_encoder.window_partition(numbers, config.window)
        whole = torch.zeros(len(images), 2, 25, 25)
        for number, window in enumerate(weights):
            image, place = divmod(number, len(windows))
            ids = windows[place].flatten().long()
            inside = window[:, ids > 0][..., ids > 0]
            ids = ids[ids > 0] - 1
            whole[image][:, ids[:, None], ids] = inside / inside.sum(-1, keepdim=True)
        found.append(whole)
    return found


def _explicit(attn: nn.Module, x: Tensor) -> Tensor:
    """softmax(q·k·scale + decomposed relative positions), with segment-anything's functions: [b, heads, n, n]."""
    b, h, w, _ = x.shape
    q, k, _ = rearrange(attn.qkv(x), "b h w (three n d) -> three (b n) (h w) d", three=3, n=attn.num_heads)
    scores = (q * attn.scale) @ k.mT
    scores = image_encoder.add_decomposed_rel_pos(scores, q, attn.rel_pos_h, attn.rel_pos_w, (h, w), (h, w))
    return rearrange(scores.softmax(-1), "(b n) q k -> b n q k", b=b)


def test_attention_and_rollout_equal_those_of_segment_anything() -> None:
    encoder = encoder_of()
    images = torch.randn(2, 3, 80, 80)
    expected = torch.eye(25).expand(2, -1, -1)
    rollouts = RelevanceAwareEncoder(encoder).rollouts(images)
    for (received, rollout), weights in zip(rollouts, peers_attention(encoder, images), strict=True):
        assert torch.allclose(received, weights.mean(2), atol=1e-6)
        expected = (0.5 * torch.eye(25) + 0.5 * weights.mean(1)) @ expected
        assert torch.allclose(rollout, expected, atol=1e-6)
        assert torch.allclose(rollout.sum(-1), torch.ones(2, 25), atol=1e-5)


def test_gradients_reach_gate_projection_and_encoder() -> None:
    model = RelevanceAwareEncoder(encoder_of())
    images, prompts = torch.randn(2, 3, 80, 80), torch.randn(2, 3, 256)
    masks = torch.zeros(2, 3, 80, 80, dtype=torch.bool)
    masks[:, 0, :32, :32] = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # what feeds a layer of zeros learns from the second step on
        optimizer.zero_grad()
        features, maps = model(images, prompts)
        (relevance_alignment_loss(maps.gate, masks) + (features - 1).square().mean()).backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_alignment_loss_is_lowest_for_a_gate_equal_to_the_union_of_the_masks() -> None:
    masks = torch.zeros(1, 2, 64, 64, dtype=torch.bool)
    masks[:, 0, :32], masks[:, 1, :, :32] = True, True
    union = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    assert relevance_alignment_loss(union, masks) < 1e-5
    assert relevance_alignment_loss(torch.full((1, 2, 2), 0.5), masks) == pytest.approx(0.6931, abs=1e-4)
    assert relevance_alignment_loss(1 - union, masks) > 5


def test_overlay_colours_the_map_and_keeps_the_image_elsewhere() -> None:
    image = torch.full((3, 64, 64), 0.5)
    relevance = torch.zeros(4, 4)
    relevance[:2, :2] = 1
    picture = torch.from_numpy(np.array(overlay(image, relevance)))
    assert (picture[40:, 40:] == 128).all()
    assert (picture[:16, :16].float() - 128).abs().sum(-1).min() > 60
    spanned = torch.from_numpy(np.array(overlay(image, torch.full((4, 4), 0.5), span=(0, 1))))
    assert (spanned == spanned[0, 0]).all() and not (spanned == 128).all()
    assert (torch.from_numpy(np.array(overlay(image, torch.zeros(4, 4), span=(0, 0)))) == 128).all()


def test_overlays_of_a_photograph_are_written_for_each_block(tmp_path: Path) -> None:
    photograph = torch.from_numpy(astronaut()).permute(2, 0, 1)[:, :80, :80].float() / 255
    maps = RelevanceAwareEncoder(encoder_of()).block_maps(photograph[None])
    paths = save_overlays(tmp_path / "maps", photograph, {"mean": maps.mean[0], "rollout": maps.rollout[0]})
    assert [path.name for path in paths][:2] == ["block-00-mean.png", "block-00-rollout.png"]
    assert len(paths) == 2 * SMALL.depth
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size == (80, 80)
