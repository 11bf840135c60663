"""The SAM-style formats, made from a masked autoencoder or from a SAM, give their libraries the same embedding."""

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import mae
from mae.export.open import open_export
from mae.export.write import export
from mae.formats.available import FORMATS
from tests.exports import own_checkpoint, photograph
from tests.test_export_formats import close
from tests.test_sam_conversion import small_sam, whole_sam

SAM_FORMATS = [name for name, fmt in FORMATS.items() if fmt.holds == "sam"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def embedding(to: str, out: Path, images: torch.Tensor) -> torch.Tensor:
    """Computes the embedding by the format's own library from the export."""
    if to == "segment-anything":
        modeling = pytest.importorskip("segment_anything.modeling")
        arguments = json.loads(out.with_name(out.name + ".json").read_text())["load"]["arguments"]
        peer = modeling.ImageEncoderViT(**arguments | {"norm_layer": partial(nn.LayerNorm, eps=1e-6)})
        state = torch.load(out, weights_only=True)
        peer.load_state_dict({key.removeprefix("image_encoder."): value for key, value in state.items()}, strict=True)
        return peer.eval()(images)
    if to == "hf-sam":
        transformers = pytest.importorskip("transformers")
        return transformers.SamVisionModel.from_pretrained(out).eval()(images).last_hidden_state
    if to == "timm-sam":
        return timm.create_model(f"local-dir:{out}", pretrained=True).eval()(images)
    if to == "onnx-sam":
        session = pytest.importorskip("onnxruntime").InferenceSession(out, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
    return torch.export.load(out).module()(images)


@pytest.mark.parametrize(
    "to", [pytest.param(to, marks=pytest.mark.slow) if to in ("onnx-sam", "pt2-sam") else to for to in SAM_FORMATS]
)
def test_sam_encoder_export_gives_the_same_embedding_and_loads_back(tmp_path: Path, to: str) -> None:
    encoder, source = small_sam(), tmp_path / "source.pth"
    torch.save(encoder.state_dict(), source)
    out = tmp_path / "out" / f"export{FORMATS[to].suffix}"
    card = json.loads(export(source, to, out).read_text())
    assert card["verification"]["difference"] <= 1e-5
    images = photograph(encoder.config, 3)
    close(embedding(to, out, images), encoder(images))
    if FORMATS[to].read_back:
        back = mae.load_sam(out)
        assert back.config == encoder.config
        assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in back.state_dict().items())


@pytest.mark.parametrize("to", ["segment-anything", "hf-sam", "timm-sam"])
def test_masked_autoencoder_exports_as_sam_at_the_given_image_size(tmp_path: Path, to: str) -> None:
    _, source = own_checkpoint(tmp_path, depth=4, image_size=64, patch_size=16)
    out = tmp_path / "out" / f"export{FORMATS[to].suffix}"
    card = json.loads(export(source, to, out, image_size=(256, 256)).read_text())
    assert card["config"]["image_size"] == [256, 256] and card["config"]["global_blocks"] == [0, 1, 2, 3]
    assert card["step"] == 500 and card["pixels"]["known"]
    images = photograph(mae.MAEConfig(image_size=256), 1)
    assert embedding(to, out, images).shape == (1, 256, 16, 16)


def test_sam_export_defaults_to_size_1024_and_a_deterministic_neck(tmp_path: Path) -> None:
    _, source = own_checkpoint(tmp_path, depth=4, patch_size=16, image_size=64)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        opened = open_export(source, FORMATS["segment-anything"], None, None)
        assert (opened.sam.config.image_size, opened.step) == ((1024, 1024), 500)
        states.append(opened.sam.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("to", ["timm-sam", pytest.param("onnx-sam", marks=pytest.mark.slow)])
def test_rectangular_five_channel_sam_exports_only_where_the_format_allows(tmp_path: Path, to: str) -> None:
    encoder, source = small_sam(image_size=(96, 160), in_channels=5), tmp_path / "source.pth"
    torch.save(encoder.state_dict(), source)
    out = tmp_path / "out" / f"export{FORMATS[to].suffix}"
    export(source, to, out)
    images = photograph(encoder.config)
    close(embedding(to, out, images), encoder(images))
    for square in ("segment-anything", "hf-sam"):
        with pytest.raises(mae.ConfigError, match="only models with square images"):
            export(source, square, tmp_path / f"square{FORMATS[square].suffix}")


def test_timm_sam_export_has_the_norm_epsilon_of_sam(tmp_path: Path) -> None:
    torch.save(small_sam().state_dict(), tmp_path / "source.pth")
    export(tmp_path / "source.pth", "timm-sam", tmp_path / "folder")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    epsilons = {module.eps for module in theirs.modules() if isinstance(module, nn.LayerNorm)}
    assert epsilons == {1e-6}


def test_encoder_merged_into_a_sam_file_loads_strictly_in_segment_anything(tmp_path: Path) -> None:
    encoder, sam = small_sam(), whole_sam()
    torch.save(encoder.state_dict(), tmp_path / "source.pth")
    torch.save({"model": {f"module.{key}": value for key, value in sam.state_dict().items()}}, tmp_path / "sam.pth")
    before = {key: value.clone() for key, value in sam.state_dict().items()}
    card = export(tmp_path / "source.pth", "segment-anything", tmp_path / "out.pth", merge_into=tmp_path / "sam.pth")
    assert json.loads(card.read_text())["load"]["merged_into"] == str(tmp_path / "sam.pth")
    sam.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    images = photograph(encoder.config)
    close(sam.image_encoder(images), encoder(images))
    after = sam.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if not key.startswith("image_encoder."))


def test_encoder_merged_into_a_hf_sam_folder_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = small_sam()
    torch.save(encoder.state_dict(), tmp_path / "source.pth")
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 160, "mlp_dim": 192}
    vision = sizes | {"window_size": 4, "global_attn_indexes": [1, 3]}
    whole = transformers.SamModel(transformers.SamConfig(vision_config=vision))
    whole.save_pretrained(tmp_path / "whole")
    export(tmp_path / "source.pth", "hf-sam", tmp_path / "merged", merge_into=tmp_path / "whole")
    merged = transformers.SamModel.from_pretrained(tmp_path / "merged").eval()
    images = photograph(encoder.config)
    close(merged.get_image_embeddings(images), encoder(images))
    before, after = whole.state_dict(), merged.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if not key.startswith("vision_encoder."))


@pytest.mark.slow
def test_onnx_export_of_sam_b_at_1024_differs_by_at_most_1e_4(tmp_path: Path) -> None:
    encoder = mae.SamEncoder(mae.SamConfig())
    for name, parameter in encoder.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            # As large as in a trained SAM: far larger ones would blow rounding up to 1e-3 in either library.
            torch.nn.init.normal_(parameter, std=0.1 if "rel_pos" in name else 0.02)
    torch.save(encoder.state_dict(), tmp_path / "source.pth")
    card = json.loads(export(tmp_path / "source.pth", "onnx-sam", tmp_path / "sam_b.onnx").read_text())
    assert card["verification"]["difference"] <= 1e-4


def test_unsupported_sam_export_raises_config_error(tmp_path: Path) -> None:
    torch.save(small_sam().state_dict(), tmp_path / "sam.pth")
    with pytest.raises(mae.ConfigError, match="holds a SAM-style encoder"):
        export(tmp_path / "sam.pth", "hf-vit", tmp_path / "vit")
    with pytest.raises(mae.ConfigError, match="only models with square images"):
        export(tmp_path / "sam.pth", "hf-sam", tmp_path / "hf", image_size=(320, 160))
    with pytest.raises(mae.ConfigError, match="no place for a whole SAM"):
        export(tmp_path / "sam.pth", "timm-sam", tmp_path / "timm", merge_into=tmp_path / "sam.pth")
    with pytest.raises(mae.CheckpointError, match="without a prompt encoder and a mask decoder"):
        export(tmp_path / "sam.pth", "hf-sam", tmp_path / "hf", merge_into=tmp_path / "sam.pth")
    with pytest.raises(mae.ConfigError, match="holds no whole SAM"):
        export(tmp_path / "sam.pth", "hf-sam", tmp_path / "hf", encoder_only=True)
    torch.save(whole_sam().state_dict(), tmp_path / "whole.pth")
    torch.save(small_sam(image_size=(320, 320)).state_dict(), tmp_path / "large.pth")
    with pytest.raises(mae.CheckpointError, match=r"another architecture: image_size \(160, 160\) there"):
        export(tmp_path / "large.pth", "segment-anything", tmp_path / "out.pth", merge_into=tmp_path / "whole.pth")
    assert not (tmp_path / "out.pth").exists()
