"""The cross decoder: hidden patches look at visible ones, and need not all be there."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import mae
from mae.export.write import export
from mae.formats.warm_start import initialise_from
from mae.models.attention import set_attention
from mae.models.execution import BlocksConfig, prepare_blocks
from mae.models.loss import normalise_patches
from mae.models.noise import uniform_noise
from mae.models.patches import patchify, unpatchify
from mae.plan.executed_flops import executed_pretraining_flops
from mae.plan.training_cost import pretraining_cost
from mae.train.optim import OptimConfig, build_optimizer
from tests.exports import own_checkpoint
from tests.test_model import SMALL, model_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
THIRD = {"decoder": "cross", "predicted": 1 / 3}


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 32, 32), torch.rand(2, 16)


def test_predictions_do_not_depend_on_which_others_are_made(batch) -> None:
    every, some = model_of(decoder="cross"), model_of(**THIRD)
    expected, got = every(*batch), some(*batch)
    assert expected.pred.shape[1] == 12 and got.pred.shape[1] == 4
    painted = every.reconstruct(*batch).pred
    for out in (expected, got):
        ids = out.ids[..., None].expand_as(out.pred)
        torch.testing.assert_close(out.pred, painted.gather(1, ids), rtol=1e-5, atol=1e-6)
    assert torch.equal(expected.mask, got.mask)
    torch.testing.assert_close(painted, some.reconstruct(*batch).pred)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(2, 8),
    st.floats(0.1, 0.9),
    st.floats(0.01, 1),
    st.sampled_from(["random", "block", "grid"]),
)
def test_predicted_patches_are_hidden_ones_determined_by_the_noise(rows, columns, ratio, share, kind) -> None:
    hidden = rows * columns - int(rows * columns * (1 - ratio))
    if hidden in (0, rows * columns) or round(hidden * share) == 0:
        return
    fields = {"patch_size": 2, "decoder": "cross", "predicted": share, "mask_ratio": ratio, "masking": kind}
    model = model_of(image_size=(2 * rows, 2 * columns), **fields)
    images = torch.randn(3, 3, 2 * rows, 2 * columns)
    noise = uniform_noise(0, 0, torch.arange(3), rows * columns)
    out = model(images, noise)
    assert out.ids.shape == (3, round(hidden * share)) and (out.ids.diff(dim=1) > 0).all()
    assert out.mask.gather(1, out.ids).all() and out.mask.sum(1).tolist() == [hidden] * 3
    target = normalise_patches(patchify(images, 2)).gather(1, out.ids[..., None].expand_as(out.target))
    assert torch.equal(out.target, target)
    assert torch.equal(model(images[1:2], noise[1:2]).ids, out.ids[1:2])


def test_predicted_patches_are_evenly_spread_over_steps() -> None:
    model = model_of(**THIRD)
    counts = torch.zeros(16)
    for step in range(50):
        ids = model(torch.zeros(8, 3, 32, 32), uniform_noise(0, step, torch.arange(8), 16)).ids
        counts += torch.bincount(ids.flatten(), minlength=16)
    assert counts.min() > 0.7 * counts.mean()


def test_given_mask_has_all_its_hidden_patches_predicted(batch) -> None:
    model = model_of(**THIRD)
    out = model(batch[0], mask=model(*batch).mask)
    assert out.pred.shape[1] == 12 and torch.equal(out.ids, out.mask.nonzero()[:, 1].view(2, -1))


def test_hidden_pixels_do_not_change_the_predictions(batch) -> None:
    images, noise = batch
    model = model_of(**THIRD)
    original, patches = model(images, noise), patchify(images, 8)
    altered = torch.where(original.mask[..., None].bool(), torch.randn_like(patches), patches)
    out = model(unpatchify(altered, 8, (4, 4)), noise)
    assert torch.equal(out.pred, original.pred) and not torch.equal(out.loss, original.loss)


def test_visible_pixels_change_every_prediction(batch) -> None:
    images, noise = batch
    model = model_of(decoder="cross")
    patches = patchify(images, 8)
    out = model(images, noise)
    altered = torch.where(out.mask[..., None].bool(), patches, torch.randn_like(patches))
    assert (model(unpatchify(altered, 8, (4, 4)), noise).pred != out.pred).any(dim=-1).all()


@pytest.mark.parametrize("class_tokens", [1, 0, 3])
def test_fused_and_explicit_attention_give_the_same_loss(batch, class_tokens: int) -> None:
    model = model_of(decoder="cross", class_tokens=class_tokens)
    losses = []
    for fused in (False, True):
        set_attention(model, fused=fused)
        losses.append(model(*batch).loss)
    torch.testing.assert_close(*losses)


def test_backward_gives_each_parameter_a_gradient(batch) -> None:
    """DDP waits for gradients of all parameters."""
    model = model_of(**THIRD, positions="learned")
    model(*batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("recompute", ["attention", "all", 2])
def test_activation_checkpointing_gives_bit_equal_gradients(batch, recompute: str | int) -> None:
    gradients = []
    for setting in ("none", recompute):
        model = model_of(**THIRD, decoder_depth=3)
        prepare_blocks(model.whole_blocks, BlocksConfig(recompute=setting))
        model(*batch).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_loss_falls_within_60_training_steps(share: float) -> None:
    model = model_of(decoder="cross", predicted=share).train()
    torch.manual_seed(1)
    ramp = torch.linspace(-1, 1, 32)
    images = (torch.rand(32, 3, 1, 1) + 0.5) * ramp + (torch.rand(32, 3, 1, 1) - 0.5) * ramp[:, None]
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(), lr=2e-3)
    losses = []
    for step in range(60):
        loss = model(images, uniform_noise(0, step, torch.arange(32), 16)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("share", [1.0, 1 / 3])
def test_flops_formula_agrees_with_torchs_counter(device: torch.device, share: float) -> None:
    config = mae.MAEConfig(width=192, num_heads=3, decoder="cross", predicted=share)
    cost = pretraining_cost(config, "bf16-mixed", device)
    assert cost.kept.flops == pytest.approx(executed_pretraining_flops(config), rel=0.02)
    assert cost.recomputed.activations < cost.kept.activations


def test_cross_decoder_checkpoint_loads_as_the_same_model(tmp_path: Path) -> None:
    fields = THIRD | {"masking": "block"}
    model, path = own_checkpoint(tmp_path, **fields)
    loaded = mae.load(path)
    assert loaded.config == model.config
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    assert torch.equal(loaded(images, noise).pred, model(images, noise).pred)
    # The bare weights show the kind of decoder, not what is asked of it.
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    bare = mae.load(tmp_path / "bare.pth", num_heads=4, decoder_num_heads=4, **fields)
    assert bare.config == model.config
    assert mae.load(tmp_path / "bare.pth", num_heads=4, decoder_num_heads=4).config.decoder == "cross"
    fresh = mae.MaskedAutoencoder(model.config)
    initialise_from(fresh, tmp_path / "bare.pth")
    assert torch.equal(fresh(images, noise).pred, model(images, noise).pred)
    other = mae.MaskedAutoencoder(model.config.model_copy(update={"decoder": "self", "predicted": 1.0}))
    with pytest.raises(mae.CheckpointError, match="another architecture"):
        initialise_from(other, path)


@pytest.mark.parametrize("to", ["facebook", "hf-vitmae"])
def test_export_to_formats_of_the_published_decoder_raises_config_error(tmp_path: Path, to: str) -> None:
    _, source = own_checkpoint(tmp_path, **THIRD)
    with pytest.raises(mae.ConfigError, match=r"knows only models with a decoder of self-attention.*choose another"):
        export(source, to, tmp_path / "out" / ("mae.pth" if to == "facebook" else "folder"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("to", "name"), [("timm", "encoder.safetensors"), ("hf-vit", "folder")])
def test_cross_decoder_model_exports_its_encoder(tmp_path: Path, to: str, name: str) -> None:
    _, source = own_checkpoint(tmp_path, **THIRD)
    assert export(source, to, tmp_path / name).is_file()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"predicted": 0.5}, "none can be left out: set decoder=cross or predicted=1"),
        ({"decoder": "cross", "predicted": 0.01}, "of 12 hidden patches is none: raise predicted"),
        ({"decoder": "cross", "predicted": 0.0}, "greater than 0"),
        ({"decoder": "cross", "predicted": 1.5}, "less than or equal to 1"),
        ({"decoder": "both"}, "'self' or 'cross'"),
    ],
)
def test_conflicting_decoder_settings_raise_validation_error(fields, said) -> None:
    with pytest.raises(ValidationError, match=said):
        mae.MAEConfig(**({"image_size": 32, "patch_size": 8} | SMALL | fields))
