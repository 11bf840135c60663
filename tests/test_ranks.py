"""Several ranks, with copies of the model or shards of it, see what one process sees; each goes on for the other."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.pack.image_folder import find_images
from data.pack.pack import pack
from mae.models.config import MAEConfig
from mae.models.vit import Encoder
from mae.run.checkpoint_files import checkpoint_path, read_own
from tests.processes import assert_same_run, command, losses, run

# The clipping is always at work: the norm of the gradients is between .3 and 2.
STEPS = ("experiment=digits_tiny", "precision=32-true", "max_steps=20", "val_every=7", "data.workers=0")
STEPS += ("global_batch=48", "model.depth=2", "model.decoder_depth=2")
STEPS += ("task.ema=0.99", "optim.grad_clip=0.1", "checkpoint.every_steps=7", "checkpoint.keep=9", "pictures_every=10")

MUON = ("optim=muon", "optim.muon_dtype=float32")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, built_in: Path, two_images: str) -> Path:
    runs = tmp_path_factory.mktemp("one")
    run(command(runs, built_in, *STEPS, two_images, "name=one"))
    return runs / "one"


def validation_images(folder: Path, count: int) -> str:
    """Returns the setting that validates on so many images: fewer than ranks, where there are three."""
    (folder / "in").mkdir()
    for number in range(count):
        Image.new("RGB", (32, 32), (90 * number, 50, 200)).save(folder / "in" / f"{number}.png")
    pack(find_images(folder / "in")[0], folder / "val", name="few", classes=[])
    return f"data.val_path={folder / 'val'}"


@pytest.fixture(scope="module")
def two_images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return validation_images(tmp_path_factory.mktemp("few"), 2)


def agree(one: Path, other: Path) -> None:
    """Compares the logged losses of all 20 steps to 1e-5, and the checkpoints of step 7 to 1e-6."""
    expected, got = losses(one), losses(other)
    assert len([key for key in expected if key[1] == "train/loss"]) == 20
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert float(got[key]) == pytest.approx(float(value), abs=1e-5), key
    same_contents(read_own(checkpoint_path(one, 7)), read_own(checkpoint_path(other, 7)))


def same_contents(one: dict, other: dict) -> None:
    """Two checkpoints have the same keys and, parameters, their average and optimiser state, the same values."""
    assert one.keys() == other.keys() and one["mae"] == other["mae"]
    weights, others = one["state_dict"], other["state_dict"]
    assert list(weights) == list(others)
    for name, value in weights.items():
        if name.endswith("qkv.bias"):  # the gradient of a key's bias is zero: Adam divides rounding by rounding
            value, others[name] = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (value, others[name]))
        assert torch.allclose(value, others[name], rtol=0, atol=1e-6), name
    (one_state,), (other_state,) = one["optimizer_states"], other["optimizer_states"]
    assert one_state["param_groups"] == other_state["param_groups"]
    assert one_state["state"].keys() == other_state["state"].keys()
    trained = {name for name in weights if name.startswith("model.") and not name.endswith("pos_embed")}
    assert {f"model.{name}" for name in one_state["state"]} == trained
    average = {name.removeprefix("average.") for name in weights if name.startswith("average.")}
    assert average == set(Encoder(MAEConfig.model_validate(one["mae"]["recipe"]["model"])).state_dict())
    for name, entry in one_state["state"].items():
        assert entry.keys() == other_state["state"][name].keys()
        for key, value in entry.items():
            assert torch.allclose(value, other_state["state"][name][key], rtol=0, atol=1e-6), (name, key)


def forget(folder: Path, after: int) -> None:
    """Sets the run back to when it had saved step `after`."""
    for path in (folder / "checkpoints").glob("step-*.ckpt"):
        if path > checkpoint_path(folder, after):
            path.unlink()
    (folder / "summary.json").unlink()


@pytest.fixture(scope="module")
def whole_validation(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    runs = tmp_path_factory.mktemp("one")
    run(command(runs, built_in, *STEPS, "name=one"))
    return runs / "one"


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_run_on_any_topology_has_the_losses_of_one_process(
    tmp_path: Path, built_in: Path, whole_validation: Path, ranks: int, strategy: str, accumulate: int
) -> None:
    words = ("name=many", f"micro_batch={48 // ranks // accumulate}", f"trainer.strategy={strategy}")
    run(command(tmp_path, built_in, *STEPS, *words, ranks=ranks))
    agree(whole_validation, tmp_path / "many")


@pytest.fixture(scope="module")
def whole_batch_with_muon(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    runs = tmp_path_factory.mktemp("muon")
    run(command(runs, built_in, *STEPS, *MUON, "name=one"))
    return runs / "one"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_run_with_muon_on_any_topology_has_the_losses_of_one_process(
    tmp_path: Path, built_in: Path, whole_batch_with_muon: Path, ranks: int, strategy: str
) -> None:
    words = ("name=many", f"micro_batch={48 // ranks // 2}", f"trainer.strategy={strategy}")
    run(command(tmp_path, built_in, *STEPS, *MUON, *words, ranks=ranks))
    agree(whole_batch_with_muon, tmp_path / "many")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "strategy"), [(1, "auto"), (3, "ddp"), (2, "fsdp")])
def test_run_with_muon_resumes_bit_for_bit(tmp_path: Path, built_in: Path, ranks: int, strategy: str) -> None:
    words = command(tmp_path, built_in, *STEPS, "optim=muon", f"trainer.strategy={strategy}", "name=run", ranks=ranks)
    run(words)
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    forget(tmp_path / "run", after=7)
    assert "step-00000007.ckpt" in run(words).replace("\n", "")
    assert_same_run(tmp_path / "run", whole)


@pytest.fixture(scope="module")
def whole_batch_of_50(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    runs = tmp_path_factory.mktemp("fifty")
    run(command(runs, built_in, *STEPS, "global_batch=50", "name=one"))
    return runs / "one"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "micro_batch"), [(3, 17), (4, 7)])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_run_whose_ranks_get_unequal_shares_has_the_losses_of_one_process(
    tmp_path: Path, built_in: Path, whole_batch_of_50: Path, ranks: int, strategy: str, micro_batch: int
) -> None:
    """50 images on three ranks are 16, 17 and 17; on four 12 or 13, in micro-batches of 6 or 7."""
    words = ("global_batch=50", "name=many", f"micro_batch={micro_batch}", f"trainer.strategy={strategy}")
    output = run(command(tmp_path, built_in, *STEPS, *words, ranks=ranks))
    assert f"50 over {ranks} ranks, in {2 if ranks == 4 else 1} x at most {micro_batch} on each" in output
    agree(whole_batch_of_50, tmp_path / "many")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_one_validation_image_on_several_ranks_has_the_loss_of_one_process(
    tmp_path: Path, built_in: Path, ranks: int, strategy: str
) -> None:
    """Ranks without a sample take part in the reduction, and in FSDP's forward passes."""
    few = validation_images(tmp_path, 1)
    run(command(tmp_path, built_in, *STEPS, few, "name=one"))
    words = ("name=many", f"micro_batch={48 // ranks}", f"trainer.strategy={strategy}")
    run(command(tmp_path, built_in, *STEPS, few, *words, ranks=ranks))
    agree(tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
def test_finetuning_validates_and_saves_the_same_average_under_ddp_and_fsdp(tmp_path: Path, built_in: Path) -> None:
    words = ("task=finetune", "optim=finetune", "precision=32-true", "data.workers=0", "task.ema=0.9")
    words += ("max_steps=8", "val_every=4", "checkpoint.every_steps=4", "model.depth=2", "optim.warmup_steps=2")
    for strategy in ("ddp", "fsdp"):
        own = (f"name={strategy}", f"trainer.strategy={strategy}", "micro_batch=32")
        run(command(tmp_path, built_in, *words, *own, ranks=2))
    expected, got = losses(tmp_path / "ddp"), losses(tmp_path / "fsdp")
    assert expected.keys() == got.keys() and ("8", "val/loss") in expected
    for key, value in expected.items():
        assert float(got[key]) == pytest.approx(float(value), abs=1e-5), key
    ddp, fsdp = (read_own(checkpoint_path(tmp_path / name, 8))["state_dict"] for name in ("ddp", "fsdp"))
    assert list(ddp) == list(fsdp)
    for name in (name for name in ddp if name.startswith("average.") and not name.endswith("qkv.bias")):
        assert torch.allclose(ddp[name], fsdp[name], rtol=0, atol=1e-5), name
        assert name.endswith("pos_embed") or not torch.equal(ddp[name], ddp[name.replace("average.", "model.")]), name


@pytest.mark.slow
def test_run_resumed_from_ddp_on_fsdp_and_on_one_process_has_the_same_losses(
    tmp_path: Path, built_in: Path, one_process: Path, two_images: str
) -> None:
    """Two ranks started by trainer.devices up to step 7, three ranks with shards of the model up to 14, then one."""
    folder = tmp_path / "elastic"
    words = ("name=elastic", *STEPS, two_images)
    output = run(command(tmp_path, built_in, *words, "trainer.devices=2"))
    assert "starting 2 ranks with torchrun" in output
    agree(one_process, folder)
    forget(folder, after=7)
    shards = ("micro_batch=8", "trainer.strategy=fsdp", "blocks.recompute=all")
    assert "step-00000007.ckpt" in run(command(tmp_path, built_in, *words, *shards, ranks=3)).replace("\n", "")
    agree(one_process, folder)
    forget(folder, after=14)
    assert "step-00000014.ckpt" in run(command(tmp_path, built_in, *words, "micro_batch=24")).replace("\n", "")
    agree(one_process, folder)


@pytest.mark.slow
def test_run_on_three_ranks_resumes_bit_equal(
    tmp_path: Path, built_in: Path, one_process: Path, two_images: str
) -> None:
    """Three summands have an order; where the gradients lie in DDP's buckets decides it."""
    words = command(tmp_path, built_in, *STEPS, two_images, "name=three", "micro_batch=8", ranks=3)
    run(words)
    agree(one_process, tmp_path / "three")
    whole = shutil.copytree(tmp_path / "three", tmp_path / "whole")
    forget(tmp_path / "three", after=14)
    run(words)
    assert_same_run(tmp_path / "three", whole)
