"""Settings are what was meant: as words of a command line, as values of a run, beside a recipe."""

import copy
import json
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import ValidationError

from mae.distributed.launch import Topology
from mae.errors import ConfigError, first_sentence
from mae.run.checkpoint_files import checkpoints
from mae.run.metrics import read_metrics
from tasks.recipe import chosen_recipe
from tasks.task import read_settings
from tasks.train import train
from tasks.words import known_settings, readable, setting, unknown
from tests.conftest import ROOT
from tests.processes import SMALL
from tests.test_experiments import REDUCED, compose
from train import prepare


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    """Composes the settings of a small run."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("train", overrides=[*SMALL])


def read(composed: DictConfig, name: str, value: Any) -> Any:
    """Reads the settings with one more or another. Raises ConfigError with the sentence of a refusal."""
    raw = copy.deepcopy(composed)
    OmegaConf.set_struct(raw, False)
    OmegaConf.update(raw, name, value)
    try:
        return read_settings(raw)
    except ValidationError as error:
        raise ConfigError(first_sentence(error)) from error


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("global_btach", 1, r"unknown setting global_btach: did you mean global_batch\?"),
        ("optim.warmup_epoch", 1, r"did you mean optim\.warmup_epochs\?"),
        ("trainer.max_epochs", 3, r"trainer\.max_epochs is not yours to set: set epochs"),
        ("trainer.gradient_clip_val", 1, r"set optim\.grad_clip"),
        ("trainer.accumulate_grad_batches", 4, "set micro_batch"),
        ("trainer.fast_dev_run", True, "set max_steps=1 and a name of its own"),
        ("trainer.foo", 1, r"unknown setting trainer\.foo: trainer has accelerator, benchmark, .* strategy"),
        ("trainer._partial_", True, "unknown setting trainer._partial_"),
        ("trainer.benchmark", "fast", r"trainer\.benchmark.*: input should be a valid boolean"),
        ("trainer.max_time", "2h", r"trainer\.max_time: 2h has to be days:hours:minutes:seconds"),
        ("trainer.max_time", "9999999999:00:00:00", "has to be days:hours:minutes:seconds"),
        ("trainer.devices", [0], r"trainer\.devices: \[0\] has to be how many .* CUDA_VISIBLE_DEVICES"),
        ("trainer.devices", 0, "devices: 0 has to be how many"),
        ("trainer.devices", "0,1", "devices: 0,1 has to be how many"),
        ("name", "exp/run1", r"'exp/run1' holds '/'\. Letters, digits and"),
        ("name", "my run", "'my run' holds ' '"),
        ("name", 1e5, "its spelling is lost. Write it in quotes"),
        ("data.path", "~/digits", r"data\.path=~/digits: nobody expands ~"),
        ("data.path", ["a", "~/digits"], "nobody expands ~"),
        ("runs", "~me/runs", "nobody expands ~"),
        (
            "init_from",
            "https://host/a.pth?token=secret",
            "init_from is a URL, and has to be a path on this machine: download",
        ),
        ("runs", "s3://bucket/runs", "runs is a URL, and has to be a path"),
        ("name", "x" * 256, "is longer than the 255 bytes"),
        ("epochs", float("inf"), "epochs=inf is no finite number"),
        ("data.std", [1.0, float("nan"), 1.0], r"data\.std=nan is no finite number"),
        ("data.path", "", r"data\.path is empty, as from a variable of the shell that is not set"),
        ("data.path", [], "path and val_path cannot be empty"),
        ("init_from", "", "init_from is empty"),
        ("optim.betas", [0.9, 1.0], r"optim\.betas\.1=1\.0: input should be less than 1"),
        ("optim.milestones", [60000, 86666], r"optim\.milestones\.0=60000: input should be less than 1"),
        ("logger.wandb", None, r"logger\.wandb=None: input should be a valid dictionary"),
        ("task.name", "foo", r"task\.name=foo is none of"),
    ],
)
def test_wrong_setting_raises_a_sentence_with_the_way_out(
    composed: DictConfig, name: str, value: Any, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        read(composed, name, value)
    assert "secret" not in str(error.value)


def test_number_as_name_and_lightnings_own_arguments_are_taken(composed: DictConfig) -> None:
    assert read(composed, "name", 2024).name == "2024"
    assert read(composed, "trainer.deterministic", True).trainer.deterministic is True
    assert read(composed, "trainer.devices", "2").trainer.devices == 2
    assert read(composed, "data.path", "https://host/shards").data.path == "https://host/shards"


@pytest.mark.parametrize("group", ["task", "model", "data", "optim", "trainer"])
def test_left_out_group_raises_a_sentence_with_its_options(composed: DictConfig, group: str) -> None:
    raw = copy.deepcopy(composed)
    with open_dict(raw):
        del raw[group]
    with pytest.raises(ConfigError, match=f"^{group} is left out, and cannot be: set {group}= to one of"):
        read_settings(raw)


def test_left_out_logger_is_no_tracker(composed: DictConfig) -> None:
    raw = copy.deepcopy(composed)
    with open_dict(raw):
        del raw["logger"]
    assert read_settings(raw).logger == {}


@pytest.mark.parametrize(
    ("typed", "for_hydra"),
    [
        ("logger=null", ["~logger"]),
        ("logger=False", ["~logger"]),
        ("launcher=none", []),
        ("experiment=null", ['experiment="null"']),  # of which Hydra says that it does not exist
        ("model=5", ['model="5"']),
        ("init_from=null", ["init_from=null"]),
        ("name=1e5", ['name="1e5"']),
        ("name=2024-01", ["name=2024-01"]),
        ("global_batch=64", ["global_batch=64"]),
        ("data.path=~/digits", ['data.path="~/digits"']),
        ("data.path=数据/a=b", ['data.path="数据/a=b"']),
        ("data.path=[数据/a,~/b]", ['data.path=["数据/a","~/b"]']),
        ("data.path=a/{000..010}.tar", ['data.path="a/{000..010}.tar"']),
        ("runs='my data (1)/runs'", ["runs='my data (1)/runs'"]),
        ("data.scale=[0.2, 1.0]", ["data.scale=[0.2, 1.0]"]),
        ("model.mask_ratio=0.5,0.75", ["model.mask_ratio=0.5,0.75"]),
    ],
)
def test_words_become_readable_for_hydra(typed: str, for_hydra: list[str]) -> None:
    assert readable([typed]) == for_hydra
    assert readable(for_hydra) == for_hydra  # torchrun starts the ranks with these


def test_values_of_a_multirun_are_quoted_one_by_one() -> None:
    assert readable(["-m", "data.path=数/a,数/b", "name=1,2"]) == ["-m", 'data.path="数/a","数/b"', 'name="1","2"']


@pytest.mark.parametrize("several", ["-m", "--multirun", "--multi", "hydra.mode=MULTIRUN"])
def test_runs_of_a_multirun_have_folders_of_their_own(several: str) -> None:
    words = prepare([several, "--config-dir", "conf2", "name=x", "optim.base_lr=0.1,0.2"])
    assert words[-1] == "trial=${hydra:job.override_dirname}" and "exclude_keys=[" in words[-2]


def test_plan_is_switched_by_a_word() -> None:
    assert prepare(["plan=True", "plan.gpus=8"]) == ["plan.show=True", "plan.gpus=8"]
    assert prepare(["plan=false", "suggest=true"]) == ["plan.show=false", "suggest.show=true"]


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=12))
def test_setting_of_a_text_is_read_by_hydra_as_that_text(text: str) -> None:
    override = OverridesParser.create().parse_override(setting("data.path", text))
    assert not override.is_sweep_override()
    assert override.value() == text or isinstance(override.value(), list | dict | None)


@pytest.mark.parametrize(
    "value", ["x/a=b", "x/c d,e", "~/x", "2024", 'say "x"', "range(1,3)", None, True, 1e-9, [0.2, ["a b,c"]]]
)
def test_setting_keeps_value_and_type(value: Any) -> None:
    override = OverridesParser.create().parse_override(setting("data.path", value))
    assert override.value() == value and type(override.value()) is type(value)


def test_unknown_setting_names_the_nearest_one() -> None:
    known = known_settings("train", ["data=shards", "global_btach=1"])
    assert unknown("global_btach", known) == "unknown setting global_btach: did you mean global_batch?"
    assert unknown("experimnt", known).endswith("did you mean experiment?")
    assert unknown("mask_ratio", known).endswith("did you mean model.mask_ratio?")
    assert unknown("online_probe.foo", known).endswith(
        ": online_probe has dense_images, every, k, test_images, train_images"
    )
    assert unknown("foo", known) == "unknown setting foo: --cfg job lists those that there are"
    assert unknown("trainer.max_epochs", known).startswith("trainer.max_epochs is not yours to set: set epochs")


def test_chosen_size_wins_over_the_default_recipe() -> None:
    model = compose("model=vit_base").model
    assert (model.width, model.depth, model.num_heads, model.patch_size) == (768, 12, 12, 16)
    assert (model.image_size, model.decoder_width) == ((32, 32), 64)
    assert compose("model=vit_base", "model.width=96").model.width == 96


def recipe_of(*words: str) -> str | None:
    """Returns the recipe of a command line, as train.py finds it."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        everything = hydra.compose("train", overrides=list(words), return_hydra_config=True)
        return chosen_recipe(everything, everything.hydra)


def test_values_of_the_recipe_that_stay_beside_a_chosen_group_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe_of() == "digits_tiny" and not capsys.readouterr().out
    recipe_of("model=vit_base", "model.decoder_depth=2", "name=x", "val_every=5")
    assert capsys.readouterr().out == (
        "model=vit_base beside experiment=digits_tiny: of the recipe stay model.image_size=32, model.decoder_width=64, "
        "model.decoder_num_heads=4, optim.base_lr=0.004, optim.warmup_epochs=5\n"
    )


def test_recipe_that_changes_the_size_of_a_chosen_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: x\nmodel: {width: 96, depth: 3}\n")
    words = (f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine", "model=vit_base", "model.depth=12")
    with pytest.raises(ConfigError, match=r"model=vit_base, but experiment=mine states model\.width=96 of its own"):
        recipe_of(*words)
    assert recipe_of(*words, "model.width=768") == "mine"


def test_own_data_without_a_recipe_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`\S+ \S+ data\.path=x suggest=true suggest\.hours=8` writes one for these"):
        recipe_of("data.path=x")
    with pytest.raises(ConfigError, match=r"^data\.val_path without a recipe"):
        recipe_of("data.val_path=x")
    with pytest.raises(ConfigError, match="Add experiment=finetune_base"):
        recipe_of("data.path=x", "task=finetune", "optim=finetune")
    assert recipe_of("data.path=x", "experiment=digits_tiny") == "digits_tiny"


def test_time_limit_ends_a_run_after_a_whole_step_that_the_summary_names(tmp_path: Path, built_in: Path) -> None:
    words = (
        f"runs={tmp_path}",
        f"data.root={built_in}",
        *REDUCED,
        "model.image_size=32",
        "log_every=50",
        "name=limited",
    )
    config = compose(*words, "trainer.max_time=00:00:00:00")
    train(config, Topology())
    summary = json.loads((config.run / "summary.json").read_text())
    assert (summary["step"], summary["total_steps"]) == (1, 2)
    assert [Path(summary["checkpoint"])] == checkpoints(config.run)
    assert Path(summary["reconstruction"]).is_file() and summary["val/loss"] is not None
    rows = read_metrics(config.run / "metrics.csv")
    assert [row["step"] for row in rows if "train/loss" in row] == ["1"]

    train(compose(*words), Topology())
    assert json.loads((config.run / "summary.json").read_text())["step"] == 2
