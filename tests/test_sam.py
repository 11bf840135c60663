"""The SAM-style encoder is the same function as segment-anything's, forward and backward, at any size."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mae.errors import ConfigError
from mae.models.resample import resize_positions
from mae.sam import attention as relative_attention
from mae.sam.encoder import SIZES, SamConfig, SamEncoder

image_encoder = pytest.importorskip("segment_anything.modeling.image_encoder")

SMALL = SamConfig(image_size=160, patch_size=16, width=48, depth=4, num_heads=3, window=4, global_blocks=(1, 3))


def randomised(model: nn.Module) -> nn.Module:
    """Nothing left at zero: positions, relative positions, biases and norms too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim != 4 else 0.05))
    return model


def peer(config: SamConfig, ours: SamEncoder) -> nn.Module:
    """segment-anything's encoder with the weights of ours."""
    theirs = image_encoder.ImageEncoderViT(
        img_size=config.image_size[0],
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        out_chans=config.out_channels,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=config.window,
        global_attn_indexes=config.global_blocks,
    )
    theirs.load_state_dict(ours.state_dict())
    return theirs


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(("short", "chunk"), [(32, 2**20), (0, 2**20), (0, 1000)], ids=["short", "long", "chunks"])
@pytest.mark.parametrize("size", [(160, 160), (128, 128), (96, 224), (32, 400)], ids=str)
def test_sam_output_and_gradients_equal_those_of_segment_anything(
    size: tuple[int, int], short: int, chunk: int, monkeypatch
) -> None:
    monkeypatch.setattr(relative_attention, "SHORT_ROW", short)
    monkeypatch.setattr(relative_attention, "SCORES_PER_THREAD", chunk)
    ours = randomised(SamEncoder(SMALL))
    theirs = peer(SMALL, ours)
    # The peer takes images of one size only, as far as its positions go.
    grid = size[0] // 16, size[1] // 16
    theirs.pos_embed = nn.Parameter(resize_positions(theirs.pos_embed.detach(), grid))
    images = torch.randn(2, 3, *size)
    embedding, expected = ours(images), theirs(images)
    assert embedding.shape == (2, 256, *grid)
    assert relative_difference(embedding, expected) <= 1e-5
    with torch.no_grad():
        assert relative_difference(ours(images), expected) <= 1e-5

    weight = torch.randn_like(expected)
    (embedding * weight).sum().backward()
    (expected * weight).sum().backward()
    expected_gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient, expected_gradient = parameter.grad, expected_gradients[name].grad
        if name == "pos_embed" and grid != SMALL.grid:
            continue
        assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm(), name


@pytest.mark.parametrize(
    ("size", "count"), [("sam_base", 89_670_912), ("sam_large", 308_278_272), ("sam_huge", 637_026_048)]
)
def test_sam_sizes_have_the_published_number_of_parameters(size: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in SamEncoder(SIZES[size]).parameters()) == count


def test_sam_checkpointing_and_fused_attention_give_the_same_gradients(monkeypatch) -> None:
    encoder = randomised(SamEncoder(SMALL))
    images = torch.randn(1, 3, 160, 160)
    expected = encoder(images)
    expected.sum().backward()
    gradients = [parameter.grad for parameter in encoder.parameters()]
    encoder.zero_grad()
    encoder.checkpointing = True
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    embedding = encoder(images)
    embedding.sum().backward()
    assert relative_difference(embedding, expected) <= 1e-5
    for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_attention_probabilities_mix_the_values_as_the_block_does() -> None:
    encoder = randomised(SamEncoder(SMALL)).eval()
    with torch.no_grad():
        for block, (q, k, v, rows, columns) in enumerate(encoder.attentions(torch.randn(2, 3, 96, 160))):
            groups = 2 * 3 * (1 if block in SMALL.global_blocks else 2 * 3)
            assert len(q) == groups
            probabilities = relative_attention.attention_probabilities(q, k, rows, columns)
            torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(q.shape[:2]))
            mixed = relative_attention.relative_attention(q, k, v, rows, columns)
            torch.testing.assert_close(probabilities @ v, mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(128, 160), (160, 128)])
def test_sam_embedding_in_bfloat16_stays_near_float32(size: tuple[int, int]) -> None:
    encoder = randomised(SamEncoder(SMALL)).eval()
    images = torch.randn(1, 3, *size)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = encoder(images)
    with torch.no_grad():
        assert relative_difference(embedding.float(), encoder(images)) <= 0.1


def test_image_size_that_cuts_a_patch_raises_config_error() -> None:
    with pytest.raises(ConfigError, match="image_size width 100 is not a multiple of patch_size=16"):
        SamEncoder(SMALL)(torch.randn(1, 3, 96, 100))
