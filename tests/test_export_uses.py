"""Exports in the hands of the other side: heads, axes, half precision, other sizes, and starts of SAM."""

import json
from pathlib import Path

import pytest
import timm
import torch

import mae
from mae.export.write import export
from mae.formats.available import FORMATS
from mae.models.classifier import Classifier, Pool
from tests.exports import SMALL, own_checkpoint, photograph
from tests.test_sam_conversion import small_sam

NAMES = ["ant", "bee", "cät"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def finetuned(folder: Path, pool: Pool = "patches") -> tuple[Classifier, Path]:
    """A classifier with random weights everywhere, and the checkpoint that a run would have saved of it."""
    torch.manual_seed(0)
    model = Classifier(mae.MAEConfig.model_validate(SMALL), len(NAMES), pool).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    run = {"step": 5, "recipe": {"model": model.config.model_dump(mode="json")}, "classes": NAMES}
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    path = folder / "step-00000005.ckpt"
    torch.save({"mae": run, "state_dict": state}, path)
    return model, path


def onnx_outputs(file: Path, images: torch.Tensor) -> tuple[torch.Tensor, str]:
    session = pytest.importorskip("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(outputs), session.get_outputs()[0].name


@pytest.mark.parametrize("arguments", [{}, {"global_pool": "avg"}, {"in_chans": 1}], ids=str)
def test_timm_folder_takes_a_new_head(tmp_path: Path, arguments) -> None:
    model, source = own_checkpoint(tmp_path)
    export(source, "timm-folder", tmp_path / "folder")
    peer = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=10, **arguments)
    images = photograph(model.config)[:, : arguments.get("in_chans", 3)]
    assert peer.eval()(images).shape == (2, 10)
    assert torch.equal(peer.state_dict()["blocks.1.attn.qkv.weight"], model.blocks[1].attn.qkv.weight)


def test_timm_folder_of_a_classifier_and_of_a_sam_take_a_new_head(tmp_path: Path) -> None:
    _, source = finetuned(tmp_path)
    export(source, "timm-folder", tmp_path / "folder")
    peer = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=10)
    assert peer(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    torch.save(small_sam().state_dict(), tmp_path / "sam.pth")
    export(tmp_path / "sam.pth", "timm-sam", tmp_path / "sam")
    peer = timm.create_model(f"local-dir:{tmp_path / 'sam'}", pretrained=True, num_classes=10, global_pool="avg")
    assert peer(torch.zeros(1, 3, 160, 160)).shape == (1, 10)


def test_transformers_reads_timm_folders_of_classifiers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, source = finetuned(tmp_path)
    export(source, "timm-folder", tmp_path / "folder")
    peer = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "folder").eval()
    images = photograph(model.config)
    torch.testing.assert_close(peer(images).logits, model(images), rtol=1e-4, atol=1e-4)
    assert list(peer.config.id2label.values()) == NAMES


@pytest.mark.parametrize("to", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_classifier_graph_gives_scores_in_any_batch_and_names_its_axes_and_classes(tmp_path: Path, to: str) -> None:
    model, source = finetuned(tmp_path)
    out = tmp_path / f"out{FORMATS[to].suffix}"
    card = json.loads(export(source, to, out).read_text())
    assert card["load"]["output"] == ["scores", "batch", 3] and card["classes"] == NAMES
    assert card["verification"]["compared"].startswith("class scores")
    images = photograph(model.config, 3)
    if to == "pt2":
        scores = torch.export.load(out).module()(images)
    else:
        scores, name = onnx_outputs(out, images)
        assert name == "scores"
        onnx = pytest.importorskip("onnx").load(out)
        axes = [value.type.tensor_type.shape.dim[0].dim_param for value in (*onnx.graph.input, *onnx.graph.output)]
        assert axes == ["batch", "batch"]
        assert json.loads({entry.key: entry.value for entry in onnx.metadata_props}["label_names"]) == NAMES
    torch.testing.assert_close(scores, model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_half_precision_graph_is_half_as_large_and_compared_within_its_tolerance(tmp_path: Path, to: str) -> None:
    model, source = own_checkpoint(tmp_path, width=128)
    whole, half = (tmp_path / f"{name}{FORMATS[to].suffix}" for name in ("whole", "half"))
    export(source, to, whole)
    card = json.loads(export(source, to, half, half=True).read_text())
    assert half.stat().st_size < 0.65 * whole.stat().st_size
    found = card["verification"]
    assert found["tolerance"] == 1e-2 and 1e-5 < found["difference"] < 1e-2
    assert card["load"]["precision"] == "float16 inside, float32 in and out"
    images = photograph(model.config)
    features = torch.export.load(half).module()(images) if to == "pt2" else onnx_outputs(half, images)[0]
    assert features.dtype == torch.float32
    assert (features - model.encode(images)).abs().max() < 1e-2 * features.abs().max()


def test_half_precision_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    _, source = own_checkpoint(tmp_path)
    with pytest.raises(mae.ConfigError, match="--half: the format timm is written in float32; choose --to onnx or pt2"):
        export(source, "timm", tmp_path / "x.safetensors", half=True)
    contents = torch.load(source, weights_only=True)
    contents["state_dict"]["model.norm.bias"][0] = 1e5
    torch.save(contents, source)
    with pytest.raises(mae.ConfigError, match=r"norm\.bias have values above 65504"):
        export(source, "pt2", tmp_path / "x.pt2", half=True)


def test_classifier_is_exported_at_another_image_size_with_its_head(tmp_path: Path, capsys) -> None:
    model, source = finetuned(tmp_path)
    card = json.loads(export(source, "timm", tmp_path / "x.safetensors", image_size=(64, 64)).read_text())
    again = mae.load(tmp_path / "x.safetensors")
    assert isinstance(again, Classifier) and again.config.image_size == (64, 64) and again.class_names == NAMES
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(images), model.at(64)(images))
    assert card["remarks"] == ["positions are resized bicubically from 32 x 32 pixels"]
    assert card["remarks"][0] in capsys.readouterr().out


@pytest.mark.parametrize("to", ["detectron2", "timm-sam"])
def test_format_without_heads_takes_the_encoder_of_a_classifier_and_says_so(tmp_path: Path, to: str, capsys) -> None:
    fields = {"depth": 4, "patch_size": 16}
    model = Classifier(mae.MAEConfig.model_validate(SMALL | fields), 3)
    run = {"step": 5, "recipe": {"model": model.config.model_dump(mode="json")}}
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"mae": run, "state_dict": state}, tmp_path / "step-00000005.ckpt")
    out = tmp_path / f"out{FORMATS[to].suffix}"
    export(tmp_path / "step-00000005.ckpt", to, out, image_size=(64, 64))
    assert "the head of 3 classes is left out" in capsys.readouterr().out
    if to == "timm-sam":
        assert torch.equal(mae.load_sam(out).blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)
    else:
        written = torch.load(out, weights_only=True)["model"]
        assert torch.equal(written["backbone.net.blocks.3.attn.qkv.weight"], model.blocks[3].attn.qkv.weight)


def test_sam_is_exported_at_another_image_size(tmp_path: Path) -> None:
    encoder = small_sam()
    torch.save(encoder.state_dict(), tmp_path / "sam.pth")
    card = json.loads(export(tmp_path / "sam.pth", "timm-sam", tmp_path / "sam", image_size=(96, 224)).read_text())
    assert card["config"]["image_size"] == [96, 224] and "resized from 160 x 160" in card["remarks"][0]
    images = torch.randn(1, 3, 96, 224)
    torch.testing.assert_close(mae.load_sam(tmp_path / "sam")(images), encoder(images), rtol=1e-4, atol=1e-5)


def test_vit_model_reads_the_exact_encoder_of_an_hf_vitmae_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, source = own_checkpoint(tmp_path)
    export(source, "hf-vitmae", tmp_path / "vitmae")
    images = photograph(model.config)
    masking = transformers.ViTMAEModel.from_pretrained(tmp_path / "vitmae").eval()
    assert masking(images).last_hidden_state.shape[1] == 1 + 4  # a quarter of the patches, others in each call
    whole = transformers.ViTModel.from_pretrained(tmp_path / "vitmae", add_pooling_layer=False).eval()
    torch.testing.assert_close(whole(images).last_hidden_state, model.encode(images), rtol=1e-4, atol=1e-5)
