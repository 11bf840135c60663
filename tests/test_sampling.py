"""data.sampling: a table of losses by eval.py, and training that chooses by it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from pydantic import ValidationError
from skimage.measure import shannon_entropy

import mae
from data.config import DataConfig
from data.datamodule import ShardDataModule
from data.errors import DataError
from data.images.entropy import colour_entropy
from data.index.index import open_shards
from data.index.sample_table import ROW, new_rows, read_rows, write_rows
from data.order.choice import ONE
from data.pack import builtin
from mae.distributed.launch import Topology
from mae.errors import CheckpointError, ConfigError
from mae.models.masking import draw_masking
from mae.models.noise import uniform_noise
from mae.models.pixels import Pixels
from mae.run.checkpoint_files import refuse_other_run
from tasks.evaluate import evaluate
from tasks.plan import plan_only
from tasks.task import read_settings
from tasks.train import train
from tests.conftest import ROOT
from tests.processes import SMALL, assert_same_run, command, run
from tests.test_eval import ALONE, pack_coloured, settings
from tests.test_ranks import forget

TINY = [*SMALL, "data.workers=0", "global_batch=2", "epochs=2", "val_every=null", "plan.gpu=cpu"]
SHAPE = {"image_size": (32, 32), "channels": 3, "seed": 0, "global_batch": 2, "micro_batch": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with weights of an autoencoder (mae.pth) and of its encoder, and shards of 11 and 2 images."""
    folder = tmp_path_factory.mktemp("losses")
    pack_coloured(folder, {"train": [0, 1, 2, 0, 1, 2, 2, 1, 1, 0, 0], "val": [0, 1]})
    torch.manual_seed(0)
    fields = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2}
    decoder = {"decoder_width": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    model = mae.MaskedAutoencoder(mae.MAEConfig(**fields, **decoder))
    torch.save({"model": model.state_dict()}, folder / "mae.pth")
    encoder = {
        name: value for name, value in model.state_dict().items() if "decoder" not in name and "mask" not in name
    }
    torch.save({"model": encoder}, folder / "encoder.pth")
    return folder


def write(place: Path, out: Path, *words: str, weights: str = "mae.pth", topology: Topology = ALONE) -> Path:
    heads = [
        "model.num_heads=2",
        *(["model.decoder_num_heads=2", "model.norm_pix=true"] if weights == "mae.pth" else []),
    ]
    shards = [] if any(word.startswith("data.path=") for word in words) else [f"data.path={place}/shards"]
    shared = ["probe=losses", "data.workers=0", f"out={out}", *heads, *shards]
    evaluate(settings(place / weights, *shared, *words), topology)
    return out / "losses.npy"


@pytest.fixture(scope="module")
def table(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(place, tmp_path_factory.mktemp("table"))


def random_losses(built_in: Path, file: Path) -> tuple[list[str], np.ndarray]:
    """Writes a table with a loss for each built-in digit. Returns the settings that choose by it, and the losses."""
    builtin.ensure("digits", built_in)
    index = open_shards(str(built_in / "built_in" / "digits"), "train")
    rows = new_rows(index, np.arange(len(index)))
    rows["loss"], rows["size"] = np.random.default_rng(0).random(len(rows)), 32
    write_rows(file, rows)
    return [f"data.sampling={file}", "data.rule.probability=loss"], rows["loss"]


def module(place: Path, table: Path | str, **changes: object) -> ShardDataModule:
    data = {"path": str(place / "shards"), "sampling": str(table), "workers": 0, **changes}
    return ShardDataModule(DataConfig.model_validate(data), **SHAPE)


def test_losses_are_those_of_the_model_under_masks_of_the_sample(place: Path, table: Path) -> None:
    rows = np.load(table)
    data = ShardDataModule(DataConfig(path=str(place / "shards"), workers=0), **SHAPE)
    crops = data.crops(data.train_index, np.arange(11))
    model = mae.load(place / "mae.pth", num_heads=2, decoder_num_heads=2, norm_pix=True)
    images = Pixels(data.config.mean, data.config.std).normalise(crops)
    mask = draw_masking(uniform_noise(0, -1, torch.arange(11), 16), model.config).mask
    with torch.inference_mode():
        losses = [float(model(images[n : n + 1], mask=mask[n : n + 1]).loss) for n in range(11)]
    assert rows.dtype == ROW and rows["sample"].tolist() == list(range(11)) and len(set(losses)) > 8
    np.testing.assert_allclose(rows["loss"], losses, rtol=0.02)  # bf16 where the machine has it
    np.testing.assert_allclose(rows["entropy"], [colour_entropy(crop.numpy()) for crop in crops], rtol=1e-6)
    assert (rows["size"] == 32).all() and (rows["group"] == -1).all()
    about = json.loads((table.parent / "losses.json").read_text())
    assert (
        about["images"] == 11
        and about["unreadable"] == []
        and about["mean_loss"] == pytest.approx(np.mean(losses), rel=0.02)
    )


def test_colour_entropy_is_shannons_of_three_bits_a_channel() -> None:
    noise = np.random.default_rng(0)
    for channels, dtype in ((3, np.uint8), (1, np.uint8), (6, np.uint8), (3, np.uint16)):
        image = (noise.random((channels, 20, 30)) ** 2 * np.iinfo(dtype).max).astype(dtype)
        code = sum((channel >> (8 * image.itemsize - 3)).astype(np.int64) << (3 * n) for n, channel in enumerate(image))
        assert colour_entropy(image) == pytest.approx(shannon_entropy(code), abs=1e-9)
    assert colour_entropy(np.full((3, 8, 8), 77, np.uint8)) == 0
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 32, dtype=np.uint8)] * 3)).reshape(3, 8, 64)
    assert colour_entropy(every) == pytest.approx(9)


def test_ranks_write_parts_that_are_continued_and_joined(
    place: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero, one = (Topology(rank=rank, ranks=2, devices=1, nodes=1) for rank in (0, 1))
    with pytest.raises(CheckpointError, match=r"part-00001\.npy was not written"):
        write(place, tmp_path, "probe.part_images=4", topology=zero)
    (folder,) = tmp_path.glob("losses-*")
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(written) == 2
    monkeypatch.setenv("RANK", "1")
    write(place, tmp_path, "probe.part_images=4", topology=one)
    assert {file: file.stat().st_mtime_ns for file in written} == written
    monkeypatch.delenv("RANK")
    joined = write(place, tmp_path, "probe.part_images=4", topology=zero)
    found, whole = np.load(joined), np.load(table)
    assert found["loss"] == pytest.approx(whole["loss"], rel=0.02) and not folder.exists()
    for name in ("shard", "sample", "size", "entropy"):
        np.testing.assert_array_equal(found[name], whole[name])


def test_finished_table_is_left_and_another_keeps_the_groups(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write(place, tmp_path)
    rows = np.load(table)
    rows["group"], rows["loss"] = np.arange(11), 0.5
    write_rows(table, rows)
    write(place, tmp_path)
    assert (np.load(table)["loss"] == 0.5).all() and "is there already, of these weights" in capsys.readouterr().out
    (tmp_path / "losses.json").unlink()
    write(place, tmp_path)
    again = np.load(table)
    assert (again["loss"] != 0.5).all() and again["group"].tolist() == list(range(11))


def test_model_without_decoder_and_folder_without_shards_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="probe=losses needs a decoder, and the checkpoint holds an encoder only"):
        write(place, tmp_path, weights="encoder.pth")
    with pytest.raises(
        ConfigError, match=r"writes a table for training from shards, and data\.path=.*/train/a has none"
    ):
        write(place, tmp_path, f"data.path={place}/images/train/a")
    assert not list(tmp_path.iterdir())


def test_image_that_cannot_be_read_has_no_loss_and_is_never_chosen(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = shutil.copytree(place / "shards", tmp_path / "shards")
    index = ShardDataModule(DataConfig(path=str(shards), workers=0), **SHAPE).train_index
    shard, offset, size = index.locate(4)
    with open(index.shards[shard], "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    for path in shards.glob("*/*.idx*"):
        path.unlink()
    table = write(place, tmp_path, f"data.path={shards}")
    rows = np.load(table)
    assert np.isnan(rows["loss"]).tolist() == [number == 4 for number in range(11)] and rows["size"][4] == 0
    assert f"1 of 11 images of train: {index.key(4)}" in capsys.readouterr().out
    data = ShardDataModule(
        DataConfig.model_validate({"path": str(shards), "sampling": str(table), "rule": {"min_size": 1}}), **SHAPE
    )
    assert sorted(data.order.samples(0, 0, 10).tolist()) == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_rules_choose_what_meets_all_of_them(place: Path, table: Path, tmp_path: Path) -> None:
    rows = np.load(table)
    rows["size"], rows["entropy"] = np.arange(11), np.arange(11)[::-1] / 2
    rows["loss"] = [np.nan, 0.5, 0, 2, 0.25, 0.75, 0.1, 0.2, 0.3, 0.4, 1.5]
    rows["group"] = [0, 0, 2, 3, 4, 5, 6, 10, 8, 9, 10]
    write_rows(tmp_path / "made.npy", rows)

    def probabilities(**rule: object) -> list[float]:
        choice = module(place, tmp_path / "made.npy", rule=rule).order.choice
        return (choice.probabilities(0) / ONE).tolist()

    assert probabilities(min_size=3) == [0] * 3 + [1] * 8
    assert probabilities(min_entropy=2.5) == [1] * 6 + [0] * 5
    assert probabilities(min_size=3, min_entropy=2.5) == [0] * 3 + [1] * 3 + [0] * 5
    assert probabilities(unique=True) == [1, 0, *[1] * 5, 0, 1, 1, 1]
    losses = [0, 0.5, 0, 1, 0.25, 0.75, 0.1, 0.2, 0.3, 0.4, 1]
    assert probabilities(probability="loss") == pytest.approx(losses, abs=1e-7)
    assert probabilities(probability="loss", min_size=3)[:4] == [0, 0, 0, 1]


def test_epoch_of_the_data_module_has_the_rounded_sum_and_names_its_rule(place: Path, table: Path) -> None:
    data = module(place, table, rule={"probability": "loss"})
    assert (
        len(data.order) == round(np.load(table)["loss"].clip(0, 1).sum())
        and data.steps_per_epoch == len(data.order) // 2
    )
    digest = data.order.choice.digest
    assert data.identity["sampling"] == {"probability": "loss", "images": len(data.order), "probabilities": digest}
    assert (
        data.identity["samples"] == 11
        and "sampling" not in ShardDataModule(DataConfig(path=str(place / "shards")), **SHAPE).identity
    )


def test_table_is_matched_by_shard_and_refused_for_others(place: Path, table: Path, tmp_path: Path) -> None:
    pack_coloured(tmp_path, {"train": [2, 2, 1, 0]})
    rows, other = np.load(table), np.load(write(place, tmp_path, f"data.path={tmp_path}/shards"))
    write_rows(tmp_path / "both.npy", np.concatenate([other, rows]))
    rule = {"probability": "loss"}
    alone, within = (module(place, file, rule=rule).order.choice for file in (table, tmp_path / "both.npy"))
    assert alone.digest == within.digest
    with pytest.raises(
        DataError, match=r"losses.npy does not match the shards: it has no rows for .*train-000000.tar of 11"
    ):
        module(place, tmp_path / "losses.npy", rule=rule)
    write_rows(tmp_path / "shuffled.npy", rows[::-1])
    with pytest.raises(DataError, match="does not match the shards"):
        module(place, tmp_path / "shuffled.npy", rule=rule)
    with pytest.raises(
        DataError, match=r"rule.unique=true, but .*losses.npy does not know the near-duplicates of all images"
    ):
        module(place, table, rule={"unique": True})
    for name, field, value in (
        ("probability", "loss", np.nan),
        ("probability", "loss", np.inf),
        ("min_entropy", "entropy", np.nan),
    ):
        lacking = rows.copy()
        lacking[field][3] = value
        write_rows(tmp_path / "lacking.npy", lacking)
        with pytest.raises(
            DataError, match=rf"rule\.{name}=.*lacking\.npy does not know the .* of all images: run `python eval"
        ):
            module(place, tmp_path / "lacking.npy", rule={name: "loss" if name == "probability" else 1})
    with pytest.raises(DataError, match=r"gone\.npy cannot be read: No such file"):
        module(place, "gone.npy", rule=rule)
    for contents in (b"", b"PK", b"\x93NUMPY"):
        (tmp_path / "torn.npy").write_bytes(contents)
        with pytest.raises(DataError, match=r"torn.npy is no table of samples"):
            module(place, tmp_path / "torn.npy", rule=rule)
    np.save(tmp_path / "plain.npy", np.zeros(11))
    with pytest.raises(DataError, match=r"plain.npy is no table of samples: its columns are others"):
        read_rows(tmp_path / "plain.npy")
    with pytest.raises(DataError, match=r"has 1 training samples by data.sampling=.*fewer than global_batch=2"):
        rows["size"][3] = 99
        write_rows(tmp_path / "few.npy", rows)
        module(place, tmp_path / "few.npy", rule={"min_size": 99})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"sampling": "t.npy"}, "sampling=t.npy has no rule, and would choose every image"),
        ({"rule": {"min_size": 320}}, "rule.min_size=320 has no table to choose by"),
        (
            {"sampling": "t.npy", "rule": {"unique": True}, "mode": "stream", "samples": 9, "path": "pipe:x"},
            "mode=stream",
        ),
        (
            {"sampling": "t.npy", "rule": {"unique": True}, "samples": 9},
            "nor with samples, which follows from the table",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DataConfig.model_validate(given)


def test_data_sets_of_a_mixture_choose_each_by_its_rows_of_one_table(place: Path, tmp_path: Path) -> None:
    pack_coloured(tmp_path, {"train": [2, 2, 1, 0, 1, 1]})
    paths = [f"{folder}/shards/train" for folder in (place, tmp_path)]
    index = ShardDataModule(DataConfig.model_validate({"path": paths}), **SHAPE).train_index
    rows = new_rows(index, np.arange(17))
    rows["size"] = [1, 9] * 8 + [9]
    write_rows(tmp_path / "mixed.npy", rows)
    rule, weights = {"min_size": 5}, [0.5, 0.5]
    data = module(place, tmp_path / "mixed.npy", path=paths, weights=weights, rule=rule)
    samples = np.concatenate([data.order.samples(epoch, 0, 8) for epoch in range(9)])
    assert len(data.order) == 9 and set(samples.tolist()) == {*range(1, 17, 2), 16}
    assert ((samples.reshape(-1, 2) < 11).sum(1) == 1).all()
    assert len(data.identity["sampling"]["probabilities"].split()) == 2


def test_resume_with_another_table_is_refused_and_with_a_moved_or_extended_one_is_not(
    place: Path, table: Path, tmp_path: Path
) -> None:
    rows, rule = np.load(table), {"probability": "loss"}
    begun = {"order": module(place, table, rule=rule).identity}
    rows["group"] = np.arange(11)
    write_rows(tmp_path / "extended.npy", rows)
    refuse_other_run(begun, {"order": module(place, tmp_path / "extended.npy", rule=rule).identity}, Path("x.ckpt"))
    rows["loss"][0] /= 4
    write_rows(tmp_path / "other.npy", rows)
    with pytest.raises(
        ConfigError, match=r"different run: .*order\.sampling\.probabilities \(\w+ in the checkpoint, \w+ now"
    ):
        refuse_other_run(begun, {"order": module(place, tmp_path / "other.npy", rule=rule).identity}, Path("x.ckpt"))


def test_plan_and_start_say_how_many_images_an_epoch_has(
    place: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.load(table)
    rows["loss"] = 0.5
    write_rows(tmp_path / "half.npy", rows)
    own = [f"runs={tmp_path}", "name=half", f"data.path={place}/shards", "data.flip=false", *TINY]
    words = [*own, f"data.sampling={tmp_path / 'half.npy'}", "data.rule.probability=loss"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = read_settings(compose("train", overrides=words))
    plan_only(config)
    assert "6 of 11 images in each epoch (probability=loss)" in " ".join(capsys.readouterr().out.split())
    train(config, ALONE)
    assert "6 of 11 images in each epoch (probability=loss)" in capsys.readouterr().out.replace("\n", "")
    derived = json.loads((tmp_path / "half" / "derived.json").read_text())
    assert derived["samples"] == 6 and derived["steps_per_pass"] == 3 and derived["total_steps"] == 6


@pytest.mark.slow
def test_two_ranks_write_the_table_of_one(place: Path, table: Path, tmp_path: Path) -> None:
    words = ["probe=losses", f"checkpoint={place / 'mae.pth'}", f"data.path={place / 'shards'}", f"out={tmp_path}"]
    words += ["model.num_heads=2", "model.decoder_num_heads=2", "model.norm_pix=true", "probe.part_images=3"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([sys.executable, *launcher, "eval.py", *words])
    found, whole = np.load(tmp_path / "losses.npy"), np.load(table)
    np.testing.assert_allclose(found["loss"], whole["loss"], rtol=0.02)
    assert all(np.array_equal(found[name], whole[name]) for name in ("shard", "sample", "size", "entropy", "group"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.json", "losses.npy"]


@pytest.mark.slow
def test_run_that_chooses_resumes_bit_for_bit_within_an_epoch(tmp_path: Path, built_in: Path) -> None:
    """About 11 steps an epoch."""
    sampling, _ = random_losses(built_in, tmp_path / "losses.npy")
    checkpoints = ("max_steps=40", "checkpoint.every_steps=15", "checkpoint.keep=9", "data.workers=1")
    words = command(tmp_path, built_in, *sampling, *checkpoints, "name=run")
    run(words)
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    forget(tmp_path / "run", after=15)
    assert "step-00000015.ckpt" in run(words).replace("\n", "")
    assert_same_run(tmp_path / "run", whole)
