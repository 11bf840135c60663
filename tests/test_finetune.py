"""Fine-tuning: from any weights, resumed exactly, the same samples for any ranks, and one sentence for wrong input."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

import mae
from data.datamodule import DataConfig, ShardDataModule
from data.pack.image_folder import find_images
from data.pack.pack import pack
from mae.distributed.launch import Topology
from mae.distributed.stop import Stopped
from mae.errors import CheckpointError, ConfigError
from mae.export.write import export
from mae.models.classifier import Classifier, build_classifier
from mae.report.summary import read_metrics
from mae.run.checkpoint_files import newest_valid, read_own
from mae.run.checkpoint_writer import write_checkpoint
from tasks.config import TrainConfig
from tasks.evaluate import EvalConfig, evaluate
from tasks.finetune import Finetune
from tasks.pretrain import Pretrain
from tasks.train import match_recipe, train
from tests.processes import SMALL, assert_same_run, bit_equal
from tests.test_experiments import compose

ONE = Topology(rank=0, ranks=1, devices=1, nodes=1)
TINY = ["model.image_size=32", "model.patch_size=8", "model.width=192", "model.depth=2", "model.num_heads=3"]
FINETUNE = [
    "task=finetune",
    "optim=finetune",
    *SMALL,
    *TINY,
    "data.workers=0",
    "precision=32-true",
    "val_every=null",
    "data.rand_augment=rand-m9-mstd0.5-inc1",
    "task.drop_path=0.3",
    "task.erasing=0.5",
    "task.ema=0.9",
]


def settings(runs: Path, root: Path, name: str, *overrides: str) -> TrainConfig:
    return compose(f"runs={runs}", f"data.root={root}", f"name={name}", *FINETUNE, *overrides)


def finetune(runs: Path, root: Path, name: str, *overrides: str, extra: Sequence[pl.Callback] = ()) -> Path:
    config = settings(runs, root, name, *overrides)
    torch.set_num_threads(1)
    train(config, ONE, extra)
    return config.run


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    """A masked autoencoder after two steps."""
    runs = tmp_path_factory.mktemp("pretrained")
    config = compose(
        f"runs={runs}", f"data.root={built_in}", "name=mae", *SMALL, *TINY, "data.workers=0", "max_steps=2"
    )
    train(config, ONE)
    return config.run


class Stop(pl.Callback):
    """Signals the process at one step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == self.at and batch_idx % trainer.accumulate_grad_batches == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_stopped_and_resumed_finetuning_equals_the_uninterrupted_run(
    tmp_path: Path, built_in: Path, pretrained: Path
) -> None:
    """Drop path, mixup, cutmix, erasing, RandAugment and the moving average, over the edge of an epoch."""
    words = [f"init_from={pretrained}", "max_steps=26", "micro_batch=32"]
    whole = finetune(tmp_path, built_in, "whole", *words)
    with pytest.raises(Stopped):
        finetune(tmp_path, built_in, "stopped", *words, extra=[Stop(9)])
    assert read_own(newest_valid(tmp_path / "stopped") or Path())["mae"]["step"] == 10
    stopped = finetune(tmp_path, built_in, "stopped", *words)
    assert_same_run(stopped, whole)
    weights = read_own(newest_valid(whole) or Path())["state_dict"]
    assert not torch.equal(weights["average.head.weight"], weights["model.head.weight"])
    with pytest.raises(ConfigError, match=r"task.drop_path \(0.3 in the checkpoint, 0.1 now\)"):
        finetune(tmp_path, built_in, "stopped", *words, "task.drop_path=0.1")
    with pytest.raises(ConfigError, match="belongs to a different run"):
        train(compose(f"runs={tmp_path}", f"data.root={built_in}", "name=stopped", *SMALL, *TINY), ONE)
    assert not (stopped / "ended.json").exists()  # it is finished


def test_checkpoint_without_newer_settings_matches_with_their_defaults(tmp_path: Path, built_in: Path) -> None:
    task = Pretrain(compose(f"runs={tmp_path}", f"data.root={built_in}", "name=old", *SMALL, *TINY), ONE)
    recipe = task.recipe("32-true")
    del recipe["optim"]["layer_decay"], recipe["data"]["rand_augment"]
    write_checkpoint({"mae": {"step": 7, "recipe": recipe}}, tmp_path / "old.ckpt")
    assert match_recipe(task, tmp_path / "old.ckpt") == (task.recipe("32-true"), 7)


def test_finetuned_run_is_validated_evaluated_and_exported(
    tmp_path: Path, built_in: Path, pretrained: Path, capsys
) -> None:
    run = finetune(tmp_path, built_in, "end", f"init_from={pretrained}", "max_steps=2", "val_every=2")
    rows = read_metrics(run / "metrics.csv")
    validated = next(row for row in rows if "val/top1" in row)
    assert 0 < float(validated["val/top1"]) < float(validated["val/top5"]) < 1
    said = capsys.readouterr().out
    assert "classifier of 10 classes" in said and f"top1        {float(validated['val/top1']):.2%}" in said
    model = mae.load(run)
    names = [str(digit) for digit in range(10)]
    assert isinstance(model, Classifier) and model.classes == 10 and model.class_names == names
    assert json.loads((run / "summary.json").read_text())["classes"] == names
    evaluate(
        EvalConfig.model_validate(
            {"checkpoint": run, "probe": {"name": "classify"}, "data": {}, "pool": "patches", "batch_size": 100}
            | {"cache_gb": 1, "out": None, "wandb": False}
        ),
        ONE,
    )
    found = json.loads((run / "eval" / "classify.json").read_text())
    for name in ("top1", "top5"):  # evaluated in bf16 where the machine has it, with one image more or less
        assert found["trained"][name] == pytest.approx(float(validated[f"val/{name}"]), abs=0.03)
    assert found["classes"] == names
    averaged = read_own(newest_valid(run) or Path())["state_dict"]["average.head.weight"]
    assert torch.equal(model.head.weight, averaged)
    export(run, "timm", tmp_path / "model.safetensors")


@pytest.mark.parametrize("source", ["facebook", pytest.param("hf-vit", marks=pytest.mark.slow)])
def test_finetuning_starts_from_foreign_weights_at_another_image_size(
    tmp_path: Path, built_in: Path, pretrained: Path, source: str
) -> None:
    """With next to no learning rate the weights are still those that came in, positions resized."""
    out = tmp_path / ("mae.pth" if source == "facebook" else "folder")
    export(pretrained, source, out)
    words = [f"init_from={out}", "max_steps=1", "optim.base_lr=1e-12", "optim.min_lr=0", "task.image_size=48"]
    words.append("task.ema=null")
    model = mae.load(finetune(tmp_path, built_in, "foreign", *words))
    assert model.config.image_size == (48, 48) and model.pos_embed.shape == (1, 37, 192)
    expected, found = mae.load(pretrained).state_dict(), model.state_dict()
    same = [name for name in found if name.startswith("blocks.") or name.startswith("patch_embed.")]
    assert len(same) > 20 and all(torch.allclose(found[name], expected[name], atol=1e-6) for name in same)


@pytest.mark.parametrize(
    ("classes", "words", "said"),
    [
        (7, [], "left out: its head of 7 classes; a new one of 10 starts afresh"),
        (10, ["task.pool=class_token"], "left out: its head of 10 classes"),
        (10, [], "its head is taken over, since its 10 classes have the same names"),
        (10, ["task.image_size=48"], "positions are resized bicubically"),
        (10, ["data.mean=[0.3]", "data.std=[0.3]", "data.rand_augment=null"], "channels 3 -> 1: the weights"),
        (10, ["data.mean=[0.5,0.5,0.5]"], "this run has [0.5,0.5,0.5] and [0.34,0.34,0.34]"),
    ],
    ids=str,
)
def test_finetuning_starts_from_a_classifier_and_says_what_becomes_of_its_head(
    tmp_path: Path, built_in: Path, pretrained: Path, capsys, classes: int, words: list[str], said: str
) -> None:
    source = build_classifier(mae.load(pretrained), classes)
    with torch.no_grad():
        source.head.weight.normal_()
    run = {"step": 5, "recipe": {"model": source.config.model_dump(mode="json")}, "classes": list("0123456789")}
    state = {f"model.{name}": value for name, value in source.state_dict().items()}
    torch.save({"mae": run, "state_dict": state}, tmp_path / "step-00000005.ckpt")
    config = settings(tmp_path, built_in, "more", f"init_from={tmp_path / 'step-00000005.ckpt'}", *words)
    model = Finetune(config, ONE).model(None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("init_from: ")]
    assert any(said in line for line in lines)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    kept = classes == 10 and not any("pool" in word for word in words)
    assert torch.equal(model.head.weight, source.head.weight) == kept


class Rates(pl.Callback):
    """Notes the rates of all groups, and the schedule's, at each update."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[float], float]] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.seen.append(([group["lr"] for group in optimizer.param_groups], module.lr(trainer.global_step)))


def test_parameter_groups_follow_the_schedule_at_their_decayed_rates(
    tmp_path: Path, built_in: Path, pretrained: Path
) -> None:
    rates = Rates()
    words = [f"init_from={pretrained}", "max_steps=4", "epochs=1", "optim.warmup_epochs=0.5", "optim.layer_decay=0.5"]
    finetune(tmp_path, built_in, "rates", *words, extra=[rates])
    schedule = [lr for _, lr in rates.seen]
    assert schedule[0] == 0 and schedule[2] == max(schedule) > schedule[3] > 0
    for groups, lr in rates.seen:
        assert sorted(set(groups)) == pytest.approx(sorted({lr * 0.5**below for below in range(4)}))


def augmented(root: Path, ranks: int, micro_batch: int, workers: int) -> dict[int, torch.Tensor]:
    """position -> image, of one epoch."""
    config = DataConfig(source="digits", root=str(root), workers=workers, rand_augment="rand-m9-mstd0.5-inc1")
    shape = {"image_size": (24, 24), "channels": 3, "seed": 3, "global_batch": 64, "micro_batch": micro_batch}
    data = ShardDataModule(config, **shape)
    return {
        int(position): image.clone()
        for rank in range(ranks)
        for batch in data.train_loader(lambda: 18, rank, ranks)
        for position, image in zip(batch["positions"], batch["images"], strict=True)
    }


def test_randaugment_does_not_depend_on_ranks_workers_or_micro_batch(built_in: Path) -> None:
    one, other = augmented(built_in, 1, 64, 0), augmented(built_in, 2, 16, 1)
    assert len(one) == 256 and bit_equal(one, other)
    plain = ShardDataModule(
        DataConfig(source="digits", root=str(built_in), workers=0),
        image_size=(24, 24),
        channels=3,
        seed=3,
        global_batch=64,
        micro_batch=64,
    )
    batch = next(iter(plain.train_loader(lambda: 18)))
    pairs = zip(batch["images"], batch["positions"].tolist(), strict=True)
    changed = sum(not torch.equal(image, one[position]) for image, position in pairs)
    assert 40 < changed < 64  # each of two operations is left out half of the time


def test_unsupported_randaugment_policy_raises_validation_error() -> None:
    for policy in ("augmix", "rand-x9-inc1", "rand-m-inc1", "rand-m9"):
        with pytest.raises(ValidationError, match="rand_augment"):
            DataConfig(source="digits", rand_augment=policy)
    with pytest.raises(ValidationError, match="three channels of 8 bits"):
        DataConfig(source="digits", rand_augment="rand-m9-inc1", mean=(0.5,), std=(0.5,))


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unlabelled")
    (root / "images").mkdir()
    for number in range(70):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(root / "images" / f"{number}.png")
    samples, classes, *_ = find_images(root / "images")
    pack(samples, root / "packed", name="x", classes=classes)
    return root / "packed"


def test_conflicting_finetune_settings_raise_an_error_and_leave_no_run(
    tmp_path: Path, built_in: Path, pretrained: Path, unlabelled: Path
) -> None:
    cases = {
        "70 of 70 training images have none": [f"data.path={unlabelled}"],
        "labels of the training images go up to 9": ["task.classes=5"],
        "have to be multiples of 2": ["micro_batch=21", "global_batch=63"],
        "not a multiple of patch_size=8": [f"init_from={pretrained}", "task.image_size=30"],
        "task.image_size height 30": ["task.image_size=30"],
        "no class token": ["task.pool=class_token", "model.class_tokens=0"],
    }
    for said, words in cases.items():
        with pytest.raises(ConfigError, match=said):
            finetune(tmp_path / "runs", built_in, "bad", *words)
    (tmp_path / "sam.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        finetune(tmp_path / "runs", built_in, "bad", f"init_from={tmp_path / 'sam.pth'}")
    assert not (tmp_path / "runs").exists()
