"""Distillation through train.py: any teacher, exact resume, the same for any ranks, a cache that changes nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import mae
from mae.distill.student import SamStudent
from mae.distributed.launch import Topology
from mae.errors import ConfigError
from mae.export.write import export
from mae.formats.opened import open_weights
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.models.vit import Encoder
from mae.run.checkpoint_files import newest_valid, read_own
from mae.run.metrics import read_metrics
from mae.sam.config import SegmentConfig, build_segmenter
from mae.sam.encoder import SamConfig, SamEncoder
from tasks.distill import Distill
from tasks.plan import plan_only
from tasks.segment import initial_segmenter
from tasks.train import train
from tests.exports import own_checkpoint
from tests.masked_photos import shards_of_shapes
from tests.processes import (
    SMALL,
    assert_same_run,
    bit_equal,
    command,
    kill,
    losses,
    run,
    start,
    state,
    wait_for_checkpoint,
)
from tests.test_experiments import compose
from tests.test_ranks import forget

ONE = Topology(rank=0, ranks=1, devices=1, nodes=1)
STEPS = ("task=distill", "max_steps=6", "precision=32-true", "data.workers=0", "val_every=3", "micro_batch=32")
STEPS += ("task.mask_ratio=0.5", "task.mask_cell=2", "checkpoint.every_steps=3", "checkpoint.keep=9")
STORED = ("data.scale=[1,1]", "data.flip=false")  # no augmentation
SAM = SamConfig(image_size=(64, 64), width=48, depth=2, num_heads=3, window=2, global_blocks=(1,), out_channels=32)
SAM_STUDENT = ("task=distill", "task.student=sam", "task.window=2", "task.global_blocks=[1]", "model.image_size=64")
SAM_STUDENT += ("model.patch_size=16", "model.width=32", "model.depth=2", "model.num_heads=2", "precision=32-true")
SAM_STUDENT += ("data.workers=0", "global_batch=8", "max_steps=4", "val_every=2", "log_every=1", "trainer=cpu")
SAM_STUDENT += ("checkpoint.every_steps=2",)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a masked autoencoder with random weights, for images of 32 pixels in 4 x 4 patches."""
    return own_checkpoint(tmp_path_factory.mktemp("teacher"))[1]


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segment-anything .pth of an image encoder with random weights."""
    torch.manual_seed(1)
    encoder = SamEncoder(SAM)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.save({f"image_encoder.{name}": value for name, value in encoder.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of_shapes(tmp_path_factory.mktemp("shapes"))


def settings(runs: Path, root: Path, teacher: Path, *overrides: str):
    return compose(f"runs={runs}", f"data.root={root}", *SMALL, *STEPS, f"task.teacher={teacher}", *overrides)


def distilled(runs: Path, root: Path, teacher: Path, *overrides: str) -> Path:
    """A run in this process."""
    config = settings(runs, root, teacher, *overrides)
    torch.set_num_threads(1)
    train(config, ONE)
    return config.run


def sam_distilled(runs: Path, shapes: Path, teacher: Path, *overrides: str) -> Path:
    words = [f"runs={runs}", f"data.path={shapes}", *SAM_STUDENT, f"task.teacher={teacher}", *overrides]
    config = compose(*words)
    torch.set_num_threads(1)
    train(config, ONE)
    return config.run


# Teachers.


def foreign(kind: str, folder: Path) -> Path:
    """A teacher of 64 channels in each of the formats."""
    if kind == "classifier":
        model = mae.Classifier(mae.MAEConfig(image_size=32, patch_size=8, width=64, depth=1, num_heads=4), 3)
        run = {"step": 5, "recipe": {"model": model.config.model_dump(mode="json")}, "classes": list("abc")}
        weights = {f"model.{name}": value for name, value in model.state_dict().items()}
        torch.save({"mae": run, "state_dict": weights}, folder / "step-00000005.ckpt")
        return folder / "step-00000005.ckpt"
    if kind == "segment run":
        recipe = {"name": "segment", "image_size": 64, "window": 2, "global_blocks": [1], "out_channels": 64}
        config = MAEConfig(image_size=(64, 64), width=48, depth=2, num_heads=3)
        model = build_segmenter(config, SegmentConfig.model_validate(recipe), BlocksConfig())
        run = {"step": 5, "recipe": {"model": config.model_dump(mode="json"), "task": recipe}}
        weights = {f"model.{name}": value for name, value in model.state_dict().items()}
        torch.save({"mae": run, "state_dict": weights}, folder / "step-00000005.ckpt")
        return folder / "step-00000005.ckpt"
    pixio = {"class_tokens": 8, "positions": "learned"} if kind == "hf-pixio" else {}
    _, source = own_checkpoint(folder, **pixio)
    out = folder / {"facebook": "mae.pth", "timm": "timm.safetensors", "hf-vit": "folder", "hf-pixio": "folder"}[kind]
    export(source, kind, out)
    return out


@pytest.mark.parametrize("kind", ["facebook", "timm", "hf-vit", "hf-pixio", "classifier", "segment run", "sam"])
def test_encoder_of_any_format_is_a_teacher(tmp_path: Path, built_in: Path, sam: Path, kind: str) -> None:
    path = sam if kind == "sam" else foreign(kind, tmp_path)
    task = Distill(settings(tmp_path, built_in, path, "model.width=64", "model.num_heads=4"), ONE)
    module = task.module(task.model(None), task.recipe("32-true"))
    batch = next(iter(task.data.train_loader(lambda: 0)))
    loss = module.training_step(batch, 0)["loss"]
    loss.backward()
    assert 0 < float(loss.detach()) < 2 and module.teacher.width == (32 if kind == "sam" else 64)
    assert module.teacher.grid == (4, 4) and module.model.config.grid == (8, 8)
    # DDP waits for the gradient of every parameter.
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in module.parameters())
    assert not any("teacher" in name for name in module.state_dict())


# A run.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, built_in: Path, teacher: Path) -> Path:
    """Muon, an average, a masked student, online probes."""
    words = ("name=whole", "optim=muon", "task.ema=0.5", "online_probe.every=3", "online_probe.train_images=100")
    words += ("online_probe.test_images=50",)
    return distilled(tmp_path_factory.mktemp("runs"), built_in, teacher, *words)


def test_distilled_run_gives_the_average_of_the_students_encoder(finished: Path, capsys) -> None:
    contents = read_own(newest_valid(finished) or Path())
    weights = contents["state_dict"]
    encoder = mae.load(finished)
    assert type(encoder) is Encoder and (encoder.config.width, encoder.config.grid) == (32, (8, 8))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, weights[f"average.{name}"])
    raw = mae.load(finished, weights="raw")
    assert torch.equal(raw.blocks[0].mlp.fc1.weight, weights["model.blocks.0.mlp.fc1.weight"])
    assert not torch.equal(raw.blocks[0].mlp.fc1.weight, encoder.blocks[0].mlp.fc1.weight)
    assert "model.distillation_head.3.weight" in weights
    assert not any("teacher" in name for name in weights) and "teacher" in contents["mae"]


def test_distilled_run_logs_validation_probes_and_floors(finished: Path) -> None:
    rows = read_metrics(finished / "metrics.csv")
    assert [row["step"] for row in rows if "val/loss" in row] == ["3", "6"]
    probed = [row for row in rows if "knn/top1" in row]
    assert [row["step"] for row in probed] == ["3", "6"] and all("knn_average/top1" in row for row in probed)
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 < summary["floors"]["mean of each place"] < summary["floors"]["one token"] < 1
    assert summary["floor_images"] == 128 and (finished / "loss.png").is_file()
    derived = json.loads((finished / "derived.json").read_text())["model"]
    assert derived["model"].startswith("student of 32 x 1 blocks")
    assert "64 x 2 blocks at 32 x 32 px" in derived["teacher"]
    assert derived["tokens"].endswith("8 x 8 patches of 4 px here, 32 of them visible, in cells of 2 x 2")


def test_distilled_run_exports_and_starts_other_runs(finished: Path, tmp_path: Path, built_in: Path) -> None:
    export(finished, "timm", tmp_path / "student.safetensors")
    again = mae.load(tmp_path / "student.safetensors")
    assert bit_equal(dict(again.state_dict()), dict(mae.load(finished).state_dict()))
    words = ("name=again", f"init_from={finished}", "optim.base_lr=1e-12", "max_steps=1", "val_every=null")
    second = mae.load(distilled(tmp_path, built_in, finished, *words))  # its own teacher too
    expected = mae.load(finished).state_dict()
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in second.state_dict().items())


def test_student_starts_from_an_autoencoder_with_any_decoder(
    tmp_path: Path, built_in: Path, teacher: Path, capsys
) -> None:
    source, path = own_checkpoint(tmp_path, decoder_depth=2, decoder_width=16, decoder_num_heads=1)
    words = ("model.width=64", "model.depth=2", "model.num_heads=4", "model.patch_size=8", "task.mask_cell=1")
    config = settings(tmp_path, built_in, teacher, *words, f"init_from={path}")
    model = Distill(config, ONE).model(None)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert "init_from: left out: its decoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("task.teacher is not set: give the encoder to learn from", ["task.teacher=null"]),
        (
            "holds a plain encoder: set task.student=plain",
            ["task.student=sam", "task.mask_ratio=0", "task.mask_cell=1"],
        ),
        (
            "is for images of 3 channels, and data.mean and data.std have 1",
            ["data.mean=[0.3]", "data.std=[0.3]", "model.in_channels=1"],
        ),
        ("task.mask_cell=3: image_size height 32 is 8 patches, which cells of", ["task.mask_cell=3"]),
        (r"task.teacher_size=\[30, 30\] is no size for", ["task.teacher_size=30"]),
        (r"task.outputs=x keeps .* set data.scale=\[1,1\], or leave it out", ["task.outputs=x"]),
        ("optim.layer_decay=0.5 is for fine-tuning", ["optim.layer_decay=0.5"]),
    ],
    ids=str,
)
def test_conflicting_distill_settings_raise_config_error_and_leave_no_run(
    tmp_path: Path, built_in: Path, teacher: Path, said: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError, match=said):
        distilled(tmp_path / "runs", built_in, teacher, "name=bad", *words)
    assert not (tmp_path / "runs").exists()


def test_settings_that_would_have_no_effect_are_refused(tmp_path: Path, built_in: Path, teacher: Path) -> None:
    for words in (["task.mask_ratio=0"], ["task.window=7"], ["task.student=sam"]):
        with pytest.raises(ValueError, match=r"hides nothing|of a SAM-style student|hides patches"):
            settings(tmp_path, built_in, teacher, *words)


# Exactness.


@pytest.mark.slow
def test_killed_distillation_resumes_to_the_uninterrupted_run(tmp_path: Path, built_in: Path, teacher: Path) -> None:
    """Over the edge of an epoch, with tokens of the teacher kept from before the kill."""
    words = [*STORED, "max_steps=24", "task.ema=0.9", "optim=muon", "val_every=13", "checkpoint.every_steps=5"]
    distilled(tmp_path, built_in, teacher, *words, "name=whole")
    kept = [f"task.teacher={teacher}", f"task.outputs={tmp_path / 'kept'}"]
    line = command(tmp_path, built_in, *STEPS, *words, *kept, "name=killed")
    process = start(line)
    wait_for_checkpoint(process, tmp_path / "killed")
    kill(process)
    newest = newest_valid(tmp_path / "killed")
    assert newest is not None and newest.stem < "step-00000024"
    damaged = sorted((tmp_path / "kept").rglob("*.tokens"))[3]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run(line)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    _, other = own_checkpoint(tmp_path, depth=1)
    with pytest.raises(ConfigError, match=r"from another teacher: .*ckpt had the fingerprint \w{16}, and"):
        distilled(tmp_path, built_in, other, *words, "name=killed", "max_steps=30")
    moved = Path(shutil.copy(teacher, tmp_path / "step-00000700.ckpt"))  # the same weights at another place
    Distill(settings(tmp_path, built_in, moved, *words), ONE).refuse_settings(newest_valid(tmp_path / "killed"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_distillation_on_two_ranks_has_the_losses_of_one_process(
    tmp_path: Path, built_in: Path, teacher: Path, strategy: str
) -> None:
    """Each resumed halfway by the other number of ranks; unequal shares, accumulation, clipping, an average."""
    words = [*STEPS, f"task.teacher={teacher}", "global_batch=50", "micro_batch=17", "task.ema=0.9"]
    words += ["optim.grad_clip=0.1", "online_probe.every=3", "online_probe.train_images=50"]
    run(command(tmp_path, built_in, *words, "name=one"))
    several = [*words, "name=several", f"trainer.strategy={strategy}"]
    run(command(tmp_path, built_in, *several, ranks=2))
    assert_close(tmp_path / "one", tmp_path / "several")
    for name in ("one", "several"):
        forget(tmp_path / name, after=3)
    run(command(tmp_path, built_in, *words, "name=one", f"trainer.strategy={strategy}", ranks=2))
    run(command(tmp_path, built_in, *words, "name=several"))
    assert_close(tmp_path / "one", tmp_path / "several")
    assert state(tmp_path / "one")["model"].keys() == state(tmp_path / "several")["model"].keys()


def assert_close(one: Path, other: Path) -> None:
    expected, got = losses(one), losses(other)
    assert expected.keys() == got.keys() and ("6", "val/loss") in expected
    for key, value in expected.items():
        assert float(got[key]) == pytest.approx(float(value), abs=2e-5), key


# SAM style.


@pytest.fixture(scope="module")
def sam_run(tmp_path_factory: pytest.TempPathFactory, shapes_folder: Path, sam: Path) -> Path:
    return sam_distilled(tmp_path_factory.mktemp("sam-runs"), shapes_folder, sam, "name=sam", "task.ema=0.5")


def test_sam_student_is_loaded_exported_and_segmented_with(sam_run: Path, tmp_path: Path) -> None:
    student = mae.load_sam(sam_run)
    assert student.config == SAM.model_copy(update={"width": 32, "num_heads": 2})
    averaged = read_own(newest_valid(sam_run) or Path())["state_dict"]["average.neck.0.weight"]
    assert torch.equal(student.neck[0].weight, averaged)
    assert open_weights(sam_run).kind == "sam"
    export(sam_run, "segment-anything", tmp_path / "sam.pth")
    assert bit_equal(dict(mae.load_sam(tmp_path / "sam.pth").state_dict()), dict(student.state_dict()))
    fields = {"name": "segment", "image_size": 64, "window": 2, "global_blocks": [1], "out_channels": 32}
    config = MAEConfig(image_size=(64, 64), width=32, depth=2, num_heads=2)
    segmenter = initial_segmenter(config, SegmentConfig.model_validate(fields), BlocksConfig(), str(sam_run))
    assert bit_equal(dict(segmenter.encoder.state_dict()), dict(student.state_dict()))


def test_sam_student_resumes_and_starts_from_other_encoders(
    sam_run: Path, tmp_path: Path, shapes_folder: Path, sam: Path
) -> None:
    source, path = own_checkpoint(tmp_path, image_size=64, patch_size=16, width=32, depth=2, num_heads=2)
    words = (f"init_from={path}", "name=warm")
    config = compose(f"runs={tmp_path}", f"data.path={shapes_folder}", *SAM_STUDENT, f"task.teacher={sam}", *words)
    model = Distill(config, ONE).model(None)
    assert isinstance(model, SamStudent)
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    with pytest.raises(ConfigError, match="another encoder: width 48 there, 32 here"):
        sam_distilled(tmp_path, shapes_folder, sam, f"init_from={sam}", "name=other")
    shutil.copytree(sam_run, tmp_path / "again")
    forget(tmp_path / "again", after=2)
    assert_same_run(sam_distilled(tmp_path, shapes_folder, sam, "name=again", "task.ema=0.5"), sam_run)
    with pytest.raises(ConfigError, match="measures plain encoders"):
        sam_distilled(tmp_path, shapes_folder, sam, "online_probe.every=2", "name=other")


@pytest.mark.slow
def test_sam_students_embedding_converges_to_that_of_a_random_teacher(
    tmp_path: Path, shapes_folder: Path, sam: Path
) -> None:
    """Tokens of the teacher kept on disk; the correlation with its embedding rises, the loss falls below the floors."""
    words = ("max_steps=400", "val_every=100", "data.flip=false", f"task.outputs={tmp_path / 'kept'}")
    words += ("optim.base_lr=6.4e-2", "optim.warmup_steps=20")
    folder = sam_distilled(tmp_path, shapes_folder, sam, "name=long", *words)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val/loss"] < 0.9 * min(summary["floors"].values())
    assert len(list((tmp_path / "kept").rglob("*.tokens"))) == 24


@pytest.mark.slow
def test_student_learns_more_than_a_constant_on_photographs(tmp_path: Path, real_images: Path, teacher: Path) -> None:
    words = ["data=shards", f"data.path={real_images / 'grocery'}", "model.patch_size=8", "max_steps=300"]
    words += ["task.mask_ratio=0", "task.mask_cell=1", "val_every=300", "optim=muon", "micro_batch=null"]
    words += ["checkpoint.every_steps=300", "log_every=50"]
    folder = distilled(tmp_path, tmp_path, teacher, "name=photographs", *words)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val/loss"] < 0.5 * min(summary["floors"].values())


# The plan.


def test_plan_counts_the_teacher_whole_on_every_device(tmp_path: Path, built_in: Path, teacher: Path) -> None:
    file = tmp_path / "plan.json"
    words = ("plan.gpu=a100-80", "plan.gpus=2", "plan.samples=1000", f"plan.json={file}", "plan.show=true")
    plan_only(settings(tmp_path, built_in, teacher, *words, "task.ema=0.9"))
    plan = json.loads(file.read_text())
    model = Encoder(mae.load(teacher).config)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert plan["work"]["parameters"]["teacher (frozen)"] == size
    assert [layout["frozen"] for layout in plan["layouts"]] == [4 * size] * 4
    task = Distill(settings(tmp_path, built_in, teacher), ONE)
    student = task.student()
    own = sum(parameter.nbytes for parameter in student.parameters())
    assert plan["layouts"][0]["weights"] == plan["layouts"][0]["average"] == own
    assert plan["work"]["parameters"]["head"] == sum(p.numel() for p in student.distillation_head.parameters())
    assert plan["work"]["kept"]["flops"] == pytest.approx(plan["work"]["executed"], rel=0.02)
    assert plan["work"]["kept"]["flops"] > plan["work"]["flops"] * 0.9
