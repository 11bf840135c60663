"""An export is the same function in the peer's own library, or it is not written."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import mae
from mae.export import timm as timm_format
from mae.export.__main__ import export
from mae.models.vit import LayerNorm


def checkpoint(tmp_path: Path, **fields) -> tuple[mae.MaskedAutoencoder, Path]:
    torch.manual_seed(0)
    small = {"image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "num_heads": 3, "decoder_depth": 1}
    model = mae.MaskedAutoencoder(mae.MAEConfig(**small | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # also biases and norms
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    return model, tmp_path / "mae.pth"


def test_timms_own_vit_of_the_same_size_loads_it_strictly_and_gives_the_same_features(tmp_path: Path) -> None:
    fields = {"image_size": 224, "patch_size": 16, "depth": 12}
    model, source = checkpoint(tmp_path, **fields)
    export(source, "timm", tmp_path / "out" / "encoder.safetensors", overwrite=False)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(load_file(tmp_path / "out" / "encoder.safetensors"), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(images), model.encode(images), rtol=1e-5, atol=1e-5)
    card = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert card["source"] == str(source) and len(card["sha256"]) == 64
    assert card["timm"]["difference"] <= 1e-5


@pytest.mark.parametrize(
    "fields", [{"image_size": (16, 40)}, {"in_channels": 5}, {"positions": "learned"}], ids=lambda f: next(iter(f))
)
def test_the_card_says_how_to_build_timms_model(tmp_path: Path, fields) -> None:
    model, source = checkpoint(tmp_path, **fields)
    if "image_size" in fields:
        model, source = checkpoint(tmp_path)  # a bare .pth cannot say that it is rectangular
    card = json.loads(export(source, "timm", tmp_path / "encoder.safetensors", overwrite=False).read_text())
    theirs = VisionTransformer(**card["timm"]["arguments"], norm_layer=LayerNorm).eval()
    theirs.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    images = torch.randn(2, model.config.in_channels, *model.config.image_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(images), model.encode(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{"class_token": False}, {"image_size": (16, 40)}], ids=["no class token", "rectangle"]
)
def test_models_without_a_class_token_and_rectangles_export_too(tmp_path: Path, fields) -> None:
    model, _ = checkpoint(tmp_path, **fields)
    assert timm_format.write(model, tmp_path / "encoder.safetensors")["difference"] <= 1e-5


def test_an_export_that_is_another_function_is_refused_and_leaves_no_file(tmp_path: Path, monkeypatch) -> None:
    model, _ = checkpoint(tmp_path)
    wrong = timm_format.timm_arguments(model.config) | {"num_heads": 6}
    monkeypatch.setattr(timm_format, "timm_arguments", lambda config: wrong)
    with pytest.raises(mae.CheckpointError, match="features differ"):
        timm_format.write(model, tmp_path / "encoder.safetensors")
    assert not list(tmp_path.glob("encoder*"))


def test_an_existing_export_is_replaced_only_when_told(tmp_path: Path) -> None:
    _, source = checkpoint(tmp_path)
    out = tmp_path / "encoder.safetensors"
    export(source, "timm", out, overwrite=False)
    before = out.stat().st_mtime_ns
    with pytest.raises(mae.ConfigError, match="--overwrite"):
        export(source, "timm", out, overwrite=False)
    assert out.stat().st_mtime_ns == before
    export(source, "timm", out, overwrite=True)
    assert out.stat().st_mtime_ns != before
