"""eval.py measures a run beside its untrained twin, whatever the number of ranks and whatever is kept on disk."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import mae
from data.datamodule import DataConfig, ShardDataModule
from data.index.index import ShardIndex, open_shards
from data.pack.__main__ import main as pack
from mae.distributed.launch import Topology
from mae.errors import CheckpointError, ConfigError
from mae.formats.opened import Opened, open_weights
from mae.models.mae import MaskedAutoencoder
from mae.models.pixels import Pixels
from mae.probes.features import Features, describe, held_out_noise, thumbnails
from mae.probes.models_under_probe import ModelsUnderProbe, Want, refuse_not_finite
from mae.run.folder import clear_run_folder, record_start
from tasks.config import evaluation_data
from tasks.evaluate import EvalConfig, evaluate
from tasks.evaluation_folder import choose_folder, read_data_settings, same_run
from tasks.train import train
from tests.conftest import ROOT
from tests.processes import completed, run
from tests.test_experiments import REDUCED, compose
from tests.test_sam_conversion import whole_sam

ALONE = Topology(rank=0, ranks=1, devices=1, nodes=1)
SMALL = ("data.workers=0", "batch_size=64")
SUITE = (
    "probe=suite",
    "probe.knn.train_images=300",
    "probe.linear.train_images=200",
    "probe.attentive.train_images=200",
    "probe.attentive.test_images=100",
    "probe.attentive.steps=20",
    "probe.reconstruct.test_images=100",
    "probe.reconstruct.ratios=[0.5]",
    "probe.reconstruct.floor_images=20",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    """Four steps of a narrow model."""
    runs = tmp_path_factory.mktemp("runs")
    config = compose(
        f"runs={runs}", f"data.root={built_in}", *REDUCED, "model.image_size=32", "name=run", "max_steps=4"
    )
    train(config, ALONE)
    return config.run


def settings(checkpoint: Path, *overrides: str) -> EvalConfig:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        raw = hydra.compose("eval", overrides=[f"checkpoint={checkpoint}", *SMALL, *overrides])
    return EvalConfig.model_validate(OmegaConf.to_container(raw, resolve=True))


def numbers(out: Path) -> dict[str, Any]:
    return json.loads((out / "suite.json").read_text())["probes"]


@pytest.fixture(scope="module")
def suite(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a whole suite and returns its results."""
    out = tmp_path_factory.mktemp("suite")
    evaluate(settings(trained, *SUITE, f"out={out}"), ALONE)
    return out


def test_pooling_averages_the_patches_or_takes_the_class_token() -> None:
    latent = torch.arange(12, dtype=torch.float32).view(1, 4, 3)
    assert describe(latent, True, "patches").tolist() == [[6, 7, 8]]
    assert describe(latent, False, "patches").tolist() == [[4.5, 5.5, 6.5]]
    assert describe(latent, 1, "class_token").tolist() == [[0, 1, 2]]
    assert describe(latent, True, "tokens").tolist() == [[[3, 4, 5], [6, 7, 8], [9, 10, 11]]]


def test_eval_and_summary_commands_print_the_scores_of_a_run(trained: Path) -> None:
    command = [sys.executable, "eval.py", f"checkpoint={trained}", *SMALL, *SUITE]
    done = completed(command)
    assert done.returncode == 0, done.stderr
    for probe in ("knn", "linear"):
        result = json.loads((trained / "eval" / f"{probe}.json").read_text())
        assert result["test_images"] == 359
        # Four steps of a narrow model, or none: both far above chance (1/10), and not the same encoder.
        assert min(result["trained"]["top1"], result["untrained"]["top1"]) > 0.2
        assert f"{result['trained']['top1']:.2%}" in done.stdout
    done = completed([sys.executable, "-m", "mae.report.summary", str(trained)], COLUMNS="200")
    assert done.returncode == 0 and "knn accuracy" in done.stdout and "step-00000004.ckpt" in done.stdout


def test_suite_writes_its_probes_to_one_file_with_their_figures(suite: Path, trained: Path) -> None:
    found = numbers(suite)
    assert list(found) == ["knn", "linear", "attentive", "reconstruct"]
    assert found["knn"]["classes"] == [str(digit) for digit in range(10)]
    assert found["knn"]["train_images"] == 300 and found["attentive"]["test_images"] == 100
    for probe in ("knn", "linear", "attentive"):
        assert found[probe].items() <= json.loads((suite / f"{probe}.json").read_text()).items()
        assert 0 <= found[probe]["untrained"]["top1"] <= 1
    assert list(found["reconstruct"]["trained"]["loss"]) == ["0.5", "0.75"]  # that of the model is added
    assert set(found["reconstruct"]["floors"]["0.5"]) == {"predict 0", "scaled interpolation"}
    for picture in (
        "suite.png",
        "knn.png",
        "reconstruct.png",
        "reconstruct/ratio-0.5.png",
        "reconstruct/ratio-0.75.png",
    ):
        with Image.open(suite / picture) as image:
            assert min(image.size) > 100


def test_reconstruction_loss_at_the_ratio_of_the_run_equals_that_of_the_model(
    suite: Path, trained: Path, built_in: Path
) -> None:
    model = mae.load(trained)
    assert isinstance(model, MaskedAutoencoder)
    stored = OmegaConf.to_container(OmegaConf.load(trained / "config.yaml"))
    config = DataConfig.model_validate(stored["data"])  # pyright: ignore
    data = ShardDataModule(config, image_size=(32, 32), channels=3, seed=0, global_batch=1, micro_batch=1)
    images, samples = data.examples(100)
    with torch.no_grad():
        loss = model(Pixels(config.mean, config.std).normalise(images), held_out_noise(samples, model.config)).loss
    assert numbers(suite)["reconstruct"]["trained"]["loss"]["0.75"] == pytest.approx(float(loss), rel=0.01)  # bf16


def test_cached_features_are_reused_and_other_weights_extracted_again(
    suite: Path, trained: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(suite, tmp_path / "out")
    kept = {file: file.stat().st_mtime_ns for file in (out / "features").iterdir()}
    config = settings(trained, *SUITE, f"out={out}")
    evaluate(config, ALONE)
    assert numbers(out) == numbers(suite)
    assert {file: file.stat().st_mtime_ns for file in (out / "features").iterdir()} == kept
    evaluate(config.model_copy(update={"seed": 1}), ALONE)
    new = set((out / "features").iterdir()) - set(kept)
    assert len(new) == 4 + 2  # of another untrained twin: pooled and tokens of both parts, losses at two ratios
    assert numbers(out)["knn"]["trained"] == numbers(suite)["knn"]["trained"]
    assert numbers(out)["knn"]["untrained"] != numbers(suite)["knn"]["untrained"]


def test_eval_on_two_ranks_finds_the_features_and_scores_of_one_rank(
    suite: Path, trained: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([*launcher, "eval.py", f"checkpoint={trained}", *SMALL, *SUITE, f"out={tmp_path}"])
    kept, expected = (sorted((out / "features").iterdir()) for out in (tmp_path, suite))
    assert [file.name for file in kept] == [file.name for file in expected]
    for one, other in zip(kept, expected, strict=True):
        found, wanted = torch.load(one), torch.load(other)
        assert torch.equal(found["samples"], wanted["samples"]) and torch.equal(found["labels"], wanted["labels"])
        assert torch.allclose(found["values"].float(), wanted["values"].float(), rtol=0.02, atol=0.02)
    for probe in ("knn", "linear"):
        for model in ("trained", "untrained"):
            got, wanted = (numbers(out)[probe][model]["top1"] for out in (tmp_path, suite))
            assert got == pytest.approx(wanted, abs=2 / 359)


def test_lars_linear_probe_trains_on_augmented_views(trained: Path, tmp_path: Path) -> None:
    overrides = ("probe=linear", "probe.fit=lars", "probe.train_images=200", "probe.lars.views=2")
    few = ("probe.lars.base_lr=500", "probe.lars.epochs=30", "probe.lars.batch=50", "probe.lars.warmup_epochs=1")
    evaluate(settings(trained, *overrides, *few, f"out={tmp_path}"), ALONE)
    result = json.loads((tmp_path / "linear_lars.json").read_text())
    assert result["train_images"] == 200 and result["trained"]["top1"] > 0.15
    files = [torch.load(file) for file in (tmp_path / "features").iterdir()]
    views = [file["values"] for file in files if len(file["samples"]) == 200]
    assert len(views) == 4 and not any(torch.allclose(a, b) for a in views for b in views if a is not b)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    (folder / "images").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    for part in ("train", "val"):
        pack([str(folder / "images"), str(folder / "shards" / part)])
    return folder / "shards"


def pack_coloured(folder: Path, labels: dict[str, list[int]]) -> Path:
    """Packs images of 32 pixels whose colour is their class: part -> labels. Returns the folder of the shards."""
    for part, of_part in labels.items():
        for number, label in enumerate(of_part):
            pixels = np.random.default_rng(number).integers(0, 64, (32, 32, 3), dtype=np.uint8)
            pixels[..., label] += 150
            file = folder / "images" / part / "abc"[label] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
        pack([str(folder / "images" / part), str(folder / "shards" / part)])
    return folder / "shards"


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three classes."""
    return pack_coloured(tmp_path_factory.mktemp("coloured"), {"train": [0, 1, 2] * 6, "val": [0, 1, 2, 2]})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of weights in one folder, of a width that does not tell the number of heads."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("one.pth", "other.pth"):
        model = mae.Encoder(mae.MAEConfig(image_size=32, patch_size=8, width=32, depth=1, num_heads=4))
        torch.save({"model": model.state_dict()}, folder / name)
    return folder


def results(folder: Path, probe: str = "knn") -> dict[str, Any]:
    return json.loads((folder / f"{probe}.json").read_text())


def test_results_of_two_files_in_one_folder_lie_apart(weights: Path, coloured: Path) -> None:
    for name in ("one.pth", "other.pth"):
        evaluate(settings(weights / name, "probe=knn", f"data.path={coloured}", "model.num_heads=4"), ALONE)
    for name in ("one.pth", "other.pth"):
        (folder,) = (weights / "eval" / name).glob("on-shards-*")
        assert results(folder)["checkpoint"] == str(weights / name)


def test_weights_that_lack_the_number_of_heads_take_it_from_the_command_line(
    weights: Path, trained: Path, coloured: Path, tmp_path: Path
) -> None:
    words = ("probe=knn", f"data.path={coloured}", f"out={tmp_path}")
    with pytest.raises(CheckpointError, match="give num_heads="):
        evaluate(settings(weights / "one.pth", *words), ALONE)
    with pytest.raises(ConfigError, match=r"model\.num_heads=1, but .* was trained with 2: .* Leave it out"):
        evaluate(settings(trained, *words, "model.num_heads=1"), ALONE)
    evaluate(settings(weights / "one.pth", *words, "model.num_heads=2"), ALONE)
    assert (tmp_path / "knn.json").is_file()


def test_results_on_other_images_leave_those_of_the_run(
    trained: Path, built_in: Path, coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    few = ("probe=neighbours", "probe.train_images=5")
    evaluate(settings(run, *few), ALONE)
    own = results(run / "eval", "neighbours")
    assert own["data"]["mean"] == [0.3] * 3 and own["data"]["test"]["images"] == 359
    assert own["settings"]["pool"] == "patches" and own["data"]["train"]["classes"] == 10

    evaluate(settings(run, *few, f"data.path={coloured}"), ALONE)
    evaluate(settings(run, *few, "data.mean=[0.5,0.5,0.5]"), ALONE)

    assert results(run / "eval", "neighbours") == own
    others = sorted(path.name[:-9] for path in (run / "eval").glob("on-*"))
    assert others == ["on-digits", "on-shards"]
    assert "data.mean=[0.5,0.5,0.5] data.std=[0.34,0.34,0.34] are used" in capsys.readouterr().out
    other = results(next((run / "eval").glob("on-shards-*")), "neighbours")
    assert other["data"]["train"]["fingerprint"] != own["data"]["train"]["fingerprint"]
    moved = shutil.copytree(built_in / "built_in" / "digits", tmp_path / "moved")
    evaluate(settings(run, *few, f"data.path={moved}"), ALONE)  # the same images
    assert results(run / "eval", "neighbours")["data"]["path"] == str(moved)
    with pytest.raises(ConfigError, match="takes the results on the run's own images"):
        opened = open_weights(run)
        data = ShardDataModule(
            evaluation_data(run, {"path": str(coloured)}),
            image_size=(32, 32),
            channels=3,
            seed=0,
            global_batch=1,
            micro_batch=1,
        )
        choose_folder(run, opened, data, out=None, wandb=True)


@pytest.mark.parametrize("said", [True, False])
def test_mean_and_deviation_are_those_of_the_folder_of_weights(
    said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Opened(tmp_path, "mae", {}, {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}} if said else {})
    config = read_data_settings(tmp_path, opened, 3, {"path": "x"})
    assert config.mean == ((0.5,) * 3 if said else (0.485, 0.456, 0.406))
    assert config.std == ((0.25,) * 3 if said else (0.229, 0.224, 0.225))
    assert (f"mean and std of {tmp_path}" if said else "assumed, ImageNet's") in capsys.readouterr().out
    assert read_data_settings(tmp_path, opened, 3, {"path": "x", "mean": [0.1] * 3}).mean == (0.1,) * 3
    assert ("was trained with [0.5,0.5,0.5]" in capsys.readouterr().out) == said


def test_weights_that_are_not_finite_are_refused_before_anything_is_measured(
    weights: Path, coloured: Path, tmp_path: Path
) -> None:
    broken = torch.load(weights / "one.pth")
    broken["model"]["blocks.0.mlp.fc1.weight"][3, 5] = torch.nan
    torch.save(broken, tmp_path / "broken.pth")
    words = ("probe=knn", f"data.path={coloured}", "model.num_heads=4", f"out={tmp_path / 'out'}")
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate(settings(tmp_path / "broken.pth", *words), ALONE)
    assert not (tmp_path / "out").exists()


def test_features_that_are_not_finite_are_refused() -> None:
    values = torch.ones(3, 4, 2)
    values[1, 2, 0] = torch.inf
    features = Features(torch.tensor([4, 7, 9]), torch.zeros(3), values)
    with pytest.raises(CheckpointError, match="of the trained encoder are not finite, first those of image 7"):
        refuse_not_finite("trained", features)


def test_suite_of_one_class_runs_reconstruction_and_says_why_not_the_others(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = pack_coloured(tmp_path, {"train": [0] * 3, "val": [0]})
    evaluate(settings(trained, *SUITE, f"data.path={shards}", f"out={tmp_path / 'out'}"), ALONE)
    assert list(numbers(tmp_path / "out")) == ["reconstruct"]
    said = capsys.readouterr().out
    for probe in ("knn", "linear", "attentive"):
        assert f"left out: {probe} needs training images of several classes" in said


def test_suite_of_few_images_measures_all_and_says_what_they_cannot_tell(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = pack_coloured(tmp_path, {"train": [0, 1, 0, 0, 0], "val": [0]})
    evaluate(settings(trained, *SUITE, f"data.path={shards}", f"out={tmp_path / 'out'}"), ALONE)
    assert list(numbers(tmp_path / "out")) == ["knn", "linear", "attentive", "reconstruct"]
    said = " ".join(capsys.readouterr().out.split())
    assert "knn: k=20 is more than the 5 training images, all of which vote" in said
    assert "largest class 100.00%" in said and "among 5 images" in said
    assert results(tmp_path / "out")["floors"] == {"largest class": 1.0}


def test_unreadable_images_are_left_out_of_every_probe_and_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = pack_coloured(tmp_path, {"train": [0, 1, 2] * 3, "val": [0, 1, 2, 2]})
    words, out = (f"data.path={shards}", f"out={tmp_path / 'out'}"), tmp_path / "out"
    evaluate(settings(trained, "probe=knn", *words, f"out={tmp_path / 'whole'}"), ALONE)
    whole = {part: open_shards(str(shards), part) for part in ("train", "val")}
    bad = {"train": whole["train"].key(4), "test": whole["val"].key(0)}
    intact = [damage_sample(index, sample) for index, sample in ((whole["train"], 4), (whole["val"], 0))]

    capsys.readouterr()
    quick = ("probe.attentive.lrs=[0.003]", "probe.attentive.weight_decays=[0.01]", "probe.attentive.steps=2")
    evaluate(settings(trained, *SUITE, *quick, *words), ALONE)
    said = " ".join(capsys.readouterr().out.split())
    assert f"left out, because they cannot be read: 1 of 9 images of train: {bad['train']} (" in said
    assert f"left out, because they cannot be read: 1 of 4 images of test: {bad['test']} (" in said
    for probe, found in numbers(out).items():
        expected = {split: [key] for split, key in bad.items() if probe != "reconstruct" or split == "test"}
        assert json.loads((out / f"{probe}.json").read_text())["unreadable"] == expected
        assert found["test_images"] == 3 and found.get("train_images", 8) == 8
    kept = {file: file.stat().st_mtime_ns for file in (out / "features").iterdir()}

    evaluate(settings(trained, "probe=knn", "probe.shown=1", *words), ALONE)
    assert "1 of 4 images of test" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (out / "features").iterdir()} == kept

    for index, (sample, data) in zip(whole.values(), intact, strict=True):
        damage_sample(index, sample, data)
    evaluate(settings(trained, "probe=knn", *words), ALONE)
    assert "cannot be read" not in capsys.readouterr().out
    repaired, before = (json.loads((place / "knn.json").read_text()) for place in (out, tmp_path / "whole"))
    assert repaired["test_images"] == 4 and repaired["trained"] == before["trained"]
    assert repaired["unreadable"] == {"train": [], "test": []}


def test_images_of_which_none_can_be_read_raise_config_error(trained: Path, tmp_path: Path) -> None:
    shards = pack_coloured(tmp_path, {"train": [0, 1, 2], "val": [0, 1]})
    for sample in (0, 1):
        damage_sample(open_shards(str(shards), "val"), sample)
    with pytest.raises(ConfigError, match=r"none of the 2 test images can be read; the first is [ab]/[01]: its"):
        evaluate(settings(trained, *SUITE, f"data.path={shards}", f"out={tmp_path / 'out'}"), ALONE)


def test_run_overwritten_while_it_is_evaluated_is_one_sentence_and_gets_no_results(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    collect = ModelsUnderProbe.collect

    def overwrite_meanwhile(probed: ModelsUnderProbe, wants: list[Want]) -> None:
        collect(probed, wants)
        clear_run_folder(run)
        record_start(run, 0, 1)

    monkeypatch.setattr(ModelsUnderProbe, "collect", overwrite_meanwhile)
    with pytest.raises(CheckpointError, match="run was overwritten or removed while it was read"):
        evaluate(settings(run, "probe=knn", "probe.train_images=20"), ALONE)
    assert not (run / "eval" / "knn.json").exists()


def test_removal_of_what_is_evaluated_is_one_sentence_and_other_errors_pass(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with pytest.raises(FileNotFoundError, match="elsewhere"), same_run(run):
        (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(CheckpointError, match="overwritten or removed"), same_run(run):
        shutil.rmtree(run)
        next((run / "checkpoints").iterdir())
    (tmp_path / "encoder.pth").touch()
    with pytest.raises(CheckpointError, match="pth was removed while it was"), same_run(tmp_path / "encoder.pth"):
        (tmp_path / "encoder.pth").unlink()
        (tmp_path / "encoder.pth").read_bytes()


def test_checkpoint_deleted_between_search_and_reading_gives_way_to_the_next(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (newest,) = (run / "checkpoints").iterdir()
    gone = newest.with_name("step-00000009.ckpt")
    found = iter([gone, newest])  # as after a search that a save has overtaken
    monkeypatch.setattr("mae.formats.opened.newest_valid", lambda folder: next(found))
    assert open_weights(run).path == newest


def test_sam_and_autoencoder_in_the_place_of_each_other_name_the_way_out(
    trained: Path, built_in: Path, tmp_path: Path
) -> None:
    sam = tmp_path / "sam.pth"
    torch.save(whole_sam().state_dict(), sam)
    ways_out = "start task=segment from it, measure it with eval.py probe=segment, or read it with mae.load_sam"
    for probe in ("knn", "embeddings"):
        with pytest.raises(CheckpointError, match=ways_out):
            evaluate(settings(sam, f"probe={probe}"), ALONE)
    for task in ((), ("task=finetune",)):
        words = [f"runs={tmp_path}", f"data.root={built_in}", *REDUCED, *task, f"init_from={sam}", "max_steps=1"]
        with pytest.raises(CheckpointError, match=ways_out):
            train(compose(*words), ALONE)
    with pytest.raises(ConfigError, match=r"model\.num_heads=4 is for masked autoencoders.*: leave it out"):
        evaluate(settings(sam, "probe=segment", "model.num_heads=4"), ALONE)
    with pytest.raises(CheckpointError, match=r"measure it with eval\.py probe=suite, train a SAM from it"):
        evaluate(settings(trained, "probe=segment"), ALONE)


def damage_sample(index: ShardIndex, sample: int, data: bytes = b"") -> tuple[int, bytes]:
    """Overwrites the bytes of a sample, with zeros if none are given. Returns its number and what was there."""
    shard, offset, size = index.locate(sample)
    with open(index.shards[shard], "r+b") as file:
        before = os.pread(file.fileno(), size, offset)
        os.pwrite(file.fileno(), data or bytes(size), offset)
    return sample, before


def test_suite_without_labels_runs_reconstruction_only(trained: Path, unlabelled: Path, tmp_path: Path, capsys) -> None:
    evaluate(settings(trained, *SUITE, f"data.path={unlabelled}", f"out={tmp_path}"), ALONE)
    assert list(numbers(tmp_path)) == ["reconstruct"]
    assert "left out: knn needs labels" in capsys.readouterr().out


def test_neighbours_probe_keeps_features_and_thumbnails_with_and_without_labels(
    trained: Path, unlabelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, overrides, count in (("all", (), 1438), ("none", (f"data.path={unlabelled}",), 12)):
        out = tmp_path / part
        evaluate(settings(trained, "probe=neighbours", *overrides, f"out={out}"), ALONE)
        assert f"{count:,}" in capsys.readouterr().out
        kept = {torch.load(file)["values"].ndim: torch.load(file) for file in (out / "features").iterdir()}
        assert sorted(kept) == [2, 4]  # of the trained encoder alone, and thumbnails
        assert torch.equal(kept[2]["samples"], kept[4]["samples"]) and len(kept[2]["samples"]) == count
        assert kept[4]["values"].dtype == torch.uint8 and kept[4]["values"].shape[1:] == (3, 32, 32)
    with pytest.raises(ConfigError, match="raise cache_gb"):
        evaluate(settings(trained, "probe=neighbours", "cache_gb=0", f"out={tmp_path}"), ALONE)


def test_thumbnails_keep_the_aspect_and_mean_of_their_images() -> None:
    images = torch.rand(2, 3, 96, 160)
    small = thumbnails(images)
    assert small.dtype == torch.uint8 and small.shape == (2, 3, 38, 64)
    assert (small.float().mean((2, 3)) / 255 - images.mean((2, 3))).abs().max() < 0.01
    assert torch.equal(thumbnails(images[..., :40, :40]), (images[..., :40, :40] * 255).round().byte())


def test_probe_that_does_not_fit_raises_config_error_before_extraction(
    trained: Path, unlabelled: Path, built_in: Path, tmp_path: Path
) -> None:
    encoder = mae.MAEConfig(image_size=32, patch_size=8, width=192, depth=1, num_heads=3)
    torch.save({"model": mae.Encoder(encoder).state_dict()}, tmp_path / "encoder.pth")
    cases = [
        ((trained, "probe=linear", f"data.path={unlabelled}"), "probe=linear needs labels"),
        ((trained, "probe=attentive", f"data.path={unlabelled}"), "probe=attentive needs labels"),
        ((trained, "probe=knn", f"data.path={unlabelled}/train"), "probe=knn needs test images: set data.val_path"),
        ((trained, "probe=suite", f"data.path={unlabelled}/train"), "no probe that fits: knn needs test images"),
        ((tmp_path / "encoder.pth", "probe=reconstruct", f"data.path={built_in}/built_in/digits"), "needs a decoder"),
        ((trained, "probe=reconstruct", "probe.ratios=[0.999]"), "leaves 0 of 64 patches visible"),
    ]
    for (checkpoint, *overrides), said in cases:
        with pytest.raises(ConfigError, match=said):
            evaluate(settings(checkpoint, *overrides, f"out={tmp_path / 'out'}"), ALONE)
    assert not (tmp_path / "out").exists()
