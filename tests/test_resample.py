"""Models take images of their own size, channels and type; `at` gives the same weights for others."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import adapt_input_conv
from torch.nn import functional as F

import mae
from mae.models.attention_maps import attention_weights
from mae.models.classifier import Classifier
from mae.models.resample import convert_channels
from mae.sam.segmenter import Segmenter
from tests.exports import SMALL, own_checkpoint
from tests.test_sam_conversion import small_sam

# What is wrong with the images, and what the sentence says.
WRONG = {
    "size": (torch.zeros(1, 3, 64, 64), r"64 x 64 pixels, and the model is for 32 x 32.*model\.at\(\(64, 64\)\)"),
    "as many patches": (torch.zeros(1, 3, 16, 64), r"16 x 64 pixels.*model\.at\(\(16, 64\)\), whose positions"),
    "no whole patches": (torch.zeros(1, 3, 33, 33), r"33 x 33 pixels.*: resize them$"),
    "grey": (torch.zeros(1, 1, 32, 32), r"1 channels, and the model takes 3: repeat grey.*at\(in_channels=1\)"),
    "five channels": (torch.zeros(1, 5, 32, 32), r"5 channels, and the model takes 3: convert.*at\(in_channels=5\)"),
    "channels last": (torch.zeros(1, 32, 32, 3), r"channels last: use images\.permute\(0, 3, 1, 2\)"),
    "no batch": (
        torch.zeros(3, 32, 32),
        r"\(3, 32, 32\).*\[batch, channels, height, width\]: add the batch as images\[",
    ),
    "bytes": (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "torch.uint8, and the model takes normalised floats"),
    "doubles": (torch.zeros(1, 3, 32, 32).double(), r"torch\.float64, and the weights torch\.float32: use images\.to"),
}


def model_of(**fields) -> mae.MaskedAutoencoder:
    torch.manual_seed(0)
    return mae.MaskedAutoencoder(mae.MAEConfig.model_validate(SMALL | fields)).eval()


@pytest.mark.parametrize("case", WRONG)
def test_images_that_a_model_does_not_take_raise_a_sentence_in_every_pass(case: str) -> None:
    images, said = WRONG[case]
    model, noise = model_of(), torch.rand(1, 16)
    classifier = Classifier(model.config, 3)
    passes = [
        model.encode,
        lambda images: model(images, noise),
        lambda images: model.reconstruct(images, noise),
        lambda images: attention_weights(model, images),
        classifier,
    ]
    for run in passes:
        with pytest.raises(mae.ConfigError, match=said):
            run(images)


def test_noise_of_another_number_of_patches_raises_a_sentence() -> None:
    with pytest.raises(mae.ConfigError, match=r"noise has the shape \(2, 64\): 2 images of 16 patches need \(2, 16\)"):
        model_of()(torch.zeros(2, 3, 32, 32), torch.rand(2, 64))


def test_autocast_takes_images_of_any_float() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert model_of().encode(torch.zeros(1, 3, 32, 32).bfloat16()).isfinite().all()


def test_sam_refuses_images_of_other_channels_types_and_frames() -> None:
    encoder = small_sam(out_channels=32)
    with pytest.raises(mae.ConfigError, match="1 channels, and the model takes 3"):
        encoder(torch.zeros(1, 1, 160, 160))
    with pytest.raises(mae.ConfigError, match="normalised floats"):
        encoder(torch.zeros(1, 3, 160, 160, dtype=torch.uint8))
    with pytest.raises(mae.ConfigError, match="80 x 320 pixels, and the model is for 160 x 160"):
        Segmenter(encoder)(torch.zeros(1, 3, 80, 320))


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (16, 64)])
def test_model_at_another_size_has_positions_interpolated_as_in_timm(size: tuple[int, int]) -> None:
    model = model_of()
    other, grid = model.at(size), [size[0] // 8, size[1] // 8]
    for name in ("pos_embed", "decoder_pos_embed"):
        expected = resample_abs_pos_embed(getattr(model, name), grid, num_prefix_tokens=1)
        torch.testing.assert_close(getattr(other, name), expected)
    assert (
        type(other) is mae.MaskedAutoencoder and other.config.positions == "learned" and other.pos_embed.requires_grad
    )
    assert model.config.image_size == (32, 32) and not other.training
    images, noise = torch.randn(2, 3, *size), torch.rand(2, other.config.patches)
    assert other(images, noise).loss.isfinite() and other.encode(images).shape == (2, 1 + grid[0] * grid[1], 64)


@torch.no_grad()
def test_model_at_its_own_size_is_the_same_function_with_weights_of_its_own() -> None:
    model, images = model_of(), torch.randn(2, 3, 32, 32)
    other = model.at(32)
    assert other.config == model.config and torch.equal(other.encode(images), model.encode(images))
    assert not other.pos_embed.requires_grad
    other.norm.weight.zero_()
    assert model.norm.weight.sum() == 64


@torch.no_grad()
@pytest.mark.parametrize("class_tokens", [1, 0, 3])
def test_model_at_twice_the_patch_size_gives_enlarged_images_the_same_tokens_and_predictions(class_tokens) -> None:
    model, images = model_of(class_tokens=class_tokens), torch.randn(2, 3, 32, 32)
    other, noise = model.at(64, patch_size=16), torch.rand(2, 16)
    assert other.config.positions == "sincos"
    patches = model.patchify(images).view(32, 8, 8, 3).permute(0, 3, 1, 2)
    larger = F.interpolate(patches, (16, 16), mode="bicubic", align_corners=False, antialias=True)
    larger = larger.permute(0, 2, 3, 1).reshape(2, 16, -1)
    torch.testing.assert_close(other.embed(larger), model.embed(model.patchify(images)), rtol=1e-4, atol=1e-4)
    enlarged = mae.models.patches.unpatchify(larger, 16, (4, 4))
    small, large = model(images, noise), other(enlarged, noise)
    pred = small.pred.reshape(-1, 8, 8, 3).permute(0, 3, 1, 2)
    pred = F.interpolate(pred, (16, 16), mode="bicubic", align_corners=False, antialias=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(large.pred.reshape(pred.shape), pred, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_grey_images_give_the_tokens_and_predictions_of_their_copies() -> None:
    model, grey, noise = model_of(norm_pix=False), torch.randn(2, 1, 32, 32), torch.rand(2, 16)
    one = model.at(in_channels=1)
    colour = grey.expand(-1, 3, -1, -1)
    torch.testing.assert_close(one.encode(grey), model.encode(colour), rtol=1e-4, atol=1e-5)
    pred = model(colour, noise).pred.view(2, 12, 64, 3).mean(-1)
    torch.testing.assert_close(one(grey, noise).pred, pred, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
def test_channels_of_the_patch_embedding_are_converted_as_in_timm(channels: int) -> None:
    weight = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(convert_channels(weight, channels), adapt_input_conv(channels, weight.clone()))


@torch.no_grad()
def test_classifier_at_another_size_keeps_head_and_names() -> None:
    model = Classifier(model_of().config, 2)
    model.class_names = ["ant", "bee"]
    other = model.at(64)
    assert isinstance(other, Classifier) and other.class_names == ["ant", "bee"] and other.pool == model.pool
    assert torch.equal(other.head.weight, model.head.weight) and other(torch.randn(1, 3, 64, 64)).shape == (1, 2)


def test_impossible_sizes_raise_config_error() -> None:
    with pytest.raises(mae.ConfigError, match="not a multiple of patch_size=8"):
        model_of().at(50)
    with pytest.raises(mae.ConfigError, match="not a multiple of patch_size=16"):
        small_sam().at(50)


@torch.no_grad()
def test_sam_encoder_at_another_size_computes_what_it_computes_on_such_images() -> None:
    encoder = small_sam()
    other, images = encoder.at((96, 224)), torch.randn(1, 3, 96, 224)
    assert other.config.image_size == (96, 224) and other.blocks[1].attn.rel_pos_w.shape[0] == 27
    torch.testing.assert_close(other(images), encoder(images), rtol=1e-5, atol=1e-5)
    grey = torch.randn(1, 1, 160, 160)
    torch.testing.assert_close(
        encoder.at(in_channels=1)(grey), encoder(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
    )


def test_load_resamples_to_the_size_and_channels_that_are_given(tmp_path) -> None:
    model, path = own_checkpoint(tmp_path, width=192, num_heads=3, decoder_num_heads=4)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    for source in (path, tmp_path / "bare.pth"):
        loaded = mae.load(source, image_size=64, in_channels=1, decoder_num_heads=4)
        assert (loaded.config.image_size, loaded.config.in_channels) == ((64, 64), 1)
        assert torch.equal(loaded.pos_embed, model.at(64).pos_embed)
        same = mae.load(source, image_size=32, decoder_num_heads=4)
        assert same.config == model.config and torch.equal(same.pos_embed, model.pos_embed)
        # As many patches, in other places.
        wide = mae.load(source, image_size=(16, 64), decoder_num_heads=4)
        assert wide.config.image_size == (16, 64) and torch.equal(wide.pos_embed, model.at((16, 64)).pos_embed)
