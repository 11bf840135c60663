"""The end of a run: what is noted about it, and which commands it names to go on."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from data.pack.__main__ import main as pack
from mae.distributed.launch import Topology
from mae.report.summary import interpreter, remarks
from tasks.task import task_class
from tasks.train import train
from tests.conftest import ROOT
from tests.test_documented_commands import check_module, check_program
from tests.test_experiments import REDUCED, compose
from tests.test_pack import image

ALONE = Topology(rank=0, ranks=1, devices=1, nodes=1)


def test_closing_lines_name_commands_that_are_accepted_with_quoted_paths_and_this_python(
    tmp_path: Path, built_in: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*REDUCED, f"runs='{tmp_path / 'my runs'}'", f"data.root={built_in}", "model.image_size=32"]
    train(compose(*words, "model.patch_size=8", "name=first"), ALONE)
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line.strip())
    run = tmp_path / "my runs" / "first"
    assert {"loss", "pictures", "report", "demo", "evaluate", "export"} <= lines.keys()
    assert all((ROOT / path).is_file() for path in lines["pictures"].split(", "))
    for label in ("report", "demo", "evaluate", "export"):
        python, *rest = shlex.split(lines[label])
        assert shutil.which(python) == sys.executable or (Path.cwd() / python).samefile(sys.executable)
        assert any(str(run) in word for word in rest)
        if rest[0] == "-m":
            with monkeypatch.context() as patch:
                check_module(rest[1], rest[2:], patch)
        else:
            check_program(rest[0], rest[1:])


def next_steps(folder: Path, *words: str) -> dict[str, str]:
    data = ["data=shards", f"data.path={folder}", "global_batch=2", "model.image_size=16", "model.patch_size=8"]
    config = compose(*data, f"runs={folder.parent / 'runs'}", *words)
    return task_class(config.task.name)(config, ALONE).next_steps()


def test_next_steps_leave_out_what_does_not_work_for_the_data(tmp_path: Path) -> None:
    for number in range(8):
        image(tmp_path / "flat" / f"{number}.png", number)
        image(tmp_path / "classes" / "ab"[number % 2] / f"{number}.png", number)
    for source in ("flat", "classes"):
        pack([str(tmp_path / source), str(tmp_path / "packed" / source / "train"), "--jobs", "1"])
        shutil.copytree(tmp_path / "packed" / source / "train", tmp_path / "packed" / f"{source}2" / "train")
        shutil.copytree(tmp_path / "packed" / source / "train", tmp_path / "packed" / f"{source}2" / "val")
    packed = tmp_path / "packed"
    assert next_steps(packed / "classes2")["evaluate"].endswith("probe=suite")
    assert next_steps(packed / "flat2")["evaluate"].endswith("probe=reconstruct")
    assert "evaluate" not in next_steps(packed / "classes")
    assert "evaluate" not in next_steps(packed / "classes2", "data.mode=stream", "data.samples=8")
    grey = ["model.in_channels=2", "data.mean=[0.5,0.5]", "data.std=[0.5,0.5]"]
    assert "demo" in next_steps(packed / "flat") and "demo" not in next_steps(packed / "flat", *grey)
    finetuned = next_steps(packed / "classes2", "task=finetune", "optim=finetune")
    assert finetuned["evaluate"].endswith("probe=classify")
    (packed / "runs" / "digits_tiny" / "export").mkdir(parents=True)
    (packed / "runs" / "digits_tiny" / "export" / "encoder.safetensors").touch()
    assert next_steps(packed / "flat")["export"].endswith("--overwrite")


def test_falling_rank_high_loss_and_slow_online_probe_are_noted() -> None:
    good = {
        "val/loss": {9: 0.5},
        "train/loss": {9: 0.9},
        "rank/rankme": {3: 20.0, 9: 19.0},
        "perf/probe_share": {9: 0.1},
    }
    floors = {"predict 0": 0.9, "interpolation": 0.6}
    assert remarks(good, floors) == remarks({}, floors) == remarks({"val/loss": {9: 0.7}}, {}) == []
    bad = {"val/loss": {3: 0.5, 9: 0.7}, "rank/rankme": {3: 20.0, 9: 17.0}, "perf/probe_share": {3: 0.1, 9: 0.25}}
    loss, rank, probe = remarks(bad, floors)
    assert loss.startswith("val/loss ended at 0.7000, above the 0.6000 of interpolation")
    assert rank.startswith("RankMe fell from 20.0 at step 3 to 17.0") and probe.startswith("the online probe took 25%")
    assert "train/loss" in remarks({"train/loss": {9: 0.7}}, floors)[0]


def test_interpreter_is_named_as_it_is_called_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("on path", "below/.venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "python").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "on path"))
    monkeypatch.chdir(tmp_path / "below")
    for executable, called in (
        (tmp_path / "on path" / "python", "python"),
        (tmp_path / "below" / ".venv" / "bin" / "python", ".venv/bin/python"),
        (tmp_path / "my tools" / "python", f"'{tmp_path}/my tools/python'"),
    ):
        monkeypatch.setattr(sys, "executable", str(executable))
        assert interpreter() == called
