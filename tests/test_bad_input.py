"""Wrong input: one readable sentence, exit code 2, nothing left behind."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

import mae
import train
from tasks.cli import run_program
from tests.conftest import ROOT
from tests.processes import SMALL, completed


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that can be wrong with files."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "textual").mkdir()
    (folder / "note.txt").write_text("no image")
    with tarfile.open(folder / "textual" / "text.tar", "w") as tar:
        tar.add(folder / "note.txt", "note.txt")
    (folder / "cut").mkdir()
    (folder / "large.jpg").write_bytes(bytes(100_000))
    with tarfile.open(folder / "cut" / "cut.tar", "w") as tar:
        tar.add(folder / "large.jpg", "large.jpg")
    whole = (folder / "cut" / "cut.tar").read_bytes()
    (folder / "cut" / "cut.tar").write_bytes(whole[:50_000])
    (folder / "packed.tar.gz").write_bytes(b"\x1f\x8b")
    (folder / "garbage.ckpt").write_bytes(b"garbage" * 1000)
    (folder / "file").write_text("a file where a folder is wanted")
    model = mae.MaskedAutoencoder(mae.MAEConfig(image_size=32, patch_size=4, width=192, depth=1, num_heads=3))
    torch.save({"model": model.state_dict()}, folder / "other.pth")
    torch.save({"mae": {"step": 1, "recipe": {"precision": "32-true", "model": {"width": 192}}}}, folder / "other.ckpt")
    return folder


OWN = ["experiment=digits_tiny"]  # data of one's own need a recipe
CASES = {
    "unknown key": (["foo=1"], "unknown setting foo: --cfg job lists"),
    "misspelt key": (["global_btach=1"], "unknown setting global_btach: did you mean global_batch?"),
    "own data without a recipe": (
        ["data.path={wrong}/cut"],
        "suggest=true suggest.hours=8` writes one for these images, this machine and 8 hours; or choose one of "
        "conf/experiment. experiment=digits_tiny resumes",
    ),
    "distillation of own data without a recipe": (
        ["task=distill", "task.teacher=x", "data.path={wrong}/cut"],
        "Add experiment=distill_small (ViT-S at 224 pixels)",
    ),
    "group set to null": (["model=null"], "model is left out, and cannot be: set model= to one of mae, vit_1b"),
    "folder beyond ASCII": ([*OWN, "data.path=数据/a=b"], "数据/a=b does not exist"),
    "accelerator of nobody": (["trainer.accelerator=foo"], "Lightning refuses trainer.accelerator=foo"),
    "no GPU": (["trainer.accelerator=cuda"], "torch finds no GPU"),
    "unknown nested key": (["+model.foo=1"], "unknown setting model.foo: model has class_tokens, decoder"),
    "unknown task": (["task.name=foo"], "task.name=foo is none of pretrain, finetune, distill, segment"),
    "setting of a task": (
        ["task=finetune", "task.drop_path=2"],
        "error: task.drop_path=2: input should be less than 1",
    ),
    "wrong type": (["global_batch=many"], "global_batch='many'"),
    "mask ratio 0": (["model.mask_ratio=0"], "mask_ratio=0: input should be greater than 0"),
    "mask ratio 1": (["model.mask_ratio=1"], "mask_ratio=1: input should be less than 1"),
    "mask ratio above": (["model.mask_ratio=1.5"], "mask_ratio=1.5"),
    "mask ratio below": (["model.mask_ratio=-0.1"], "mask_ratio=-0.1"),
    "nothing visible": (["model.mask_ratio=0.999"], "leaves 0 of 64 patches visible"),
    "image size": (["model.image_size=30"], "not a multiple of patch_size=4"),
    "batch does not hold whole units": (["global_batch=63", "data.views_per_image=2"], "have to be multiples of 2"),
    "batch above data": (["global_batch=5000"], "1438 training samples"),
    "no such experiment": (["experiment=nonsense"], "digits_tiny"),
    "missing folder": ([*OWN, "data.path={wrong}/absent"], "absent does not exist"),
    "empty folder": ([*OWN, "data.path={wrong}/empty"], "holds no shard"),
    "tar without images": ([*OWN, "data.path={wrong}/textual"], "holds no image"),
    "truncated tar": ([*OWN, "data.path={wrong}/cut"], "is truncated"),
    "compressed tar": ([*OWN, "data.path={wrong}/packed.tar.gz"], "--unpack"),
    "resume as a switch": (["resume=true"], "resume: true is none of auto"),
    "missing checkpoint": (["resume={wrong}/absent.ckpt"], "does not exist"),
    "corrupt checkpoint": (["resume={wrong}/garbage.ckpt"], "not a whole checkpoint"),
    "foreign checkpoint": (["resume={wrong}/other.pth"], "init_from="),
    "other architecture": (["resume={wrong}/other.ckpt"], "model.width (192 in the checkpoint, 32 now)"),
    "warm start of another architecture": (["init_from={wrong}/other.pth"], "another architecture"),
    "missing warm start": (["init_from={wrong}/absent.pth"], "does not exist"),
    "run folder cannot be written": (["runs={wrong}/file"], "cannot be written"),
    "ranks in a multirun": (["hydra.mode=MULTIRUN", "trainer.devices=2"], "in a multirun"),
    "half precision of shards": (
        ["precision=16-mixed", "trainer.strategy=fsdp"],
        "not available with trainer.strategy=fsdp",
    ),
    "recompute": (["blocks.recompute=often"], "recompute=often is none of"),
    "overwrite without never": (["overwrite=true"], "resume=never"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_setting_prints_one_error_line_and_exits_with_2(
    case: str, wrong: Path, built_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    overrides, said = CASES[case]
    words = [word.format(wrong=wrong) for word in overrides]
    common = [f"runs={tmp_path / 'runs'}", f"data.root={built_in}", "name=bad", "data.workers=0", *SMALL]
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # Hydra sets it
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # run_program sets it: undone after the test
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)  # a multirun writes its multirun.yaml below the current folder
    monkeypatch.setattr(sys, "argv", ["train.py", *common, *words])
    with pytest.raises(SystemExit) as exit:
        run_program(train.main)
    stderr = capfd.readouterr().err.splitlines()
    errors = [line for line in stderr if line.startswith("error: ")]
    assert exit.value.code == 2
    assert len(errors) == 1 and said in errors[0], stderr
    assert not any("Traceback" in line for line in stderr)
    assert not (tmp_path / "runs").exists()


def test_train_process_exits_with_2_without_a_traceback(tmp_path: Path) -> None:
    words = [sys.executable, "train.py", f"runs={tmp_path}/runs", "model.mask_ratio=2"]
    plain = completed(words)
    assert plain.returncode == 2
    assert plain.stderr.splitlines() == ["error: model.mask_ratio=2: input should be less than 1"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_train_process_prints_a_traceback_with_hydra_full_error(tmp_path: Path) -> None:
    words = ["env", "HYDRA_FULL_ERROR=1", sys.executable, "train.py", f"runs={tmp_path}/runs", "model.mask_ratio=2"]
    full = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert full.returncode != 0 and "Traceback" in full.stderr
    assert not (tmp_path / "runs").exists()
