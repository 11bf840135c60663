"""An export is the same function as its source, whole, with a card, or it is not there."""

import dataclasses
import json
import stat
import sys
from pathlib import Path

import pytest
import torch

import mae
from mae.errors import ConfigError
from mae.export.__main__ import main
from mae.export.write import export
from mae.formats import timm as timm_format
from mae.formats.available import FORMATS
from mae.formats.format import Comparison
from tests.exports import own_checkpoint
from tests.processes import completed


def test_export_card_names_source_config_checksum_and_comparison(tmp_path: Path) -> None:
    model, source = own_checkpoint(tmp_path)
    out = tmp_path / "out" / "encoder.safetensors"
    card = export(source, "timm", out)
    assert card == tmp_path / "out" / "encoder.safetensors.json"
    said = json.loads(card.read_text())
    assert (said["format"], said["source"], said["step"]) == ("timm", str(source), 500)
    assert said["config"] == model.config.model_dump(mode="json")
    assert said["pixels"] == {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.25, 0.3], "known": True, "bits": 8}
    assert len(said["sha256"]["encoder.safetensors"]) == 64
    assert said["verification"]["compared_with"].startswith("timm ") and said["verification"]["difference"] <= 1e-5
    assert {path.name for path in out.parent.iterdir()} == {out.name, card.name}
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(card.stat().st_mode)


def test_export_that_computes_another_function_raises_and_leaves_no_file(tmp_path: Path, monkeypatch) -> None:
    _, source = own_checkpoint(tmp_path)
    arguments = timm_format.timm_arguments
    monkeypatch.setattr(timm_format, "timm_arguments", lambda config: arguments(config) | {"num_heads": 8})
    with pytest.raises(mae.CheckpointError, match="features of all tokens differ"):
        export(source, "timm", tmp_path / "out" / "encoder.safetensors")
    assert not list((tmp_path / "out").iterdir())


def test_export_error_names_missing_and_left_over_keys(tmp_path: Path, monkeypatch) -> None:
    _, source = own_checkpoint(tmp_path)
    arguments = timm_format.timm_arguments
    monkeypatch.setattr(
        timm_format, "timm_arguments", lambda config: arguments(config) | {"depth": 1, "num_classes": 2}
    )
    with pytest.raises(mae.CheckpointError, match=r"missing: head.bias, head.weight; left over: blocks.1"):
        export(source, "timm", tmp_path / "encoder.safetensors")


def test_nan_in_the_comparison_raises_checkpoint_error(tmp_path: Path, monkeypatch) -> None:
    _, source = own_checkpoint(tmp_path)
    nothing, equal = Comparison(torch.tensor([torch.nan]), torch.ones(1)), Comparison(torch.ones(1), torch.ones(1))
    fmt = dataclasses.replace(FORMATS["timm"], compare=lambda *_: [equal, nothing])
    monkeypatch.setitem(FORMATS, "timm", fmt)
    with pytest.raises(mae.CheckpointError, match="differ by nan"):
        export(source, "timm", tmp_path / "encoder.safetensors")


def test_export_without_the_peer_library_is_marked_unverified(tmp_path: Path, monkeypatch, capsys) -> None:
    _, source = own_checkpoint(tmp_path)
    monkeypatch.setattr("mae.export.verify.find_spec", lambda name: None)
    card = json.loads(export(source, "hf-vit", tmp_path / "vit").read_text())
    assert card["verification"] == {
        "compared_with": None,
        "why": "transformers is not installed",
        "checked": "names and shapes",
    }
    assert "only names and shapes were checked" in capsys.readouterr().out


def test_export_to_a_place_that_takes_no_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*/file/x.safetensors cannot be written \(Not a directory\)"):
        export(own_checkpoint(tmp_path)[1], "timm", tmp_path / "file" / "x.safetensors")


def test_overwrite_replaces_an_export_and_never_other_files(tmp_path: Path) -> None:
    _, source = own_checkpoint(tmp_path)
    for to, out in (("timm", tmp_path / "encoder.safetensors"), ("timm-folder", tmp_path / "folder")):
        export(source, to, out)
        before = out.stat().st_mtime_ns
        with pytest.raises(mae.ConfigError, match="--overwrite"):
            export(source, to, out)
        assert out.stat().st_mtime_ns == before
        export(source, to, out, overwrite=True)
        assert out.stat().st_mtime_ns != before
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").touch()
    for to, out in (("timm-folder", precious), ("timm", precious.rename(tmp_path / "precious.safetensors"))):
        out.mkdir(exist_ok=True)
        with pytest.raises(mae.ConfigError, match="no export of this format"):
            export(source, to, out, overwrite=True)
    assert (tmp_path / "precious.safetensors" / "data").exists()


@pytest.mark.parametrize(
    ("to", "fields", "reason"),
    [
        ("facebook", {"class_tokens": 0}, "only models with one class token"),
        ("facebook", {"image_size": (32, 48)}, "only models with square images"),
        ("facebook", {"in_channels": 4}, "only models with three channels"),
        (
            "hf-vitmae",
            {"class_tokens": 0, "image_size": (32, 48)},
            "only models with one class token and square images",
        ),
        ("hf-vit", {"class_tokens": 0}, "only models with one class token"),
        ("detectron2", {"image_size": (32, 48)}, "only models with square images"),
    ],
)
def test_export_of_an_unsupported_architecture_raises_config_error(tmp_path: Path, to, fields, reason) -> None:
    _, source = own_checkpoint(tmp_path, **fields)
    with pytest.raises(mae.ConfigError, match=reason):
        export(source, to, tmp_path / "out" / f"export{FORMATS[to].suffix}")
    assert not list((tmp_path / "out").iterdir())


def test_export_of_an_encoder_as_autoencoder_raises_config_error(tmp_path: Path) -> None:
    _, source = own_checkpoint(tmp_path)
    export(source, "hf-vit", tmp_path / "vit")
    with pytest.raises(mae.ConfigError, match="holds no decoder"):
        export(tmp_path / "vit", "hf-vitmae", tmp_path / "vitmae")


def test_export_command_exports_reports_errors_and_lists_formats(tmp_path: Path, capsys) -> None:
    _, source = own_checkpoint(tmp_path)
    to = [str(source), "--to", "timm", "--out"]
    command = [sys.executable, "-m", "mae.export", *to, str(tmp_path / "encoder.safetensors")]
    done = completed(command)
    assert done.returncode == 0, done.stderr
    assert "the same in timm" in done.stdout and (tmp_path / "encoder.safetensors.json").is_file()
    assert main([*to, str(tmp_path / "encoder.pth")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in FORMATS)
