"""suggest=true: what a recipe follows from, what is refused, and that a run starts with the file."""

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from pydantic import ValidationError

from data.pack.__main__ import main as pack
from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.models.flops import pretraining_flops
from mae.plan.step_rate import step_rate
from mae.plan.suggestion import SIZES, Facts, Suggestion, derive, image_shape
from tasks.suggest import _build, refuse_contradictions
from tests.conftest import ROOT
from tests.processes import completed
from tests.test_experiments import compose
from tests.test_pack import image

CORES, H100 = 0.4e12, 8 * 989e12  # FLOP/s


def suggestion(images: int, hours: float, peak: float, *, side: int = 348, **given) -> Suggestion:
    facts = Facts(images, side, ranks=8 if peak == H100 else 1, peak=peak, hours=hours, **given)
    return derive(
        facts,
        lambda *shape: _build(*shape, channels=3, stated={}),
        lambda config: 0.4 * peak / pretraining_flops(config),
    )


@pytest.mark.parametrize(
    ("images", "hours", "peak", "model", "side"),
    [
        (565, 0.2, CORES, "vit_mini", 112),  # conf/experiment/grocery_small.yaml, measured
        (9_144, 8, CORES, "vit_tiny", 224),
        (200_000, 24, H100 / 8, "vit_base", 224),
        (1_281_167, 60, H100, "vit_large", 224),
        (11_000_000, 200, H100, "vit_huge", 224),
    ],
)
def test_model_and_image_size_grow_with_images_and_budget(
    images: int, hours: float, peak: float, model: str, side: int
) -> None:
    found = suggestion(images, hours, peak)
    assert (found.size, found.config.image_size) == (model, (side, side))
    assert found.hours <= hours * 1.001
    batch, steps = found.settings["global_batch"], found.settings["epochs"] * images / found.settings["global_batch"]
    assert 32 <= batch <= 4096 and batch % (8 if peak == H100 else 1) == 0 and (steps > 15_000 or batch == 32)


@pytest.mark.parametrize(
    ("hours", "val_images", "times"), [(0.1, 50, 5), (8, 500, 20), (1, 50_000, 7), (0.1, 9_000, 4), (0.1, 90_000, 1)]
)
def test_short_budgets_validate_seldom_and_hours_hold_validation_and_start(
    hours: float, val_images: int, times: int
) -> None:
    rate = 0.4 * CORES / pretraining_flops(suggestion(9_000, hours, CORES, val_images=val_images).config)
    found = suggestion(9_000, hours, CORES, val_images=val_images)
    steps = found.settings["epochs"] * (9_000 // found.settings["global_batch"])
    assert abs(round(steps / found.settings["val_every"]) - times) <= 1
    assert found.settings["pictures_every"] == found.settings["val_every"]
    validated = 0.5 * val_images * steps / found.settings["val_every"]
    seconds = (found.settings["epochs"] * 9_000 + validated) / rate + 20
    assert seconds / 3600 < found.hours < 1.001 * hours and (seconds / 3600 > 0.9 * hours or times == 1)


def test_hours_that_end_before_a_run_has_started_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"suggest\.hours=0\.005 are over before a run has started"):
        suggestion(9_000, 0.005, CORES)


@pytest.mark.parametrize(
    ("shorter_side", "shape"),
    [(28, (28, 4)), (32, (32, 4)), (64, (64, 8)), (100, (96, 16)), (348, (224, 16)), (3000, (224, 16)), (8, (16, 4))],
)
def test_image_size_follows_the_shorter_side_and_enlarges_nothing(shorter_side: int, shape: tuple[int, int]) -> None:
    assert image_shape(shorter_side) == shape


def test_learning_rate_of_small_models_is_that_of_the_measured_recipes() -> None:
    for recipe in ("grocery_small", "cifar10_tiny"):
        stated = OmegaConf.load(ROOT / "conf" / "experiment" / f"{recipe}.yaml")
        found = suggestion(5_000, 1, CORES, global_batch=stated.global_batch).settings["optim"]["base_lr"]
        assert found == pytest.approx(stated.optim.base_lr, rel=0.06)


def test_little_data_or_time_is_said_and_too_little_is_refused() -> None:
    few, rest, _ = suggestion(50_000, 0.02, CORES).doubts[0], *suggestion(100, 10, CORES).doubts
    assert "passes" in few and "are few" in few and "the rest is better spent on more images" in rest
    assert suggestion(100, 10, CORES).settings["epochs"] == 1600
    assert not suggestion(1_281_167, 20, H100).doubts
    with pytest.raises(ConfigError, match="start from published weights"):
        suggestion(31, 8, CORES)
    with pytest.raises(ConfigError, match="allow more hours"):
        suggestion(50_000_000, 0.01, CORES)


def test_given_size_and_batch_stay() -> None:
    found = suggestion(9_144, 8, CORES, sizes=("vit_base",), image_size=64, global_batch=48)
    assert found.size == "vit_base" and found.config.image_size == (64, 64) and found.settings["global_batch"] == 48
    assert [why for _, _, why in found.reasons].count("as given") == 3


def test_every_size_is_a_file_of_conf_model() -> None:
    for size in SIZES.values():
        assert isinstance(_build(size, 224, 16, channels=4, stated={}), MAEConfig)


def test_training_steps_are_measured_on_this_machine() -> None:
    small = MAEConfig.model_validate({"image_size": 32, "width": 32, "depth": 1, "num_heads": 2, "decoder_depth": 1})
    assert step_rate(small, torch.device("cpu"), "bf16-mixed", seconds=0.05) > 10


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["suggest.hours=null"], "needs suggest.hours"),
        (["data.path=null"], "needs data.path"),
        (["data.mode=stream"], "has no number"),
        (["task.name=finetune"], "recipes of pre-training"),
        (["experiment=imagenet_base"], "is one: leave out either"),
        (["epochs=5"], "epochs=5 follows from suggest.hours"),
        (["model.image_size=[64,96]"], "derives square images"),
    ],
)
def test_contradicting_words_beside_suggest_are_refused(words: list[str], says: str) -> None:
    base = OmegaConf.from_dotlist(
        ["suggest.hours=8", "data.path=x", "data.mode=index", "task.name=pretrain", "model.image_size=224", *words]
    )
    with pytest.raises(ConfigError, match=says):
        refuse_contradictions(base, {word.partition("=")[0]: word for word in words})  # pyright: ignore


def test_hours_without_suggest_are_refused() -> None:
    with pytest.raises(ValidationError, match="hours=8 is for suggest=true"):
        compose("suggest.hours=8")


def test_suggested_recipe_is_found_by_its_name_and_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        image(tmp_path / "my photos" / f"{number}.png", number)
    pack([str(tmp_path / "my photos"), str(tmp_path / "my set" / "train"), "--jobs", "1"])
    words = [str(ROOT / "train.py"), "suggest=true", "data.path=my set", "suggest.hours=0.5"]
    words += [
        "plan.gpu=mine",
        "plan.memory=22",
        "plan.tflops=121",
        "plan.gpus=2",
        "data.flip=false",
        "trainer.max_time=00:00:40:00",
    ]
    done = completed([sys.executable, *words], tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "written recipes/experiment/my-set.yaml" in said and "experiment=my-set trainer.max_time=00:00:40:00" in said
    file = tmp_path / "recipes" / "experiment" / "my-set.yaml"
    assert "Not yet run" in file.read_text() and not (tmp_path / "runs").exists()
    monkeypatch.chdir(tmp_path)
    config = compose("experiment=my-set")
    assert config.data.path == "my set" and config.data.flip is False and config.name == "my-set"
    assert config.global_batch % 2 == 0 and config.model.image_size == (16, 16)  # of images of 12 x 16 pixels
    before = file.read_bytes()
    again = completed([sys.executable, *words], tmp_path)
    assert again.returncode == 2 and "is there already" in again.stderr and file.read_bytes() == before
