"""Every kind of mask hides the same number of patches in every image, and follows from that image's noise alone."""

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mae
from mae.models.masking import draw_masking, random_masking
from mae.models.noise import further_noise, uniform_noise
from mae.models.patches import patchify, unpatchify
from mae.probes.trivial_losses import trivial_losses
from tests.test_model import SMALL, model_of

KINDS = ["random", "block", "grid"]


def masks(kind: str, ratio: float = 0.75, images: int = 64, size: tuple[int, int] = (224, 224)) -> Tensor:
    """[B, h, w]"""
    config = mae.MAEConfig(image_size=size, masking=kind, mask_ratio=ratio)
    mask = draw_masking(uniform_noise(0, 1, torch.arange(images), config.patches), config).mask
    return rearrange(mask, "b (h w) -> b h w", h=config.grid[0])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 20), st.integers(1, 20), st.floats(0.02, 0.98), st.integers(0, 2**31))
def test_masks_hide_the_same_number_of_patches_in_each_image(kind, rows, columns, ratio, seed) -> None:
    keep = int(rows * columns * (1 - ratio))
    if not 0 < keep < rows * columns:
        return
    config = mae.MAEConfig(image_size=(rows, columns), patch_size=1, masking=kind, mask_ratio=ratio)
    ids_keep, ids_hidden, mask = draw_masking(uniform_noise(seed, 0, torch.arange(5), rows * columns), config)
    assert mask.sum(1).tolist() == [rows * columns - keep] * 5
    assert torch.equal(mask.nonzero()[:, 1].view(5, -1), ids_hidden)
    assert torch.equal((1 - mask).nonzero()[:, 1].view(5, -1), ids_keep)


@pytest.mark.parametrize("kind", KINDS)
def test_mask_is_determined_by_the_noise_of_its_own_image(kind: str) -> None:
    config = mae.MAEConfig(masking=kind)
    noise = uniform_noise(3, 17, torch.arange(16), config.patches)
    whole = draw_masking(noise, config).mask
    assert torch.equal(draw_masking(noise[5:9], config).mask, whole[5:9])
    assert torch.equal(draw_masking(noise.flip(0), config).mask, whole.flip(0))
    assert torch.equal(draw_masking(noise.clone(), config).mask, whole)


@pytest.mark.parametrize(("kind", "different"), [("random", 64), ("block", 64), ("grid", 4)])
def test_masks_differ_between_images(kind: str, different: int) -> None:
    assert len({tuple(mask.flatten().tolist()) for mask in masks(kind)}) == different


def test_random_masks_equal_those_of_the_paper() -> None:
    config = mae.MAEConfig()
    noise = torch.rand(4, config.patches)
    assert torch.equal(draw_masking(noise, config).mask, random_masking(noise, config.visible).mask)


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_grid_mask_at_ratio_3_4_keeps_alternate_rows_and_columns(size: tuple[int, int]) -> None:
    for mask in masks("grid", size=size):
        rows, columns = (1 - mask).nonzero().T
        assert set((rows - rows[0]).tolist()) == set(range(0, size[0] // 16 - int(rows[0]), 2))
        assert len(set((columns % 2).tolist())) == 1


def test_grid_mask_at_ratio_1_2_is_a_checkerboard() -> None:
    for mask in masks("grid", 0.5):
        assert (mask[1:] != mask[:-1]).all() and (mask[:, 1:] != mask[:, :-1]).all()


def test_grid_mask_at_ratio_15_16_keeps_each_fourth_row_and_column() -> None:
    for mask in masks("grid", 15 / 16, size=(256, 256)):
        rows, columns = (1 - mask).nonzero().T
        assert len(set((rows % 4).tolist())) == len(set((columns % 4).tolist())) == 1


def test_block_masks_hide_larger_areas_than_random_and_grid_masks() -> None:
    """A hidden patch has mostly hidden neighbours, more of them than under a random mask."""

    def alike(mask: Tensor) -> float:
        return float((mask[:, 1:] == mask[:, :-1]).float().mean())

    assert alike(masks("block")) > 0.85 > 0.7 > alike(masks("random")) > alike(masks("grid"))
    squares = torch.nn.functional.avg_pool2d(masks("block", 0.5)[:, None], 4, stride=1)
    assert (squares.amax(dim=(1, 2, 3)) == 1).float().mean() > 0.9  # 4 x 4 patches without a gap


def test_further_noise_is_uniform_and_differs_between_rows() -> None:
    noise = further_noise(uniform_noise(0, 0, torch.arange(4096), 196), 128)
    assert noise.min() >= 0 and noise.max() < 1
    assert (torch.histc(noise, 64, 0, 1) / noise.numel() * 64 - 1).abs().max() < 0.03
    assert torch.corrcoef(torch.stack([noise.flatten(), noise.roll(1, 0).flatten()]))[0, 1].abs() < 0.01


@pytest.mark.parametrize("kind", ["block", "grid"])
def test_hidden_pixels_do_not_change_the_predictions(kind: str) -> None:
    model = model_of(masking=kind)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    original = model(images, noise)
    patches = patchify(images, 8)
    altered = torch.where(original.mask[..., None].bool(), torch.randn_like(patches), patches)
    out = model(unpatchify(altered, 8, (4, 4)), noise)
    assert torch.equal(out.pred, original.pred) and not torch.equal(out.loss, original.loss)


@pytest.mark.parametrize("kind", ["block", "grid"])
def test_reconstructions_and_trivial_losses_use_the_mask_of_the_model(kind: str) -> None:
    model = model_of(masking=kind)
    images, noise = torch.randn(8, 3, 32, 32), torch.rand(8, 16)
    mask = model(images, noise).mask
    result = model.reconstruct(images, noise)
    assert torch.equal(result.mask, mask)
    visible = ~mask.bool()
    assert torch.equal(patchify(result.images, 8)[visible], patchify(images, 8)[visible])
    # The floor of zeros under this mask, not under the random one of the same noise.
    raw = model_of(masking=kind, norm_pix=False).config
    expected = patchify(images, 8)[mask.bool()].square().mean()
    assert trivial_losses(images, noise, raw)["data set mean"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_forward_with_a_mask_equals_forward_with_the_noise_that_draws_it(dtype: torch.dtype) -> None:
    model = model_of()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    expected, got = model(images, noise), model(images, mask=model(images, noise).mask.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    pictures = model.reconstruct(images, noise), model.reconstruct(images, mask=expected.mask)
    assert torch.equal(pictures[0].images, pictures[1].images)


def test_given_mask_may_hide_another_number_of_patches_than_the_config() -> None:
    mask = torch.zeros(2, 16)
    mask[:, :5] = 1
    out = model_of()(torch.randn(2, 3, 32, 32), mask=mask)
    assert out.pred.shape[1] == 5 and torch.equal(out.mask, mask)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.eye(16)[:2].cumsum(1), "hides from 15 to 16 patches of an image"),
        (torch.ones(2, 16), "hides 16 of 16 patches"),
        (torch.zeros(2, 16), "hides 0 of 16 patches"),
        (torch.ones(2, 15), r"shape \(2, 15\).*need \(2, 16\)"),
    ],
)
def test_invalid_mask_raises_config_error(mask: Tensor, said: str) -> None:
    for call in (model_of(), model_of().reconstruct):
        with pytest.raises(mae.ConfigError, match=said):
            call(torch.randn(2, 3, 32, 32), mask=mask)


def test_forward_with_both_or_neither_of_noise_and_mask_raises_config_error() -> None:
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    for arguments in ({}, {"noise": noise, "mask": noise > 0.5}):
        with pytest.raises(mae.ConfigError, match="exactly one of noise and mask"):
            model_of()(images, **arguments)


def test_unknown_masking_kind_raises_value_error() -> None:
    with pytest.raises(ValueError, match="'random', 'block' or 'grid'"):
        mae.MAEConfig.model_validate({"masking": "stripes"} | SMALL)
