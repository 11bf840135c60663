"""Each format, loaded by the library that it is for, computes on a photograph what the source computes."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import mae
from mae.export.write import export
from mae.formats.available import FORMATS
from mae.formats.facebook import in_decoder
from mae.models.resample import at_image_size
from mae.models.vit import LayerNorm
from tests.exports import own_checkpoint, photograph

transformers = pytest.importorskip("transformers")


def close(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """float32: within 1e-5 of the largest value, ten times better than promised."""
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def weights_equal(one: mae.Encoder, other: mae.Encoder) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


VARIANTS = [
    {},
    {"positions": "learned", "norm_pix": False, "mask_ratio": 0.6},
    {"in_channels": 5},
    {"image_size": (16, 40)},
    {"class_tokens": 0},
    {"class_tokens": 4, "positions": "learned"},
    {"patch_size": 14, "image_size": 56, "mlp_ratio": 3.0},
]


def named(fields: dict) -> str:
    return next(iter(fields), "plain")


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_timm_export_gives_the_same_features_in_timm(tmp_path: Path, fields) -> None:
    model, source = own_checkpoint(tmp_path, **fields)
    card = json.loads(export(source, "timm", tmp_path / "encoder.safetensors").read_text())
    theirs = VisionTransformer(**card["load"]["arguments"], norm_layer=LayerNorm).eval()
    theirs.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    images = photograph(model.config)
    close(theirs.forward_features(images), model.encode(images))
    back = mae.load(tmp_path / "encoder.safetensors")
    assert type(back) is mae.Encoder and back.config == model.config
    assert torch.equal(back.encode(images), model.encode(images))


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_timm_folder_export_loads_by_create_model_with_the_same_features(tmp_path: Path, fields) -> None:
    model, source = own_checkpoint(tmp_path, **fields)
    export(source, "timm-folder", tmp_path / "folder")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    images = photograph(model.config)
    close(theirs.forward_features(images), model.encode(images))
    assert list(timm.data.resolve_data_config({}, model=theirs)["mean"])[:1] == [
        0.3 if not fields.get("in_channels") else 0.4
    ]
    back = mae.load(tmp_path / "folder")
    assert type(back) is mae.Encoder and back.config.image_size == model.config.image_size
    assert torch.equal(back.encode(images), model.encode(images))


def test_timm_export_loads_strictly_into_timms_own_vit(tmp_path: Path) -> None:
    model, source = own_checkpoint(tmp_path, image_size=224, patch_size=16, width=192, depth=12, num_heads=3)
    export(source, "timm", tmp_path / "encoder.safetensors")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    images = photograph(model.config)
    close(theirs.forward_features(images), model.encode(images))


@pytest.mark.parametrize(
    "fields", [f for f in VARIANTS if f.get("class_tokens", 1) == 1 and named(f) != "image_size"], ids=named
)
def test_hf_vitmae_export_gives_the_same_loss_and_predictions(tmp_path: Path, fields) -> None:
    model, source = own_checkpoint(tmp_path, **fields)
    export(source, "hf-vitmae", tmp_path / "vitmae")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "vitmae").eval()
    images, noise = photograph(model.config), torch.rand(2, model.config.patches)
    expected, out = theirs(images, noise=noise), model(images, noise)
    close(expected.loss, out.loss)
    close(expected.logits[expected.mask.bool()], out.pred.flatten(0, 1))
    back = mae.load(tmp_path / "vitmae")
    assert back.config == model.config and weights_equal(back, model)


@pytest.mark.parametrize("fields", [f for f in VARIANTS if f.get("class_tokens", 1) == 1], ids=named)
def test_hf_vit_export_gives_the_same_features(tmp_path: Path, fields) -> None:
    model, source = own_checkpoint(tmp_path, **fields)
    export(source, "hf-vit", tmp_path / "vit")
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    images = photograph(model.config)
    close(theirs(images).last_hidden_state, model.encode(images))
    back = mae.load(tmp_path / "vit")
    assert type(back) is mae.Encoder and torch.equal(back.encode(images), model.encode(images))


def test_hf_image_processor_has_the_mean_and_std_of_the_run(tmp_path: Path) -> None:
    _, source = own_checkpoint(tmp_path)
    for to in ("hf-vit", "hf-vitmae"):
        export(source, to, tmp_path / to)
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / to)
        assert list(processor.image_mean) == [0.3, 0.4, 0.5] and list(processor.image_std) == [0.2, 0.25, 0.3]
    # And a folder exported again keeps it.
    card = json.loads(export(tmp_path / "hf-vitmae", "timm-folder", tmp_path / "folder").read_text())
    assert card["pixels"] == {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.25, 0.3], "known": True, "bits": 8}
    card = json.loads(export(tmp_path / "folder", "timm", tmp_path / "encoder.safetensors").read_text())
    assert card["pixels"]["mean"] == [0.3, 0.4, 0.5]


def test_facebook_export_exported_again_is_bit_identical(tmp_path: Path) -> None:
    model, source = own_checkpoint(tmp_path, width=192, num_heads=3, decoder_width=512, decoder_num_heads=16)
    export(source, "facebook", tmp_path / "first.pth")
    export(tmp_path / "first.pth", "facebook", tmp_path / "second.pth")
    first, second = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("first", "second"))
    assert first.keys() == second.keys() == {"model", "args"} and first["args"] == second["args"]
    assert first["model"].keys() == second["model"].keys() == model.state_dict().keys()
    assert all(torch.equal(first["model"][key], second["model"][key]) for key in first["model"])


def test_facebook_export_of_an_encoder_loads_into_the_published_architecture(tmp_path: Path) -> None:
    model, source = own_checkpoint(tmp_path)
    export(source, "hf-vit", tmp_path / "vit")
    export(tmp_path / "vit", "facebook", tmp_path / "encoder.pth")  # an encoder stays one
    theirs = VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=4, num_classes=0, norm_layer=LayerNorm).eval()
    theirs.load_state_dict(torch.load(tmp_path / "encoder.pth", weights_only=True)["model"], strict=True)
    images = photograph(model.config)
    close(theirs.forward_features(images), model.encode(images))


@pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTModel"])
def test_hf_folder_exported_to_its_own_format_is_bit_identical(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    sizes |= {"image_size": 32, "patch_size": 8}
    if kind == "ViTModel":
        theirs = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)
        to, options = "hf-vit", {"add_pooling_layer": False}
    else:
        decoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
        decoder = {f"decoder_{key}": value for key, value in decoder.items()}
        theirs = transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**sizes, **decoder, mask_ratio=0.6, norm_pix_loss=True)
        )
        to, options = "hf-vitmae", {}
    theirs.save_pretrained(tmp_path / "theirs")
    export(tmp_path / "theirs", to, tmp_path / "ours")
    back = getattr(transformers, kind).from_pretrained(tmp_path / "ours", **options)
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if kind != "ViTModel":
        assert (back.config.mask_ratio, back.config.norm_pix_loss) == (0.6, True)


@pytest.mark.parametrize("fields", [{}, {"class_tokens": 0}, {"class_tokens": 4}, {"in_channels": 5}], ids=named)
def test_detectron2_export_has_the_documented_names_and_shapes(tmp_path: Path, fields) -> None:
    model, source = own_checkpoint(tmp_path, **fields)
    card = json.loads(export(source, "detectron2", tmp_path / "vitdet.pth").read_text())
    assert card["verification"]["compared_with"] is None
    channels, positions = model.config.in_channels, 16 + (model.config.class_tokens == 1)
    expected = {"pos_embed": [1, positions, 64], "patch_embed.proj.weight": [64, channels, 8, 8]}
    expected["patch_embed.proj.bias"] = [64]
    for block in ("blocks.0", "blocks.1"):
        expected |= {
            f"{block}.norm1.weight": [64],
            f"{block}.norm1.bias": [64],
            f"{block}.attn.qkv.weight": [192, 64],
            f"{block}.attn.qkv.bias": [192],
            f"{block}.attn.proj.weight": [64, 64],
            f"{block}.attn.proj.bias": [64],
            f"{block}.norm2.weight": [64],
            f"{block}.norm2.bias": [64],
            f"{block}.mlp.fc1.weight": [256, 64],
            f"{block}.mlp.fc1.bias": [256],
            f"{block}.mlp.fc2.weight": [64, 256],
            f"{block}.mlp.fc2.bias": [64],
        }
    written = torch.load(tmp_path / "vitdet.pth", weights_only=True)["model"]
    assert {key: list(value.shape) for key, value in written.items()} == {
        f"backbone.net.{key}": shape for key, shape in expected.items()
    }
    kept = model.state_dict() | {"pos_embed": model.pos_embed[:, -positions:]}
    assert all(torch.equal(value, kept[key.removeprefix("backbone.net.")]) for key, value in written.items())


@pytest.mark.parametrize("fields", [{}, {"class_tokens": 0, "image_size": (16, 40), "in_channels": 5}], ids=named)
def test_onnx_export_gives_the_same_features_at_each_batch_size(tmp_path: Path, fields) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, source = own_checkpoint(tmp_path, **fields)
    export(source, "onnx", tmp_path / "encoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = photograph(model.config, batch)
        (features,) = session.run(["features"], {"images": images.numpy()})
        close(torch.from_numpy(features), model.encode(images))


def test_onnx_weights_above_the_limit_lie_in_a_file_of_their_own(tmp_path: Path, monkeypatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, source = own_checkpoint(tmp_path)
    monkeypatch.setattr("mae.formats.onnx.MAX_BYTES_INSIDE", 1000)
    card = json.loads(export(source, "onnx", tmp_path / "out" / "encoder.onnx").read_text())
    assert set(card["sha256"]) == {"encoder.onnx", "encoder.onnx.data"}
    (tmp_path / "out").rename(tmp_path / "moved")
    session = onnxruntime.InferenceSession(tmp_path / "moved" / "encoder.onnx", providers=["CPUExecutionProvider"])
    images = photograph(model.config)
    close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), model.encode(images))


def test_pt2_export_gives_the_same_features_at_each_batch_size(tmp_path: Path) -> None:
    model, source = own_checkpoint(tmp_path)
    export(source, "pt2", tmp_path / "encoder.pt2")
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    for batch in (1, 3):
        images = photograph(model.config, batch)
        close(program(images), model.encode(images))


@pytest.mark.parametrize("to", ["timm", "hf-vit", "facebook", "onnx"])
def test_export_at_another_image_size_resizes_positions_as_timm(tmp_path: Path, to: str) -> None:
    model, source = own_checkpoint(tmp_path, width=192, num_heads=3, decoder_width=512, decoder_num_heads=16)
    out = tmp_path / "out" / f"export{FORMATS[to].suffix}"
    card = json.loads(export(source, to, out, image_size=(48, 48)).read_text())
    assert card["config"]["image_size"] == [48, 48] and card["verification"]["difference"] <= 1e-5
    if FORMATS[to].read_back:
        theirs = VisionTransformer(32, 8, embed_dim=192, depth=2, num_heads=3, num_classes=0, norm_layer=LayerNorm)
        theirs.load_state_dict({key: value for key, value in model.state_dict().items() if not in_decoder(key)})
        theirs.set_input_size(48)  # timm's own resize
        images = photograph(at_image_size(model, 48).config)
        close(theirs.eval().forward_features(images), mae.load(out).encode(images))


def test_export_at_an_unsupported_image_size_raises_config_error(tmp_path: Path) -> None:
    _, source = own_checkpoint(tmp_path)
    with pytest.raises(mae.ConfigError, match="a decoder is not resized"):
        export(source, "hf-vitmae", tmp_path / "vitmae", image_size=(48, 48))
    with pytest.raises(mae.ConfigError, match="not a multiple of patch_size=8"):
        export(source, "timm", tmp_path / "encoder.safetensors", image_size=(50, 50))


def test_each_format_has_a_short_description() -> None:
    assert all(fmt.sentence and len(fmt.sentence) < 120 for fmt in FORMATS.values())
