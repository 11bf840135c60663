"""The SAM-style encoder is the same function as segment-anything's, forward and backward, at any size."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mae.models import relative_attention
from mae.models.resample import resize_positions
from mae.models.sam import SIZES, SamConfig, SamEncoder

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


@pytest.mark.parametrize("chunk", [2**21, 2000], ids=["at once", "in chunks"])
@pytest.mark.parametrize("size", [(160, 160), (128, 128), (96, 224), (32, 400)], ids=str)
def test_output_and_gradients_equal_segment_anythings(size: tuple[int, int], chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(relative_attention, "CHUNK", chunk)
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
def test_sizes_have_the_published_number_of_parameters(size: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in SamEncoder(SIZES[size]).parameters()) == count
