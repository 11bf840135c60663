"""Weights load the same whatever was saved round them, and what was taken off or left is said."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

import mae
from mae.demo.model import open_model
from mae.export.__main__ import main
from mae.export.write import export
from mae.formats.load_segmenter import initialise_segmenter, load_segmenter
from mae.formats.opened import open_weights, scale_of
from mae.formats.sam_names import to_our_names, to_segment_anything, to_transformers
from mae.sam.segmenter import Segmenter
from tests.exports import own_checkpoint, photograph
from tests.test_sam_conversion import small_sam

State = dict[str, Tensor]
FIELDS = {"image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "num_heads": 3, "decoder_depth": 1}
HF = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 768}
HF |= {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}


@pytest.fixture(scope="module")
def model() -> mae.MaskedAutoencoder:
    torch.manual_seed(0)
    return mae.MaskedAutoencoder(mae.MAEConfig.model_validate(FIELDS)).eval()


@pytest.fixture(scope="module")
def encoder() -> mae.Encoder:
    """Cheaper than an autoencoder where a decoder makes no difference."""
    torch.manual_seed(0)
    return mae.Encoder(mae.MAEConfig.model_validate(FIELDS | {"depth": 1, "decoder_depth": 8})).eval()


@pytest.fixture(scope="module")
def sam() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(small_sam(out_channels=32)).eval()


@pytest.fixture(scope="module")
def sam_state(sam: Segmenter) -> State:
    """Returns the same SAM under segment-anything's names."""
    return to_segment_anything(sam.state_dict())


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def inside(part: str, state: State) -> State:
    """Names as a wrapper of each block leaves them."""
    return {key.replace("blocks.0.", f"blocks.0.{part}."): value for key, value in state.items()}


def other(state: State) -> State:
    return {key: torch.zeros_like(value) for key, value in state.items()}


# By name: what a training program saves, and what is said of it.
WRAPPERS: dict[str, tuple[Callable[[State], Any], str]] = {
    "lightning": (lambda s: {"epoch": 1, "state_dict": prefixed("model.", s)}, "unwrapped state_dict, model."),
    "deepspeed": (lambda s: {"module": prefixed("module.", s), "ds_config": {}}, "unwrapped module, module."),
    "compiled ddp": (lambda s: prefixed("_orig_mod.module.", s), "_orig_mod., module."),
    "fsdp": (lambda s: {"model": inside("_fsdp_wrapped_module", s)}, "unwrapped model, _fsdp_wrapped_module."),
    "recomputed": (lambda s: inside("_checkpoint_wrapped_module", s), "unwrapped _checkpoint_wrapped_module."),
    "ema": (lambda s: {"state_dict": other(s), "state_dict_ema": s}, "unwrapped state_dict_ema; not used: state_dict"),
    "averaged": (lambda s: prefixed("module.", s) | {"n_averaged": torch.ones(1)}, "not used: n_averaged (1 tensor)"),
    "ema beside": (lambda s: prefixed("ema_model.", s) | prefixed("online_model.", other(s)), "online_model ("),
    "named twice": (lambda s: {"model": prefixed("net.", s) | prefixed("net.inner.", s)}, "unwrapped model, net."),
    "text beside": (lambda s: {"model": "vit_tiny", "state_dict": s}, "unwrapped state_dict; not used: model"),
    "deeper": (lambda s: {"app": {"state": {"model": s}}, "optim": {"state": {0: {}}}}, "unwrapped app, state, model"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_weights_load_whole_and_the_wrappers_are_said(tmp_path: Path, encoder, wrapper: str, capsys) -> None:
    wrap, said = WRAPPERS[wrapper]
    state = encoder.state_dict()
    torch.save(wrap(state), tmp_path / "file.pth")
    back = mae.load(tmp_path / "file.pth")
    assert back.config == encoder.config
    assert all(torch.equal(value, state[key]) for key, value in back.state_dict().items())
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("wrapper", ["lightning", "compiled ddp", "fsdp", "ema"])
def test_wrapped_sam_stays_whole(tmp_path: Path, sam, sam_state, wrapper: str) -> None:
    wrap, _ = WRAPPERS[wrapper]
    torch.save(wrap(sam_state), tmp_path / "sam.pth")
    back, own = to_our_names(open_weights(tmp_path / "sam.pth").weights), sam.state_dict()
    assert back.keys() == own.keys() and all(torch.equal(back[key], own[key]) for key in own)


def test_wrapped_sam_starts_a_segmentation_run_whole(tmp_path: Path, sam, sam_state, capsys) -> None:
    state = prefixed("sam.module.", sam_state)
    torch.save({"model_state": state, "decoder_state": {"w": torch.ones(2)}}, tmp_path / "sam.pt")
    fresh = Segmenter(mae.SamEncoder(sam.encoder.config))
    initialise_segmenter(fresh, tmp_path / "sam.pt")
    assert all(torch.equal(value, sam.state_dict()[key]) for key, value in fresh.state_dict().items())
    assert "not used: decoder_state" in capsys.readouterr().out


def test_sam_encoder_without_other_parts_starts_a_run_with_a_word(tmp_path: Path, sam) -> None:
    torch.save(sam.encoder.state_dict(), tmp_path / "encoder.pth")
    said = initialise_segmenter(Segmenter(mae.SamEncoder(sam.encoder.config)), tmp_path / "encoder.pth")
    assert said == ["it is an encoder alone: prompt encoder and mask decoder start from random weights"]


@pytest.mark.parametrize("names", ["segment-anything", "own", "transformers", "safetensors"])
def test_whole_sam_in_a_file_of_any_names_is_read_whole(tmp_path: Path, sam, sam_state, names: str) -> None:
    own = sam.state_dict()
    state = {"own": own, "transformers": to_transformers(own)}.get(names, sam_state)
    pixels = {"pixel_mean": torch.full((3, 1, 1), 102.0), "pixel_std": torch.full((3, 1, 1), 51.0)}
    (save_file if names == "safetensors" else torch.save)(state | pixels, tmp_path / "sam.bin")
    opened = open_weights(tmp_path / "sam.bin")
    back = to_our_names(opened.weights)
    assert back.keys() == own.keys() and all(torch.equal(back[key], own[key]) for key in own)
    assert scale_of(opened, 3).mean == pytest.approx((0.4,) * 3) and scale_of(opened, 3).known


def test_whole_sam_is_exported_whole_and_the_card_names_what_was_compared(tmp_path: Path, sam, sam_state) -> None:
    """From segment-anything to transformers, and back."""
    pytest.importorskip("segment_anything")
    torch.save({"model": sam_state}, tmp_path / "sam.pth")
    there = export(tmp_path / "sam.pth", "hf-sam", tmp_path / "hf")
    back = export(tmp_path / "hf", "segment-anything", tmp_path / "back.pth")
    for card in (there, back):
        compared = json.loads(card.read_text())["verification"]["compared"]
        assert compared == "image embeddings, masks of a point, masks of a box, on a photograph"
    state = torch.load(tmp_path / "back.pth", weights_only=True)
    assert state.keys() == sam_state.keys() and all(torch.equal(state[key], sam_state[key]) for key in state)


def test_encoder_of_a_whole_sam_is_exported_alone_if_asked(tmp_path: Path, sam, sam_state, capsys) -> None:
    torch.save(sam_state, tmp_path / "sam.pth")
    card = json.loads(export(tmp_path / "sam.pth", "hf-sam", tmp_path / "alone", encoder_only=True).read_text())
    assert card["remarks"] == ["the prompt encoder and the mask decoder are left out"]
    assert card["verification"]["compared"] == "image embeddings, on a photograph"
    assert "the prompt encoder and the mask decoder are left out" in capsys.readouterr().out
    with pytest.raises(mae.CheckpointError, match="without a prompt encoder"):
        load_segmenter(tmp_path / "alone")


def test_encoder_goes_into_a_wrapped_sam_of_another_library(tmp_path: Path, sam, sam_state) -> None:
    torch.manual_seed(1)
    encoder = small_sam(out_channels=32)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    torch.save({"model": prefixed("module.", sam_state), "epoch": 3}, tmp_path / "sam.pth")
    card = export(tmp_path / "encoder.pth", "hf-sam", tmp_path / "merged", merge_into=tmp_path / "sam.pth")
    assert "masks of a box" in json.loads(card.read_text())["verification"]["compared"]
    merged, expected = to_our_names(open_weights(tmp_path / "merged").weights), sam.other_parts()
    expected |= encoder.state_dict(prefix="encoder.")
    assert merged.keys() == expected.keys() and all(torch.equal(merged[key], expected[key]) for key in merged)


def test_sam_with_another_mask_decoder_is_refused_whole_and_exported_alone(tmp_path: Path, sam_state) -> None:
    torch.save(sam_state | {"mask_decoder.hf_token.weight": torch.ones(1, 32)}, tmp_path / "hq.pth")
    with pytest.raises(mae.CheckpointError, match=r"hf_token.weight is left over\. Its encoder alone: --encoder-only"):
        export(tmp_path / "hq.pth", "segment-anything", tmp_path / "sam.pth")
    export(tmp_path / "hq.pth", "segment-anything", tmp_path / "sam.pth", encoder_only=True)


def test_dino_checkpoint_gives_the_teacher_and_names_the_student_and_the_head(tmp_path: Path, encoder, capsys) -> None:
    state = encoder.state_dict()
    heads = {"head.last_layer.weight": torch.ones(2, 2), "head.mlp.0.weight": torch.ones(2, 2)}
    teacher = prefixed("module.backbone.", state) | prefixed("module.", heads)
    torch.save({"student": other(teacher), "teacher": teacher, "epoch": 7}, tmp_path / "dino.pth")
    loaded = mae.load(tmp_path / "dino.pth")
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert (
        "unwrapped teacher, module., backbone.; not used: student, epoch, head (2 tensors)" in capsys.readouterr().out
    )


def test_file_of_two_different_models_is_refused_naming_both(tmp_path: Path, encoder) -> None:
    state = encoder.state_dict()
    torch.save({"state_dict": prefixed("left.", state) | prefixed("right.", other(state))}, tmp_path / "two.pth")
    with pytest.raises(mae.CheckpointError, match=r"several models, under state_dict\.left, state_dict\.right"):
        mae.load(tmp_path / "two.pth")


def test_teacher_of_another_architecture_is_not_taken_for_an_average(tmp_path: Path, encoder) -> None:
    state = encoder.state_dict()
    larger = state | {key.replace("blocks.0.", "blocks.1."): value for key, value in state.items()}
    torch.save({"model": other(state), "teacher": larger}, tmp_path / "distilled.pth")
    with pytest.raises(mae.CheckpointError, match="several models, under model, teacher"):
        mae.load(tmp_path / "distilled.pth")


def test_sharded_parameters_raise_the_command_that_merges_them(tmp_path: Path, encoder) -> None:
    state = encoder.state_dict()
    torch.save({"module": {key: value[:0] for key, value in state.items()}}, tmp_path / "zero3.pt")
    with pytest.raises(mae.CheckpointError, match="zero_to_fp32"):
        mae.load(tmp_path / "zero3.pt")
    torch.save(state | {"blocks.0._flat_param": torch.ones(9)}, tmp_path / "flat.pt")
    with pytest.raises(mae.CheckpointError, match="FULL_STATE_DICT"):
        mae.load(tmp_path / "flat.pt")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"")
    with pytest.raises(mae.CheckpointError, match="dcp_to_torch"):
        mae.load(tmp_path / "dcp")
    (tmp_path / "ds" / "global_step5").mkdir(parents=True)
    (tmp_path / "ds" / "latest").write_text("global_step5")
    torch.save({"module": state}, tmp_path / "ds" / "global_step5" / "mp_rank_00_model_states.pt")
    assert mae.load(tmp_path / "ds").config == encoder.config


@pytest.mark.parametrize("pooled", [False, True])
def test_linear_probe_checkpoint_scores_as_batchnorm_and_linear_layer(tmp_path: Path, encoder, pooled: bool) -> None:
    classifier = mae.Classifier(encoder.config, 5, "patches" if pooled else "class_token").eval()
    probe = nn.Sequential(nn.BatchNorm1d(192, affine=False, eps=1e-6), nn.Linear(192, 5)).eval()
    for value in (probe[0].running_mean, probe[0].running_var):
        value.uniform_(0.5, 2)
    state = {key: value for key, value in classifier.state_dict().items() if not key.startswith("head.")}
    torch.save({"model": state | probe.state_dict(prefix="head.")}, tmp_path / "probe.pth")

    loaded = mae.load(tmp_path / "probe.pth")

    assert isinstance(loaded, mae.Classifier) and loaded.pool == classifier.pool
    images = torch.randn(2, 3, 32, 32)
    classifier.head = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), probe(classifier(images)), rtol=1e-4, atol=1e-4)


def test_mmpretrain_checkpoint_gives_the_encoder_and_names_the_neck(tmp_path: Path, encoder, capsys) -> None:
    theirs = {
        "patch_embed.proj.": "patch_embed.projection.",
        "blocks.": "layers.",
        ".norm1.": ".ln1.",
        ".norm2.": ".ln2.",
        ".mlp.fc1.": ".ffn.layers.0.0.",
        ".mlp.fc2.": ".ffn.layers.1.",
    }
    state = {}
    for key, value in encoder.state_dict().items():
        name = key.replace("norm.", "ln1.") if key.startswith("norm.") else key
        for ours, other_name in theirs.items():
            name = name.replace(ours, other_name)
        state[f"backbone.{name}"] = value
    contents = {"meta": {}, "state_dict": state | {"neck.mask_token": torch.ones(1, 1, 512)}}
    torch.save(contents, tmp_path / "mm.pth")
    loaded = mae.load(tmp_path / "mm.pth")
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert "unwrapped state_dict, backbone.; not used: meta, neck (1 tensor)" in capsys.readouterr().out


# Arguments and options.


def test_arguments_of_a_training_checkpoint_are_used(tmp_path: Path, model, capsys) -> None:
    arguments = Namespace(norm_pix_loss=False, mask_ratio=0.6, input_size=32, output_dir=PosixPath("out"))
    torch.save({"model": model.state_dict(), "epoch": 3, "args": arguments}, tmp_path / "mae.pth")
    loaded = mae.load(tmp_path / "mae.pth")
    assert (loaded.config.norm_pix, loaded.config.mask_ratio) == (False, 0.6)
    said = capsys.readouterr().out
    assert "norm_pix" not in said and "not used: epoch" in said and "pathlib.PosixPath" in said
    export(tmp_path / "mae.pth", "hf-vitmae", tmp_path / "hf")
    assert mae.load(tmp_path / "hf").config == loaded.config

    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert mae.load(tmp_path / "bare.pth").config.norm_pix
    assert "does not say whether it was trained with norm_pix: true is assumed" in capsys.readouterr().out


def test_facebook_export_says_what_weights_cannot(tmp_path: Path, capsys) -> None:
    model, source = own_checkpoint(tmp_path, norm_pix=False, mask_ratio=0.6)
    export(source, "facebook", tmp_path / "mae.pth")
    assert mae.load(tmp_path / "mae.pth").config == model.config
    assert "norm_pix" not in capsys.readouterr().out


def test_demo_takes_settings_that_the_file_cannot_say(tmp_path: Path) -> None:
    model, _ = own_checkpoint(tmp_path)
    torch.save(model.state_dict(), tmp_path / "mae.pth")
    assert open_model(tmp_path / "mae.pth", num_heads=4, decoder_num_heads=4).config.num_heads == 4


def test_export_takes_settings_that_the_file_cannot_say(tmp_path: Path, capsys) -> None:
    model, _ = own_checkpoint(tmp_path, depth=6, patch_size=16, image_size=64)
    torch.save(model.state_dict(), tmp_path / "mae.pth")
    words = [str(tmp_path / "mae.pth"), "--to", "segment-anything", "--image-size", "64", "--out"]
    assert main([*words, str(tmp_path / "sam.pth")]) == 2
    assert "model.num_heads=" in capsys.readouterr().err
    given = ["model.num_heads=4", "model.decoder_num_heads=4", "model.global_blocks=[2,5]", "model.window=2"]
    assert main([*words, str(tmp_path / "sam.pth"), *given]) == 0
    assert mae.load_sam(tmp_path / "sam.pth").config.global_blocks == (2, 5)
    assert main([*words, str(tmp_path / "other.pth"), "model.heads=4"]) == 2
    assert "unknown setting heads=4" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "other.pth"), "num_heads=4"]) == 2
    assert "are written as model.num_heads=4" in capsys.readouterr().err


# Files of something else, and damaged ones.


@pytest.mark.parametrize("name", ["mae.pth", "mae.safetensors", "folder/model.safetensors"])
@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"", "it is empty"),
        (b"not found\n", "text file that begins with"),
        (b"\x89HDF\r\n\x1a\n", "no file of torch.save"),
    ],
)
def test_file_of_something_else_raises_a_sentence_about_it(tmp_path: Path, name: str, contents: bytes, said) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(contents)
    if path.parent != tmp_path:
        (path.parent / "config.json").write_text('{"model_type": "vit"}')
        path = path.parent
    with pytest.raises(mae.CheckpointError, match=said) as refused:
        mae.load(path)
    assert "weights_only" not in str(refused.value) and "\033" not in str(refused.value)


def test_cut_and_renamed_files_are_told_by_their_contents(tmp_path: Path, encoder) -> None:
    state = encoder.state_dict()
    save_file(state, tmp_path / "safetensors.pth")
    torch.save(state, tmp_path / "torch.safetensors")
    torch.save(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("safetensors.pth", "torch.safetensors", "old.ckpt"):
        path = tmp_path / name
        assert torch.equal(mae.load(path).pos_embed, encoder.pos_embed)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(mae.CheckpointError, match=f"{name} cannot be read"):
            mae.load(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_other_classes_stay_closed_and_are_named(tmp_path: Path, encoder, zipped: bool, capsys) -> None:
    held = {"best": np.float64(0.5), "path": PosixPath("a"), "hyper": OmegaConf.create({"a": {"b": 1}})}
    torch.save({"state_dict": encoder.state_dict(), **held}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    assert mae.load(tmp_path / "x.ckpt").config == encoder.config
    said = capsys.readouterr().out
    assert "not used: best, path, hyper" in said
    assert "need code" in said and "pathlib.PosixPath" in said and "omegaconf.dictconfig.DictConfig" in said


def test_pickled_module_and_contents_without_weights_raise_checkpoint_error(tmp_path: Path, encoder) -> None:
    for contents, said in [
        (encoder, r"object of class mae.models.vit.Encoder.*save model.state_dict\(\)"),
        ([torch.ones(2)], "object of class list"),
        ({"model": "vit_base"}, "a dictionary with model"),
    ]:
        torch.save(contents, tmp_path / "x.pth")
        with pytest.raises(mae.CheckpointError, match=said):
            mae.load(tmp_path / "x.pth")


def test_weights_that_are_not_finite_raise_checkpoint_error_naming_them(tmp_path: Path, encoder) -> None:
    state = {key: value.half() for key, value in encoder.state_dict().items()}
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"] * 1e6
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(mae.CheckpointError, match=r"not finite, in 1 of \d+ parameters: blocks.0.mlp.fc1.weight"):
        mae.load(tmp_path / "half.pth")


# Folders of Hugging Face.


@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTModel", "ViTForImageClassification", "sharded", "file alone"])
def test_neighbouring_kinds_of_hugging_face_folders_load(tmp_path: Path, kind: str, capsys) -> None:
    torch.manual_seed(0)
    if kind == "ViTMAEModel":
        theirs = transformers.ViTMAEModel(transformers.ViTMAEConfig(**HF))
    elif kind == "ViTForImageClassification":
        theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=7))
    else:
        theirs = transformers.ViTModel(transformers.ViTConfig(**HF))
    theirs.save_pretrained(tmp_path, max_shard_size="1MB" if kind == "sharded" else "1GB")
    path = tmp_path
    if kind == "file alone":
        path = (tmp_path / "model.safetensors").rename(tmp_path / "alone.bin")
    loaded = mae.load(path)
    assert isinstance(loaded, mae.Classifier) == (kind == "ViTForImageClassification")
    images = photograph(loaded.config)
    reference = transformers.ViTModel(transformers.ViTConfig(**HF), add_pooling_layer=False).eval()
    vit = getattr(theirs, "vit", theirs)
    reference.load_state_dict({key: value for key, value in vit.state_dict().items() if "pooler" not in key})
    with torch.no_grad():
        expected = reference(images).last_hidden_state
        torch.testing.assert_close(loaded.encode(images), expected, rtol=1e-5, atol=1e-5)
    assert ("pooler (2 tensors)" in capsys.readouterr().out) == (kind in ("ViTModel", "sharded", "file alone"))
    if kind == "sharded":
        next(tmp_path.glob("model-00002*")).unlink()
        with pytest.raises(mae.CheckpointError, match=r"lacks model-00002-of-\d+.safetensors"):
            mae.load(tmp_path)


def test_adapter_and_empty_folders_raise_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(mae.CheckpointError, match="merge_and_unload"):
        mae.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(mae.CheckpointError, match=r"holds tf_model\.h5"):
        mae.load(tmp_path)
    save_file({"patch_embed.proj.weight": torch.ones(8, 3, 4, 4)}, tmp_path / "x.safetensors", {"config": "of others"})
    with pytest.raises(mae.CheckpointError, match="no masked-autoencoder weights"):
        mae.load(tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(mae.CheckpointError, match="no settings by name"):
        mae.load(tmp_path)
