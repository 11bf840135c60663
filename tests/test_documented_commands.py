"""Every command of the README and of docs/ is one that the programs accept, and, where it can be, one that runs."""

import argparse
import importlib
import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.distributed.run import get_args_parser as torchrun_parser

from tasks.evaluate import EvalConfig
from tasks.search.config import SweepConfig
from tasks.task import read_settings
from tests.conftest import ROOT
from tests.documentation import PAGES, Command, commands
from tests.masked_photos import shards_of_shapes, write_coco
from tests.processes import finish, start
from tests.test_experiments import SEGMENT

ALL = [command for page in PAGES for command in commands(page)]
PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "train.py": read_settings,
    "eval.py": lambda raw: EvalConfig.model_validate(OmegaConf.to_container(raw, resolve=True)),
    "sweep.py": lambda raw: SweepConfig.model_validate(OmegaConf.to_container(raw, resolve=True)),
}
PYTHON = ("python",)
SUGGESTED = {"experiment=photos", "experiment=further"}  # recipes that documented commands with suggest=true write

# What makes a command of any size one of seconds.
TINY = ["model.width=192", "model.depth=2", "model.num_heads=3", "model.image_size=32", "model.patch_size=8"]
TINY += ["model.decoder_width=32", "model.decoder_depth=1", "model.decoder_num_heads=2"]
SAM_STUDENT = ["task.window=2", "task.global_blocks=[1]"]
OWN = ["experiment=digits_tiny", "data=shards", "data.path=SHARDS", "name=NAME"]
SHORT = ["epochs=1", "max_steps=2", "global_batch=8", "micro_batch=4", "val_every=2", "data.workers=0", "trainer=cpu"]


@pytest.mark.parametrize("command", ALL, ids=[command.place for command in ALL])
def test_documented_command_is_accepted_by_its_program(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command.words, command.needs, monkeypatch)


def test_most_documented_commands_are_run_and_launchers_say_what_they_need() -> None:
    assert len(ALL) > 50
    assert all(command.needs for command in ALL if command.words[0] in ("torchrun", "srun", "sbatch", "kubectl"))
    assert sum(not command.needs for command in ALL) > len(ALL) / 2


def check(words: list[str], needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless the program is one of ours, or a launcher of it, and takes these words."""
    program, *rest = words
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "source":
        assert rest == [".venv/bin/activate"]  # as the Makefile creates it
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {extra for given in re.findall(r"\[(.+?)\]", rest[-1]) for extra in given.split(",")} <= extras.keys()
    elif program == "torchrun":
        given = torchrun_parser().parse_args(rest)
        check_program(given.training_script, given.training_script_args)
    elif program == "sbatch" and "--wrap" in rest:
        wrapped = rest[rest.index("--wrap") + 1].replace("$SLURM_ARRAY_TASK_ID", "1")
        check(shlex.split(wrapped), needs, monkeypatch)
    elif program == "sbatch":
        script, *overrides = [word for word in rest if not word.startswith("--")]
        (started,) = {program for program in PROGRAMS if f" {program} " in (ROOT / script).read_text()}
        check_program(started, overrides)
    elif program in PYTHON and rest[0] == "-m":
        assert needs or rest[1] != "benchmarks.gpu" or "--small" in rest, "let the line end in `# needs a GPU`"
        check_module(rest[1], rest[2:], monkeypatch)
    elif program in PYTHON:
        check_program(rest[0], rest[1:])
    else:
        assert needs, f"no test knows what {program} is: let the line end in `# needs …`"


def check_program(program: str, words: list[str]) -> list[Any]:
    """Validates the settings that a Hydra program gets: several of a multirun, none where they lie elsewhere."""
    if {"--config-dir", "--help", "-sc"} & set(words):
        return []
    if "--cfg" in words:
        words = [word for word in words if word != "job"]
    words = ["experiment=digits_tiny" if word in SUGGESTED else word for word in words]
    words = [f"{word[:-5]}.show=true" if word in ("plan=true", "suggest=true") else word for word in words]
    parsed = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
    assert {"-m", "--multirun"} & set(words) or not any(override.is_sweep_override() for override in parsed)
    choices = [_choices(override) for override in parsed]
    name, found = program.removesuffix(".py"), []
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for overrides in itertools.product(*choices):
            composed = hydra.compose(name, overrides=list(overrides), return_hydra_config=True)
            settings = composed.sweep if name == "sweep" else OmegaConf.masked_copy(composed, set(composed) - {"hydra"})  # pyright: ignore
            found.append(PROGRAMS[program](settings))
    return found


def _choices(override: Override) -> list[str]:
    """The settings that the runs of a multirun get in its place; itself where it is one."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]


def check_module(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless the command line of `python -m NAME` parses; nothing of it is done."""

    class Parsed(Exception):
        pass

    def parse_only(parser: argparse.ArgumentParser, real: Callable[..., Any], *words: Any) -> None:
        real(parser, *words)
        raise Parsed

    for method in ("parse_args", "parse_intermixed_args"):
        real = getattr(argparse.ArgumentParser, method)
        monkeypatch.setattr(argparse.ArgumentParser, method, partialmethod(parse_only, real))
    package = importlib.util.find_spec(f"{name}.__main__") if (ROOT / name.replace(".", "/")).is_dir() else None
    module = importlib.import_module(f"{name}.__main__" if package else name)
    try:
        module.main(words)
    except Parsed:
        return
    except SystemExit as end:  # of --list and --help
        assert not end.code
        return
    pytest.fail(f"python -m {name} has parsed its words in another way, and done them")


def run(folder: Path, words: list[str], settings: dict[str, str]) -> None:
    """`python WORDS…` in a folder, with these environment variables; it has to end with exit code 0."""
    finish(start([sys.executable, *words], folder, **settings))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout of somebody who has photographs, shards and a few runs."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("train.py", "eval.py", "sweep.py", "conf", "docs", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    for label, image in enumerate(load_sample_images().images):
        (folder / "PHOTOS" / "ab"[label]).mkdir(parents=True)
        for number in range(60):
            crop = Image.fromarray(image[number * 5 :][:64, number * 9 :][:, :64])
            crop.save(folder / "PHOTOS" / "ab"[label] / f"{number}.jpg")
    run(folder, ["-m", "data.pack", "PHOTOS", "SHARDS", "--val", "0.25", "--jobs", "1"], {})
    for name in ("datasets/imagenet", "datasets/cifar10", "datasets/scans", "grocery"):
        shutil.copytree(folder / "SHARDS", folder / name)
    shards_of_shapes(folder / "coco_sa1b")
    for part in ("train2017", "val2017"):
        write_coco(folder / "COCO" / part, folder / "COCO" / "annotations" / f"instances_{part}.json", 12)
    run(folder, ["train.py", *OWN, *TINY, *SHORT], {})
    for name in ("OTHER", "photos2", "cifar10_tiny"):
        shutil.copytree(folder / "runs" / "NAME", folder / "runs" / name)
    for words in (["experiment=digits_tiny"], ["experiment=sa1b_segment_base", "data.path=coco_sa1b"]):
        run(folder, reduced(["train.py", *words], folder), {})
    run(folder, ["-m", "mae.export", "runs/NAME", "--to", "facebook", "--image-size", "64", "--out", "encoder.pth"], {})
    (folder / "FOLDER" / "sweep").mkdir(parents=True)
    shutil.copy(ROOT / "conf" / "sweep" / "lr_mask.yaml", folder / "FOLDER" / "sweep" / "mine.yaml")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_of_a_page_run_in_their_order(page: Path, checkout: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkout, tmp_path / "checkout", symlinks=True))
    for command in commands(page):
        if command.words[0] == "make":
            for words in made_by(command.words[1]):
                run(folder, reduced(words, folder), {})
        elif command.words[0] in PYTHON and not command.needs:
            run(folder, reduced(command.words[1:], folder), {"WANDB_MODE": "offline"} | command.settings)


def made_by(target: str) -> list[list[str]]:
    """Returns the commands of `make train`; none of the targets that install, test and clean: they would run this, or
    leave it nothing to run.
    """
    if target != "train":
        return []
    printed = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/installed", "--assume-old=install", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith(".venv/bin/python")]


def reduced(words: list[str], checkout: Path) -> list[str]:
    """Returns the same program at the size of a test."""
    program, *overrides = words
    if {"--help", "--cfg", "plan=true", "suggest=true"} & set(words):
        return words
    if program == "train.py":
        task = check_program(program, overrides)[0].task
        own = SEGMENT if task.name == "segment" else SAM_STUDENT if getattr(task, "student", None) == "sam" else []
        sides = [word.removeprefix("model.image_size=") for word in words if word.startswith("model.image_size=")]
        larger = [
            f"model.image_size={int(side) // 7 // 8 * 8}" for side in sides if side.isdecimal() and int(side) > 224
        ]
        return [*words, *TINY, *SHORT, *larger, *own]
    if program == "eval.py":
        probe = next((word.removeprefix("probe=") for word in words if word.startswith("probe=")), "suite")
        smaller = {"suite": ["probe.attentive.steps=20"], "attentive": ["probe.steps=20"]}
        return [*words, *smaller.get(probe, [])]
    if program == "sweep.py":
        settings = ["experiment=digits_tiny", f"data.root={checkout / 'datasets'}", *TINY, *SHORT]
        quoted = ",".join(f"'{setting}'" for setting in settings)
        return [*words, f"sweep.settings=[{quoted}]", "sweep.n_trials=2", "sweep.prune_by=null"]
    return words
