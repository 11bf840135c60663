"""Every recipe in conf/experiment composes, validates, builds, and runs two steps at reduced size."""

from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

import mae
from mae.distributed.launch import Topology
from mae.report.summary import read_metrics
from tasks.config import TrainConfig
from tasks.task import read_settings
from tasks.train import train
from tests.conftest import ROOT
from tests.exports import own_checkpoint
from tests.masked_photos import shards_of_shapes

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
PARAMETERS = {"base": 111_907_840, "large": 329_541_888, "huge": 657_289_728, "huge14": 657_074_508}
REDUCED = [
    "epochs=1",
    "max_steps=2",
    "global_batch=8",
    "micro_batch=4",
    "val_every=2",
    "model.width=32",
    "model.depth=1",
    "model.num_heads=2",
    "model.decoder_width=32",
    "model.decoder_depth=1",
    "model.decoder_num_heads=2",
    "data.workers=0",
    "data.source=digits",
]

SEGMENT = [
    "task.image_size=64",
    "task.window=2",
    "task.global_blocks=[0]",
    "task.out_channels=32",
    "task.masks_per_image=2",
    "task.clicks=1",
]


def compose(*overrides: str) -> TrainConfig:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return read_settings(hydra.compose("train", overrides=list(overrides)))


def test_recipe_folder_holds_the_expected_experiments() -> None:
    expected = {"digits_tiny", "cifar10_tiny", "imagenet_base", "imagenet_large", "imagenet_huge", "imagenet_huge14"}
    assert expected | {"sa1b_huge"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_recipe_builds_at_its_full_size(experiment: str) -> None:
    config = compose(f"experiment={experiment}", "data.path=somewhere")
    with torch.device("meta"):
        model = mae.MaskedAutoencoder(config.model)
    family, _, size = experiment.rpartition("_")
    if size in PARAMETERS and family != "pixio":
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size]
    assert config.name == experiment


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_values_stated_in_a_recipe_are_those_of_the_run(experiment: str) -> None:
    stated = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "experiment" / f"{experiment}.yaml"))
    assert isinstance(stated, dict)
    stated.pop("defaults")
    composed = compose(f"experiment={experiment}", "data.path=somewhere")

    def check(expected: dict, actual: object) -> None:
        for key, value in expected.items():
            found = getattr(actual, key)
            if isinstance(value, dict):
                check(value, found)
            elif key == "image_size":
                assert found in (value, (value, value))
            else:
                plain = list(found) if isinstance(found, tuple) else str(found) if isinstance(found, Path) else found
                assert plain == value, key

    check(stated, composed)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_recipe_runs_two_steps_at_reduced_size(experiment: str, tmp_path: Path, built_in: Path) -> None:
    full = compose(f"experiment={experiment}", "data.path=somewhere")
    cells = max(4, 2 * full.model.mask_cell)  # patches of a side
    reduced = [*REDUCED, f"model.image_size={cells * full.model.patch_size}"]
    if full.task.name == "segment":
        reduced += [*SEGMENT, f"data.path={shards_of_shapes(tmp_path / 'shapes')}"]
        if full.task.embeddings is not None:
            reduced.append(f"task.embeddings={tmp_path / 'embeddings'}")
    if full.task.name == "distill":
        reduced.append(f"task.teacher={own_checkpoint(tmp_path)[1]}")
    config = compose(f"experiment={experiment}", f"runs={tmp_path}", f"data.root={built_in}", *reduced)
    train(config, Topology(rank=0, ranks=1, devices=1, nodes=1))
    rows = read_metrics(config.run / "metrics.csv")
    assert [row["step"] for row in rows if "train/loss" in row] == ["2"]
    assert any("val/loss" in row for row in rows)
    assert (config.run / "summary.json").is_file()
