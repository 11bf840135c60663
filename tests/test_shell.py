"""What the programs say of themselves to somebody at a shell, and how soon."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import lightning.pytorch as pl
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from tasks.errors import readable_errors
from tests.conftest import ROOT
from tests.processes import command, run
from train import prepare

GROUPS = {
    "train": ("experiment", "task", "model", "data", "optim", "trainer", "logger", "launcher"),
    "eval": ("probe",),
    "sweep": ("sweep",),
}


def ask(program: str, *words: str, **environment: str) -> str:
    """Returns what the program prints; fails if it loads torch for it, which takes seconds."""
    command = [sys.executable, "-X", "importtime", f"{program}.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\| +(torch|lightning|optuna)$", done.stderr, re.MULTILINE)
    return done.stdout


@pytest.fixture(scope="module", params=GROUPS)
def help_of(request: pytest.FixtureRequest) -> tuple[str, dict[str, str]]:
    """A program and the parts of its --help by their headings."""
    parts = re.split(r"^(\w[\w ]+)\n", ask(request.param, "--help"), flags=re.MULTILINE)
    return request.param, dict(zip(parts[1::2], parts[2::2], strict=True))


def composed(program: str, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose(program, overrides=list(overrides))


def test_help_lists_the_options_of_each_group(help_of: tuple[str, dict[str, str]]) -> None:
    program, parts = help_of
    shown: dict[str, set[str]] = {}
    for line in parts["Groups of settings"].splitlines():
        words = line.split()
        if line[2:3].strip():  # the name of a group, else what it goes on with
            shown[words.pop(0)] = options = set()
        options |= set(re.findall(r"\w+", " ".join(words)))
    assert tuple(shown) == GROUPS[program]
    for group, words in shown.items():
        assert {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} <= words, group


def test_help_names_settings_that_exist(help_of: tuple[str, dict[str, str]]) -> None:
    program, parts = help_of
    config = composed(program, *(["probe=linear"] if program == "eval" else []))
    named = re.findall(r"(?<!-)\b([a-z][\w.]+)=", parts["Settings that are changed most"])
    assert len(named) >= 7
    for name in named:
        node, _, key = name.rpartition(".")
        assert key in (OmegaConf.select(config, node) if node else config).keys(), name  # noqa: SIM118 (may be ???)


def test_help_has_three_examples_that_compose(help_of: tuple[str, dict[str, str]]) -> None:
    program, parts = help_of
    examples = [shlex.split(line) for line in parts["Examples"].splitlines() if line.strip()]
    assert len(examples) == 3
    for words in examples:
        overrides = words[words.index(f"{program}.py") + 1 :]
        if "--config-dir" not in overrides:
            composed(program, *(prepare(overrides) if program == "train" else overrides))


@pytest.mark.parametrize(
    ("typed", "completed"),
    {
        "a recipe": ("train.py experiment=cifar10_f", "experiment=cifar10_finetune"),
        "a setting": ("train.py model.mask_r", "model.mask_ratio="),
        "a probe": ("eval.py checkpoint=runs/x probe=lin", "probe=linear"),
    }.values(),
)
def test_shell_completion_offers_recipes_settings_and_probes(typed: str, completed: str) -> None:
    line = f"python {typed}"
    program = typed.partition(".")[0]
    assert completed in ask(program, "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line))).split()


def test_gpu_out_of_memory_exits_with_2_and_suggests_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. In training lower micro_batch")


def test_lightnings_hint_about_unused_srun_is_not_shown(
    tmp_path: Path, built_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    said = run(command(tmp_path / "runs", built_in, "max_steps=1", "val_every=null", "data.workers=0", "name=login"))
    assert "step 1/1" in said and "srun" not in said
    pl.Trainer(accelerator="cpu", logger=False, max_steps=1)  # in tests too, where warnings are errors
