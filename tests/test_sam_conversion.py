"""From a masked autoencoder to a SAM-style encoder, and from and to other people's files."""

from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch.nn import functional as F

import mae
from mae.export.verify import verify
from mae.formats import segment_anything as segment_anything_format
from mae.formats.format import Export, Scale
from mae.formats.sam_names import to_our_names, to_transformers
from mae.models.resample import at_image_size, resize_projection
from mae.models.vit import LayerNorm
from mae.sam.convert import to_sam
from tests.test_sam import SMALL, randomised

FIELDS = {"image_size": 224, "patch_size": 16, "width": 48, "depth": 4, "num_heads": 3}


def pre_trained(**fields) -> mae.Encoder:
    encoder = randomised(mae.Encoder(mae.MAEConfig.model_validate(FIELDS | fields)))
    assert isinstance(encoder, mae.Encoder)
    return encoder.eval()


def small_sam(**fields) -> mae.SamEncoder:
    encoder = randomised(mae.SamEncoder(SMALL.model_copy(update=fields)))
    assert isinstance(encoder, mae.SamEncoder)
    return encoder.eval()


def as_export(encoder: mae.SamEncoder) -> Export:
    return Export(encoder, Scale((0.5,) * 3, (0.5,) * 3, known=True))


# Conversion.


@torch.no_grad()
def test_converted_encoder_with_one_window_equals_the_original_before_its_norm() -> None:
    encoder = pre_trained(class_tokens=0)
    converted = to_sam(encoder, image_size=224)
    images = torch.randn(2, 3, 224, 224)
    encoder.norm = torch.nn.Identity()
    expected = encoder.encode(images)
    assert (converted.tokens(images).flatten(1, 2) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert converted(images).shape == (2, 256, 14, 14)


@pytest.mark.parametrize("fields", [{}, {"patch_size": 14}, {"image_size": (112, 224)}, {"in_channels": 5}], ids=str)
@torch.no_grad()
def test_encoders_convert_to_a_larger_image(fields) -> None:
    encoder = pre_trained(**fields)
    converted = to_sam(encoder, image_size=320)
    assert converted.config.global_blocks == (0, 1, 2, 3) and converted.config.patch_size == 16
    embedding = converted(torch.randn(1, encoder.config.in_channels, 320, 320))
    assert embedding.shape == (1, 256, 20, 20) and embedding.isfinite().all()


@torch.no_grad()
def test_positions_and_patch_projection_are_resampled_as_in_timm() -> None:
    encoder = pre_trained(patch_size=14)
    converted = to_sam(encoder, image_size=512)
    expected = resample_abs_pos_embed(encoder.pos_embed, [32, 32], num_prefix_tokens=1)[:, 1:]
    torch.testing.assert_close(converted.pos_embed.flatten(1, 2), expected)
    expected = resample_patch_embed(encoder.patch_embed.proj.weight, [16, 16])
    torch.testing.assert_close(converted.patch_embed.proj.weight, expected, rtol=1e-4, atol=1e-5)


def test_resized_projection_gives_resized_patches_their_old_tokens() -> None:
    weight, patches = torch.randn(8, 3, 14, 14), torch.randn(5, 3, 14, 14)
    larger = F.interpolate(patches, (16, 16), mode="bicubic", align_corners=False, antialias=True)
    tokens = torch.einsum("dcpq,bcpq->bd", resize_projection(weight, 16), larger)
    torch.testing.assert_close(tokens, torch.einsum("dcpq,bcpq->bd", weight, patches), rtol=1e-4, atol=1e-4)


def test_converted_encoder_shares_no_weights_with_its_source() -> None:
    encoder = pre_trained()
    converted = to_sam(encoder, image_size=224)
    with torch.no_grad():
        converted.blocks[0].attn.qkv.weight.zero_()
    assert encoder.blocks[0].attn.qkv.weight.abs().sum() > 0
    assert all(parameter.requires_grad for parameter in converted.parameters())


@pytest.mark.parametrize(
    ("depth", "given", "sentence"),
    [
        (4, {"image_size": 1000}, "image_size height 1000 is not a multiple of patch_size=16"),
        (4, {"width": 96}, "width is 48 in the encoder and cannot be 96"),
        (3, {}, "depth=3 has no quarters"),
        (4, {"global_blocks": (4,)}, "global_blocks names block 4: depth=4 has 0 to 3"),
    ],
)
def test_impossible_conversion_raises_config_error(depth: int, given, sentence: str) -> None:
    with pytest.raises(mae.ConfigError, match=sentence):
        to_sam(pre_trained(depth=depth), **given)


@pytest.mark.parametrize("size", [384, (448, 224)])
@torch.no_grad()
def test_encoder_at_another_image_size_equals_timm_at_that_size(size) -> None:
    encoder = pre_trained()
    resized = at_image_size(encoder, size)
    theirs = timm.models.VisionTransformer(
        img_size=224, embed_dim=48, depth=4, num_heads=3, num_classes=0, norm_layer=LayerNorm
    ).eval()
    theirs.load_state_dict(encoder.state_dict())
    theirs.set_input_size(size)
    images = torch.randn(1, 3, *resized.config.image_size)
    torch.testing.assert_close(resized.encode(images), theirs.forward_features(images), rtol=1e-5, atol=1e-5)
    assert resized.config.positions == "learned" and resized.pos_embed.requires_grad


# Files of others.


@pytest.mark.parametrize("form", ["image_encoder part", "bare"])
@torch.no_grad()
def test_sam_encoder_file_loads_in_segment_anything_and_loads_back(tmp_path: Path, form: str) -> None:
    encoder, out = small_sam(), tmp_path / "sam.pth"
    written = as_export(encoder)
    segment_anything_format.write(written, out)
    assert verify(segment_anything_format.FORMAT, written, out)["difference"] <= 1e-5
    if form == "bare":
        torch.save(encoder.state_dict(), out)
    loaded = mae.load_sam(out)
    assert loaded.config == encoder.config
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in loaded.state_dict().items())


def whole_sam() -> torch.nn.Module:
    modeling = pytest.importorskip("segment_anything.modeling")
    return modeling.Sam(
        segment_anything_format.peer_encoder(segment_anything_format.peer_arguments(SMALL)),
        modeling.PromptEncoder(256, (10, 10), (160, 160), 16),
        modeling.MaskDecoder(
            num_multimask_outputs=3, transformer=modeling.TwoWayTransformer(2, 256, 8, 2048), transformer_dim=256
        ),
    )


@pytest.mark.parametrize("library_class", ["SamVisionModel", "SamModel"])
@torch.no_grad()
def test_hf_sam_folder_loads_with_the_same_embedding(tmp_path: Path, library_class: str) -> None:
    transformers = pytest.importorskip("transformers")
    vision = transformers.SamVisionConfig(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=160,
        window_size=4,
        global_attn_indexes=[1, 3],
        mlp_dim=192,
    )
    if library_class == "SamModel":
        whole = transformers.SamModel(transformers.SamConfig(vision_config=vision.to_dict()))
        theirs = whole.vision_encoder
    else:
        whole = theirs = transformers.SamVisionModel(vision)
    randomised(theirs).eval()
    whole.save_pretrained(tmp_path)
    encoder = mae.load_sam(tmp_path)
    assert encoder.config == SMALL
    images = torch.randn(1, 3, 160, 160)
    expected = theirs(images).last_hidden_state
    assert (encoder(images) - expected).norm() <= 1e-5 * expected.norm()


def test_hf_names_map_to_ours_and_back() -> None:
    state = small_sam().state_dict(prefix="encoder.")
    theirs = to_transformers(state)
    assert list(to_our_names(theirs)) == list(state) and len(theirs) == len(state)


@torch.no_grad()
def test_sam_embedding_equals_that_of_timm_with_the_same_weights() -> None:
    encoder = small_sam()
    theirs = VisionTransformerSAM(
        img_size=160,
        embed_dim=48,
        depth=4,
        num_heads=3,
        num_classes=0,
        window_size=4,
        global_attn_indexes=(1, 3),
        use_rel_pos=True,
        norm_layer=LayerNorm,
    ).eval()
    theirs.load_state_dict({key.replace("mlp.lin", "mlp.fc"): value for key, value in encoder.state_dict().items()})
    images = torch.randn(1, 3, 160, 160)
    expected = theirs.forward_features(images)
    assert (encoder(images) - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_sam_file_of_one_window_loads_as_the_same_function(tmp_path: Path) -> None:
    encoder, images = small_sam(image_size=(64, 64)), torch.randn(1, 3, 64, 64)
    torch.save(encoder.state_dict(), tmp_path / "sam.pth")
    unsaid = mae.load_sam(tmp_path / "sam.pth")
    assert unsaid.config.global_blocks == (0, 1, 2, 3) and unsaid.config.window == 4
    torch.testing.assert_close(unsaid(images), encoder(images))
    assert mae.load_sam(tmp_path / "sam.pth", global_blocks=(1, 3), window=4).config == encoder.config


def test_file_that_holds_no_sam_encoder_raises_checkpoint_error(tmp_path: Path) -> None:
    state = small_sam().state_dict()
    path = tmp_path / "sam.pth"
    for contents, sentence in [
        (
            {key: value for key, value in state.items() if key != "blocks.1.norm1.weight"},
            "blocks.1.norm1.weight is missing",
        ),
        (state | {"blocks.1.extra": torch.zeros(1)}, "blocks.1.extra is left over"),
        (
            {f"image_encoder.{key}": value for key, value in state.items()} | {"odd.weight": torch.zeros(1)},
            "odd.weight",
        ),
        ({"cls_token": torch.zeros(1)}, "no weights of a SAM-style encoder"),
    ]:
        torch.save(contents, path)
        with pytest.raises(mae.CheckpointError, match=sentence):
            mae.load_sam(path)
    with pytest.raises(mae.CheckpointError, match="does not exist"):
        mae.load_sam(tmp_path / "nothing.pth")
