"""What must hold for any masked autoencoder, whatever its weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.datasets import load_digits
from torch.nn import functional as F

import mae
from mae.models.loss import normalise_patches, reconstruction_loss
from mae.models.masking import draw_masking, random_masking
from mae.models.noise import uniform_noise
from mae.models.patches import patchify, unpatchify
from mae.models.vit import sincos_positions
from mae.probes.trivial_losses import trivial_losses
from mae.train.optim import OptimConfig, build_optimizer

SMALL = {"width": 32, "depth": 2, "num_heads": 2, "decoder_width": 32, "decoder_depth": 2, "decoder_num_heads": 2}


def model_of(**fields) -> mae.MaskedAutoencoder:
    torch.manual_seed(0)
    return mae.MaskedAutoencoder(mae.MAEConfig(**({"image_size": 32, "patch_size": 8} | SMALL | fields))).eval()


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch", "encoder", "decoder"),
    [
        (768, 12, 12, 16, 85_798_656, 26_109_184),
        (1024, 24, 16, 16, 303_301_632, 26_240_256),
        (1280, 32, 16, 14, 630_764_800, 26_309_708),
        (1280, 32, 16, 16, 630_918_400, 26_371_328),
    ],
)
def test_sizes_have_the_published_parameter_counts(width, depth, heads, patch, encoder, decoder) -> None:
    with torch.device("meta"):
        model = mae.MaskedAutoencoder(mae.MAEConfig(width=width, depth=depth, num_heads=heads, patch_size=patch))
        alone = mae.Encoder(model.config)
    assert sum(p.numel() for p in alone.parameters()) == encoder
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.integers(1, 5),
    channels=st.integers(1, 5),
    ratio=st.floats(0.05, 0.95),
    class_tokens=st.sampled_from([0, 1, 8]),
    positions=st.sampled_from(["sincos", "learned"]),
)
def test_forward_and_encode_shapes_hold_for_any_grid_channels_and_ratio(
    rows, columns, patch, channels, ratio, class_tokens, positions
) -> None:
    patches = rows * columns
    keep = int(patches * (1 - ratio))
    if not 0 < keep < patches:
        return
    model = model_of(
        image_size=(rows * patch, columns * patch),
        patch_size=patch,
        in_channels=channels,
        mask_ratio=ratio,
        class_tokens=class_tokens,
        positions=positions,
        norm_pix=patch * patch * channels > 1,
    )
    images, noise = torch.randn(2, channels, rows * patch, columns * patch), torch.rand(2, patches)
    out = model(images, noise)
    assert out.pred.shape == out.target.shape == (2, patches - keep, patch * patch * channels)
    assert out.mask.sum(1).tolist() == [patches - keep] * 2
    assert model.encode(images).shape == (2, patches + class_tokens, 32)
    assert model.reconstruct(images, noise).images.shape == images.shape


def test_unpatchify_inverts_patchify_in_row_column_channel_order() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert torch.equal(unpatchify(patches, 2, (2, 3)), images)
    assert patches[0, 1].tolist() == [
        images[0, c, r, 2 + q].item() for r in range(2) for q in range(2) for c in range(3)
    ]


def test_sincos_positions_equal_the_published_formula() -> None:
    """Column first, as a numpy table of the formula in float64 says."""
    omega = 1 / 10000 ** (np.arange(16) / 16)
    table = sincos_positions(64, (3, 5), 1)[0].numpy()
    assert not table[0].any()
    for row in range(3):
        for column in range(5):
            expected = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
            np.testing.assert_allclose(table[1 + row * 5 + column], np.concatenate(expected), atol=1e-7)


def test_hidden_pixels_do_not_change_the_predictions() -> None:
    model = model_of()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    masking = random_masking(noise, model.config.visible)
    hidden = masking.mask[..., None].bool()
    patches = patchify(images, 8)
    altered = unpatchify(torch.where(hidden, torch.randn_like(patches), patches), 8, (4, 4))
    for pixels in (images, altered):
        out = model(pixels, noise)
        if pixels is images:
            original = out
    assert torch.equal(out.pred, original.pred)
    assert not torch.equal(out.loss, original.loss)


def test_predictions_of_visible_patches_do_not_change_the_loss() -> None:
    """Changes what is predicted for visible patches, which have no share in the paper's mean."""
    model = model_of()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    out, pred = model(images, noise), model.reconstruct(images, noise).pred
    target = normalise_patches(patchify(images, 8))
    for visible in (pred, torch.full_like(pred, 1e3)):
        everywhere = torch.where(out.mask[..., None].bool(), pred, visible)
        per_patch = (everywhere - target).square().mean(-1)
        torch.testing.assert_close((per_patch * out.mask).sum() / out.mask.sum(), out.loss)


def test_encode_never_masks_and_does_not_depend_on_the_mask_ratio() -> None:
    images = torch.randn(2, 3, 32, 32)
    low, high = model_of(mask_ratio=0.25), model_of(mask_ratio=0.75)
    assert low.encode(images).shape[1] == 17
    assert torch.equal(low.encode(images), high.encode(images))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_keeps_visible_patches_and_undoes_the_normalisation(norm_pix: bool) -> None:
    model = model_of(norm_pix=norm_pix)
    images, noise = torch.randn(2, 3, 32, 32) * 3 + 1, torch.rand(2, 16)
    result = model.reconstruct(images, noise)
    hidden = result.mask.bool()
    pasted, patches = patchify(result.images, 8), patchify(images, 8)
    assert torch.equal(pasted[~hidden], patches[~hidden])
    expected = result.pred
    if norm_pix:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        expected = expected * (variance + 1e-6).sqrt() + mean
    torch.testing.assert_close(pasted[hidden], expected[hidden])


def test_normalised_target_has_zero_mean_and_unit_variance_per_patch() -> None:
    target = normalise_patches(torch.rand(2, 5, 48) * 7 + 3)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 5), atol=1e-4, rtol=0)


def test_trivial_losses_of_noise_equal_their_expected_values() -> None:
    config = mae.MAEConfig(image_size=32, patch_size=4, **SMALL)
    images = torch.rand(16, 3, 32, 32)
    floors = trivial_losses(images, torch.rand(16, 64), config)
    assert floors["predict 0"] == pytest.approx(47 / 48, abs=1e-4)
    # Noise cannot be interpolated.
    assert floors["scaled interpolation"] == pytest.approx(47 / 48, abs=0.02)
    raw = trivial_losses(images - 0.5, torch.rand(16, 64), config.model_copy(update={"norm_pix": False}))
    assert raw["data set mean"] == pytest.approx(1 / 12, abs=5e-3)


def test_interpolation_weights_visible_pixels_by_the_inverse_fourth_power_of_their_distance() -> None:
    config = mae.MAEConfig(image_size=(24, 16), patch_size=4, in_channels=2, norm_pix=False, **SMALL)
    images, noise = torch.rand(3, 2, 24, 16), torch.rand(3, 24)
    squared_errors = []
    for image, hidden in zip(images, draw_masking(noise, config).mask.bool(), strict=True):
        pixel_is_hidden = hidden.view(6, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
        seen = (~pixel_is_hidden).nonzero()
        for place in pixel_is_hidden.nonzero():
            weights = 1 / (seen - place).double().square().sum(1).square()
            expected = (image[:, seen[:, 0], seen[:, 1]] * weights).sum(1) / weights.sum()
            squared_errors.append((expected - image[:, place[0], place[1]]).square())
    loss = trivial_losses(images, noise, config)["interpolation"]
    assert loss == pytest.approx(float(torch.stack(squared_errors).mean()), rel=1e-6)


def test_trivial_losses_are_those_of_all_images_whatever_their_size() -> None:
    config = mae.MAEConfig(image_size=(512, 480), patch_size=32, **SMALL)
    images, noise = torch.rand(3, 3, 512, 480), torch.rand(3, 240)
    each = [trivial_losses(images[i : i + 1], noise[i : i + 1], config)["predict 0"] for i in range(3)]
    together = trivial_losses((images * 255).byte(), noise, config, lambda some: some / 255)
    assert together["predict 0"] == pytest.approx(sum(each) / 3, rel=1e-4)
    last = images.clone()
    last[2] = 0  # an image that the first ones say nothing of
    assert trivial_losses(last, noise, config)["scaled interpolation"] < 0.7 < together["scaled interpolation"]


def test_pictures_with_visible_statistics_hold_nothing_of_hidden_pixels() -> None:
    model = mae.MaskedAutoencoder(mae.MAEConfig(image_size=(32, 48), patch_size=8, **SMALL)).eval()
    images, mask = torch.rand(2, 3, 32, 48), torch.zeros(2, 24)
    mask[:, 1::2] = 1
    pixels = mask.view(2, 1, 4, 6).repeat_interleave(8, -1).repeat_interleave(8, -2)
    others = torch.where(pixels.bool(), torch.rand(()), images)
    first, second = (model.reconstruct(some, mask=mask, statistics="visible").images for some in (images, others))
    torch.testing.assert_close(first, second)
    truly = model.reconstruct(images, mask=mask).images
    assert torch.equal(truly[pixels.expand(-1, 3, -1, -1) == 0], first[pixels.expand(-1, 3, -1, -1) == 0])
    assert not torch.allclose(truly, first)


@pytest.fixture(scope="module")
def trained() -> tuple[mae.MaskedAutoencoder, torch.Tensor]:
    """A small model after 250 steps on real digits, and digits that it has not seen."""
    torch.manual_seed(0)
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    images = (F.interpolate(digits, (16, 16), mode="bilinear") - 0.3) / 0.34
    seen, unseen = images[:1500], images[1500:]
    config = mae.MAEConfig(image_size=16, patch_size=4, in_channels=1, **SMALL | {"width": 64, "decoder_width": 64})
    model = mae.MaskedAutoencoder(config)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(), lr=2e-3)
    for step in range(250):
        batch = seen[torch.randint(len(seen), (64,))]
        model(batch, uniform_noise(0, step, torch.arange(64), 16)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), unseen


def held_out_loss(model: mae.MaskedAutoencoder, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(images, uniform_noise(0, -1, torch.arange(len(images)), 16)).loss)


def test_trained_model_beats_the_trivial_losses(trained) -> None:
    model, images = trained
    floors = trivial_losses(images, uniform_noise(0, -1, torch.arange(len(images)), 16), model.config)
    assert held_out_loss(model, images) < 0.8 * min(floors.values())


def test_zeroed_decoder_positions_raise_the_loss_by_30_percent(trained) -> None:
    model, images = trained
    good = held_out_loss(model, images)
    positions = model.decoder_pos_embed.data.clone()
    try:
        model.decoder_pos_embed.data.zero_()
        assert held_out_loss(model, images) > 1.3 * good
    finally:
        model.decoder_pos_embed.data.copy_(positions)


def test_shuffled_predictions_raise_the_loss_by_30_percent(trained) -> None:
    """Predictions given to the wrong hidden patches: what a broken un-shuffling would do."""
    model, images = trained
    noise = uniform_noise(0, -1, torch.arange(len(images)), 16)
    with torch.no_grad():
        out = model(images, noise)
    shuffled = out.pred[:, torch.randperm(out.pred.shape[1], generator=torch.manual_seed(0))]
    assert reconstruction_loss(shuffled, out.target) > 1.3 * out.loss


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_size": 30}, "multiple of patch_size=8"),
        ({"mask_ratio": 0.0}, "greater than 0"),
        ({"mask_ratio": 1.0}, "less than 1"),
        ({"mask_ratio": 0.99}, "leaves 0 of 16 patches visible"),
        ({"mask_ratio": 0.01, "image_size": 8}, "leaves 0 of 1 patches visible"),
        ({"num_heads": 5}, "cannot be split over 5 heads"),
        ({"nonsense": 1}, "Extra inputs"),
        ({"patch_size": 1, "in_channels": 1}, "has no variance: set norm_pix=false"),
    ],
)
def test_impossible_architecture_raises_validation_error(fields, said) -> None:
    with pytest.raises(ValidationError, match=said):
        mae.MAEConfig(**({"image_size": 32, "patch_size": 8} | SMALL | fields))
