"""The run folder runs/NAME: which checkpoint to resume from, making the folder, environment.json."""

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mae.atomic import write_atomically
from mae.errors import CheckpointError, ConfigError
from mae.run.checkpoint_files import checkpoints, newest_valid, step_of, verify

PACKAGES = ("torch", "lightning", "timm", "numpy", "webdataset", "simplejpeg", "hydra-core")


def starting_point(run: Path, resume: str, overwrite: bool) -> Path | None:
    """Returns the checkpoint to resume from; None for a fresh start. Writes nothing.

    resume  "auto"   the newest valid checkpoint of this run
            "never"  none; an error if the run has checkpoints, unless `overwrite`
            a path   that checkpoint, or the newest of that run folder, unless this run has come further since

    Raises ConfigError if the run exists and must not, CheckpointError if a checkpoint is missing or damaged.
    """
    if resume == "never":
        if checkpoints(run) and not overwrite:
            raise ConfigError(
                f"resume=never, but {run} already holds the checkpoint {checkpoints(run)[0].name}: two runs would be "
                "mixed. Choose another name=, resume it with resume=auto, or delete it with overwrite=true"
            )
        return None
    if overwrite:
        raise ConfigError(f"overwrite=true deletes what {run} holds and goes with resume=never only")
    own = newest_valid(run)
    if resume == "auto":
        return own
    given = _given(Path(resume))
    if own is not None and step_of(own) > step_of(given):
        print(f"resume={resume}: this run has come further since, resuming from {own}", flush=True)
        return own
    return given


def _given(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"resume={path} does not exist. Use resume=auto, or the path of a checkpoint")
    if path.is_dir():
        newest = newest_valid(path)
        if newest is None:
            raise CheckpointError(f"resume={path} is a folder without checkpoints/step-*.ckpt")
        return newest
    verify(path)
    return path


def create_run_folder(run: Path, overwrite: bool) -> None:
    """Makes the run folder; called when all else has been checked. Raises ConfigError if it cannot be written."""
    try:
        if overwrite and run.exists():
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
        probe = run / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"the run folder {run} cannot be written ({error.strerror}). Choose another place with runs= or name="
        ) from error


def run_of(path: Path) -> Path | None:
    """Returns the run folder that `path` is or lies in; None if there is none."""
    return next((folder for folder in (path, *path.parents) if (folder / "config.yaml").is_file()), None)


def write_json(path: Path, contents: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2) + "\n")


def record_start(run: Path, step: int, ranks: int) -> None:
    """Writes environment.json: machine and versions of this start, and the list of all starts of the run."""
    path = run / "environment.json"
    starts = json.loads(path.read_text())["starts"] if path.is_file() else []
    starts.append(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "ranks": ranks,
            "command": sys.argv,
            "git": _git("rev-parse", "HEAD") or None,
            "git_modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        }
    )
    write_json(
        path,
        {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "packages": {name: version(name) for name in PACKAGES},
            "starts": starts,
        },
    )


def _git(*words: str) -> str:
    """Returns git's answer about this checkout; an empty string if there is no git or no repository."""
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
