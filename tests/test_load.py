"""`mae.load` reads what others wrote, and says what is wrong with the rest."""

import io
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mae
from mae.demo.model import open_model
from mae.export.write import export
from mae.formats.load_segmenter import initialise_segmenter
from mae.sam.segmenter import Segmenter
from tests.exports import own_checkpoint

FIELDS = {"image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "num_heads": 3, "decoder_depth": 1}


@pytest.fixture
def model() -> mae.MaskedAutoencoder:
    torch.manual_seed(0)
    return mae.MaskedAutoencoder(mae.MAEConfig(**FIELDS)).eval()


def same_function(one: mae.MaskedAutoencoder, other) -> bool:
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    return torch.equal(one(images, noise).pred, other(images, noise).pred)


@pytest.mark.parametrize("wrap", ["published", "bare", "training", "ddp", "torch 1.5"])
def test_facebook_file_of_each_kind_loads_as_the_same_model(tmp_path: Path, model, wrap: str) -> None:
    state = model.state_dict()
    contents = {
        "published": {"model": state},
        "bare": state,
        "training": {"model": state, "optimizer": {}, "epoch": 3, "scaler": {}, "args": Namespace(lr=1.0)},
        "ddp": {"model": {f"module.{key}": value for key, value in state.items()}},
        "torch 1.5": state,
    }[wrap]
    torch.save(contents, tmp_path / "mae.pth", _use_new_zipfile_serialization=wrap != "torch 1.5")
    loaded = mae.load(tmp_path / "mae.pth")
    assert loaded.config == model.config
    assert same_function(model, loaded)
    assert not loaded.pos_embed.requires_grad and loaded.blocks[0].attn.qkv.weight.requires_grad


def test_loaded_model_keeps_its_weights_when_its_file_is_overwritten(tmp_path: Path, model) -> None:
    torch.save(model.state_dict(), tmp_path / "mae.pth")
    save_file(mae.Encoder(model.config).state_dict(), tmp_path / "encoder.safetensors")
    for file in (tmp_path / "mae.pth", tmp_path / "encoder.safetensors"):
        loaded = mae.load(file, num_heads=3)
        before = {key: value.clone() for key, value in loaded.state_dict().items()}

        file.write_bytes(bytes(file.stat().st_size))

        assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


def test_bare_state_dict_loads_with_the_settings_given_to_load(tmp_path: Path) -> None:
    config = mae.MAEConfig(
        **FIELDS | {"num_heads": 4, "width": 64, "decoder_width": 32, "decoder_num_heads": 4}, norm_pix=False
    )
    model = mae.MaskedAutoencoder(config).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    with pytest.raises(mae.CheckpointError, match="give num_heads="):
        mae.load(tmp_path / "mae.pth")
    with pytest.raises(mae.CheckpointError, match="give decoder_num_heads="):
        mae.load(tmp_path / "mae.pth", num_heads=4)
    given = {"num_heads": 4, "decoder_num_heads": 4, "norm_pix": False, "mask_ratio": 0.6}
    loaded = mae.load(tmp_path / "mae.pth", **given)
    assert loaded.config == config.model_copy(update={"mask_ratio": 0.6})
    with pytest.raises(mae.ConfigError, match="cannot be split over 7 heads"):
        mae.load(tmp_path / "mae.pth", num_heads=7, decoder_num_heads=4)


def test_bare_state_dict_loads_with_a_given_rectangular_image_size(tmp_path: Path) -> None:
    model = mae.MaskedAutoencoder(mae.MAEConfig(**FIELDS | {"image_size": (16, 64)})).eval()
    torch.save(model.state_dict(), tmp_path / "mae.pth")
    assert mae.load(tmp_path / "mae.pth").config == model.config  # the table fits no other grid of 16 patches
    assert mae.load(tmp_path / "mae.pth", image_size=(16, 64)).config == model.config
    learned = mae.MaskedAutoencoder(model.config.model_copy(update={"positions": "learned"}))
    torch.save(learned.state_dict(), tmp_path / "learned.pth")
    assert mae.load(tmp_path / "learned.pth", image_size=(16, 64)).config == learned.config


def test_learned_positions_are_recognised_from_the_weights(tmp_path: Path) -> None:
    model = mae.MaskedAutoencoder(mae.MAEConfig(**FIELDS, positions="learned")).eval()
    torch.save(model.state_dict(), tmp_path / "mae.pth")
    loaded = mae.load(tmp_path / "mae.pth")
    assert loaded.config.positions == "learned" and loaded.pos_embed.requires_grad


def test_file_without_decoder_loads_as_an_encoder(tmp_path: Path, model) -> None:
    encoder = {key: value for key, value in model.state_dict().items() if not key.startswith(("decoder", "mask"))}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    loaded = mae.load(tmp_path / "encoder.pth")
    assert type(loaded) is mae.Encoder
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.encode(images), model.encode(images))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda state: state.pop("blocks.1.attn.proj.bias"), "blocks.1.attn.proj.bias is missing"),
        (lambda state: state.update(head=torch.zeros(3)), "head is left over"),
        (lambda state: state.update({"norm.weight": torch.zeros(3)}), r"norm.weight has shape \(3,\)"),
        (lambda state: state.pop("pos_embed"), "no masked-autoencoder weights"),
    ],
)
def test_weights_that_do_not_fit_raise_checkpoint_error_naming_them(tmp_path: Path, model, spoil, said) -> None:
    state = dict(model.state_dict())
    spoil(state)
    torch.save(state, tmp_path / "mae.pth")
    with pytest.raises(mae.CheckpointError, match=said):
        mae.load(tmp_path / "mae.pth")


class Evil:
    def __reduce__(self):
        return (print, ("code from a checkpoint",))


def test_damaged_missing_or_code_carrying_file_raises_checkpoint_error(tmp_path: Path, model, capsys) -> None:
    with pytest.raises(mae.CheckpointError, match="does not exist"):
        mae.load(tmp_path / "absent.pth")
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    with pytest.raises(mae.CheckpointError, match="cannot be read"):
        mae.load(tmp_path / "torn.pth")
    for name, contents in {"text": b"text", "empty": b"", "short": b"\x8a\x01"}.items():
        (tmp_path / f"{name}.pth").write_bytes(contents)
        with pytest.raises(mae.CheckpointError, match=f"{name}.pth cannot be read as a checkpoint"):
            mae.load(tmp_path / f"{name}.pth")
    for contents in (torch.zeros(3), {0: torch.zeros(3)}, {"model": [torch.zeros(3)]}):
        torch.save(contents, tmp_path / "nameless.pth")
        with pytest.raises(mae.CheckpointError, match="holds no state dict"):
            mae.load(tmp_path / "nameless.pth")
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(mae.CheckpointError, match=r"holds no state dict.*builtins.print"):
        mae.load(tmp_path / "evil.pth")
    assert "code from a checkpoint" not in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(mae.CheckpointError, match="neither a run"):
        mae.load(tmp_path / "empty")


@pytest.fixture
def opened_ckpts(monkeypatch) -> list[str]:
    """One entry each time that Python opens a checkpoint, after "mapped" or "read whole" if torch.load does."""
    opened: list[str] = []

    def count_open(file, *arguments, **named):
        if str(file).endswith(".ckpt"):
            opened.append(Path(file).name)
        return open_file(file, *arguments, **named)

    def count_load(file, *arguments, **named):
        if str(file).endswith(".ckpt"):
            opened.append("mapped" if named.get("mmap") else "read whole")
        return load_file(file, *arguments, **named)

    open_file, load_file = io.open, torch.load
    monkeypatch.setattr("builtins.open", count_open)
    monkeypatch.setattr("io.open", count_open)
    monkeypatch.setattr("torch.load", count_load)
    return opened


SAM_FIELDS = {"image_size": 128, "window": 4, "out_channels": 32}


def write_run(folder: Path, task: str) -> tuple[Path, Segmenter]:
    """A run folder with one checkpoint, and a SAM of the same size, whose weights it holds if the task is segment."""
    (folder / "checkpoints").mkdir(parents=True)
    model, file = own_checkpoint(folder / "checkpoints", patch_size=16, image_size=64, depth=4)
    segmenter = Segmenter(mae.to_sam(model, **SAM_FIELDS))
    if task == "segment":
        contents = torch.load(file, weights_only=True)
        contents["mae"]["recipe"]["task"] = {"name": "segment", **SAM_FIELDS}
        torch.save(contents | {"state_dict": segmenter.state_dict(prefix="model.")}, file)
    return folder, segmenter


@pytest.mark.parametrize(
    ("task", "use"),
    [
        ("pretrain", lambda run, sam: mae.load(run)),
        ("pretrain", lambda run, sam: open_model(run)),
        ("pretrain", lambda run, sam: initialise_segmenter(sam, run)),
        ("pretrain", lambda run, sam: export(run, "timm", run / "encoder.safetensors")),
        ("pretrain", lambda run, sam: export(run, "hf-vitmae", run / "vitmae")),
        ("segment", lambda run, sam: mae.load_segmenter(run)),
        ("segment", lambda run, sam: initialise_segmenter(sam, run)),
        ("segment", lambda run, sam: export(run, "segment-anything", run / "sam.pth")),
    ],
    ids=["load", "demo", "start SAM", "timm", "hf-vitmae", "load_segmenter", "start SAM from SAM", "segment-anything"],
)
def test_run_checkpoint_is_read_once_for_checksums_and_mapped_once(
    tmp_path: Path, task: str, use: Callable[[Path, Segmenter], Any], opened_ckpts: list[str]
) -> None:
    run, segmenter = write_run(tmp_path / "run", task)
    opened_ckpts.clear()

    use(run, segmenter)

    # Its checksums, its first bytes, which tell torch.save from safetensors, and the map.
    assert opened_ckpts == ["step-00000500.ckpt", "step-00000500.ckpt", "mapped", "step-00000500.ckpt"]


def test_loading_a_whole_sam_raises_checkpoint_error_naming_load_segmenter(tmp_path: Path) -> None:
    recipe = {"task": {"name": "segment"}, "model": {}}
    torch.save({"mae": {"step": 1, "recipe": recipe}, "state_dict": {}}, tmp_path / "step-00000001.ckpt")
    with pytest.raises(mae.CheckpointError, match=r"mae\.load_segmenter"):
        mae.load(tmp_path / "step-00000001.ckpt")
