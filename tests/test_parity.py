"""The model is the same function as the peer's (`transformers`), forward and backward."""

from pathlib import Path

import pytest
import torch

import mae
from mae.models.attention import set_attention
from mae.models.noise import uniform_noise

transformers = pytest.importorskip("transformers")

SIZES = {
    "micro": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 4},
    "patch14": {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 84,
        "patch_size": 14,
    },
    "tiny": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 96, "patch_size": 16},
}


def peer(tmp_path: Path, size: str, norm_pix: bool, mask_ratio: float):
    """A ViTMAE of random weights whose positions are set, and the same weights loaded by us from its folder."""
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        **SIZES[size],
        intermediate_size=4 * SIZES[size]["hidden_size"],
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=256,
        layer_norm_eps=1e-6,
        norm_pix_loss=norm_pix,
        mask_ratio=mask_ratio,
    )
    theirs = transformers.ViTMAEForPreTraining(config).float()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.05) if parameter.ndim == 1 else None
        theirs.decoder.decoder_pos_embed.normal_(std=0.5)
        theirs.vit.embeddings.position_embeddings.normal_(std=0.5)
    theirs.save_pretrained(tmp_path / size)
    ours = mae.load(tmp_path / size)
    assert isinstance(ours, mae.MaskedAutoencoder)
    return theirs, ours


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(("size", "mask_ratio"), [("micro", 0.75), ("patch14", 0.61), ("tiny", 0.37)])
def test_loss_and_gradients_equal_those_of_transformers(
    tmp_path: Path, size: str, norm_pix: bool, mask_ratio: float
) -> None:
    theirs, ours = peer(tmp_path, size, norm_pix, mask_ratio)
    torch.manual_seed(1)
    images = torch.randn(3, 3, *[SIZES[size]["image_size"]] * 2)
    noise = torch.rand(3, ours.config.patches)

    expected = theirs(images, noise=noise)
    out = ours(images, noise)
    assert abs(out.loss - expected.loss) <= 1e-6
    assert torch.equal(out.mask, expected.mask)
    torch.testing.assert_close(out.pred.flatten(0, 1), expected.logits[expected.mask.bool()], rtol=1e-4, atol=1e-5)

    expected.loss.backward()
    out.loss.backward()
    # The gradients of the peer travel through its own file format to our names.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    expected_gradients = mae.load(tmp_path / "gradients").state_dict()
    compared = 0
    for name, parameter in ours.named_parameters():
        if name in ("pos_embed", "decoder_pos_embed"):
            continue  # frozen in the peer
        expected_gradient = expected_gradients[name]
        gradient = parameter.grad
        assert gradient is not None, name
        if name.endswith("qkv.bias"):
            # The gradient of the key bias is zero in theory: rounding noise on either side, compared absolutely.
            width = gradient.shape[0] // 3
            assert (gradient - expected_gradient)[width : 2 * width].norm() <= 1e-6
            keep = torch.ones_like(gradient, dtype=torch.bool)
            keep[width : 2 * width] = False
            gradient, expected_gradient = gradient[keep], expected_gradient[keep]
        difference = (gradient - expected_gradient).norm()
        assert difference <= 1e-5 * expected_gradient.norm(), f"{name}: {difference / expected_gradient.norm():.2e}"
        compared += 1
    assert compared == len(list(ours.named_parameters())) - 2


def test_encode_equals_transformers_without_masking(tmp_path: Path) -> None:
    theirs, ours = peer(tmp_path, "micro", True, 0.75)
    images = torch.randn(2, 3, 32, 32)
    theirs.vit.config.mask_ratio = 0.0
    theirs.vit.embeddings.config.mask_ratio = 0.0
    # With nothing masked the peer shuffles all patches by the noise: ascending noise keeps them in place.
    noise = torch.arange(64, dtype=torch.float32).expand(2, -1)
    expected = theirs.vit(images, noise=noise).last_hidden_state
    torch.testing.assert_close(ours.encode(images), expected, rtol=1e-4, atol=1e-5)


def test_noise_of_a_row_does_not_depend_on_the_other_rows() -> None:
    rows = torch.arange(64)
    whole = uniform_noise(3, 17, rows, 49)
    assert torch.equal(uniform_noise(3, 17, rows[10:20], 49), whole[10:20])
    assert not torch.equal(uniform_noise(3, 18, rows, 49), whole)
    assert not torch.equal(uniform_noise(4, 17, rows, 49), whole)


def test_noise_is_uniform_and_uncorrelated() -> None:
    noise = uniform_noise(0, 0, torch.arange(4096), 196)
    assert noise.min() >= 0 and noise.max() < 1
    counts = torch.histc(noise, 64, 0, 1) / noise.numel() * 64
    assert (counts - 1).abs().max() < 0.03
    # Neighbouring rows, patches and steps are uncorrelated.
    later = uniform_noise(0, 1, torch.arange(4096), 196)
    for other in (noise.roll(1, 0), noise.roll(1, 1), later):
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 0.01


@pytest.mark.parametrize("fused", [True, False])
def test_decoding_hidden_patches_only_gives_the_predictions_of_all_patches(fused: bool) -> None:
    torch.manual_seed(0)
    config = mae.MAEConfig(
        image_size=32, patch_size=8, width=64, depth=1, num_heads=4, decoder_width=32, decoder_depth=2
    )
    model = mae.MaskedAutoencoder(config)
    set_attention(model, fused=fused)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    out = model(images, noise)
    everything = model.reconstruct(images, noise).pred
    torch.testing.assert_close(out.pred.flatten(0, 1), everything[out.mask.bool()], rtol=1e-5, atol=1e-6)
