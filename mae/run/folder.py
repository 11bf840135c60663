"""The run folder runs/NAME: which checkpoint to resume from, making and clearing the folder, environment.json."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from mae.atomic import write_atomically
from mae.distributed.rank_zero import say
from mae.distributed.restarts import continues, is_counted_restart, launch_names
from mae.errors import CheckpointError, ConfigError
from mae.run.checkpoint_files import checkpoints, newest_valid, set_aside, step_of, verify
from mae.run.lease import NAME as LEASE

PACKAGES = ("torch", "lightning", "timm", "numpy", "webdataset", "simplejpeg", "hydra-core")


def starting_point(run: Path, resume: str, overwrite: bool) -> Path | None:
    """Returns the checkpoint to resume from; None for a fresh start. Writes nothing.

    resume  "auto"   the newest valid checkpoint of this run
            "never"  none; an error if the run has checkpoints, unless `overwrite`
            a path   that checkpoint, or the newest of that run folder, unless this run has come further since

    A process that torchrun, SLURM or Kubernetes has started again goes on with what its own launch has begun: "never"
    and `overwrite` count for the first start of a launch.

    Raises ConfigError if the run exists and must not, or nothing says whether this launch has begun it; CheckpointError
    if a checkpoint is missing or damaged.
    """
    if resume == "never" and (launch := own_launch(run)):
        say(f"{run} was begun by this very launch ({launch}): it resumes; resume=never counts for its first start")
        resume, overwrite = "auto", False
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
        newest = newest_valid(path.parent if path.name == "checkpoints" else path)
        if newest is None:
            raise CheckpointError(f"resume={path} is a folder without checkpoints/step-*.ckpt")
        return newest
    verify(path)
    return path


def own_launch(run: Path) -> str | None:
    """Returns by what this process is known as a restart of the launch that began the run; None if it is none."""
    environment = run / "environment.json"
    if (recorded := read_mapping(environment)) is not None:
        return continues(recorded.get("begun_by", {}))
    # Damaged: a restart may well have begun it, and to resume loses nothing.
    restarted = environment.exists() and is_counted_restart()
    return "a restart, and environment.json cannot be read" if restarted else None


# Files of a run and its evaluations, sub-folder by sub-folder. Exports are not among them.
PROBES = (
    *("knn", "linear", "attentive", "reconstruct", "classify", "neighbours", "suite", "segment", "relevance"),
    *("embeddings", "dense", "losses"),
)
WRITTEN = {
    "": (
        *("config.yaml", "derived.json", "environment.json", "summary.json", "metrics.csv", "bad_samples.jsonl"),
        *("loss.png", "trace.json", "report.html", "wandb_id.txt", "mlflow_id.txt", "mlflow.db", "mlflow.db-*", LEASE),
        "ended.json",
    ),
    "checkpoints": ("step-????????.ckpt",),
    "reconstructions": ("step-????????.png",),
    "hangs": ("step-????????-rank-?????.txt",),
    "tensorboard": ("events.out.tfevents.*", "hparams.yaml"),
    "wandb": ("run-*", "offline-run-*", "latest-run", "debug*.log", "artifacts", "wandb-resume.json"),
    "eval": (
        *("features", "losses.npy", "segment_pictures.png", "step-????????.ckpt", "on-*-????????"),
        *(probe + kind for probe in PROBES for kind in ("", ".json", ".png")),
    ),
}
KEPT_TO_THE_LAST = ("config.yaml", "environment.json", LEASE)  # the marks of a run


def is_run(run: Path) -> bool:
    """Returns True if the folder carries the mark of a run: its settings or the list of its starts."""
    return stored_settings(run) is not None or "starts" in (read_mapping(run / "environment.json") or {})


def stored_settings(run: Path) -> dict[str, Any] | None:
    """Returns the settings in a run's config.yaml; None if it is absent, damaged, or another program's."""
    settings = read_mapping(run / "config.yaml") or {}
    return settings if {"model", "optim", "global_batch"} <= settings.keys() else None


def read_mapping(path: Path) -> dict[str, Any] | None:
    """Returns the mapping in a YAML or JSON file; None if there is no file or no mapping in it."""
    try:
        contents = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return contents if isinstance(contents, dict) else None


def refuse_foreign_folder(run: Path, overwrite: bool) -> None:
    """Raises ConfigError if the folder is no run and holds what a start would replace, or anything if it is to be
    overwritten; also if a sub-folder links into another run.
    """
    for folder in filter(None, WRITTEN):
        other = (run / folder).resolve().parent
        if (run / folder).is_symlink() and other != run.resolve() and is_run(other):
            raise ConfigError(
                f"{run / folder} is a link into the run {other}: two runs would write there. Remove the link; "
                f"resume={other} resumes from that run's checkpoints"
            )
    if not run.is_dir() or is_run(run):
        return
    files = sorted(path.name for path in run.iterdir() if path.name != LEASE and path.suffix != ".tmp")
    if overwrite and files:
        raise ConfigError(
            f"overwrite=true: {run} holds {_list(files)}, but no config.yaml or environment.json of a run, and only "
            "runs are deleted. Choose another name=, or move these files"
        )
    damaged = [name for name in ("config.yaml", "environment.json") if name in files and not read_mapping(run / name)]
    taken = [name for name in files if name in WRITTEN[""]]
    if taken and not damaged and not checkpoints(run):
        raise ConfigError(
            f"{run} is no run, and this one would replace its {_list(taken)}. Choose another name=, or move these files"
        )


def clear_run_folder(run: Path) -> None:
    """Removes the files that a run writes, and names what stays. Links to the folder or its sub-folders stay links.

    The mark of a run stays until the rest is gone. It then names this launch, so that a restart does not clear again.
    """
    stays = []
    for folder, names in WRITTEN.items():
        for path in sorted((run / folder).iterdir()) if (run / folder).is_dir() else ():
            if any(path.match(pattern) for name in names for pattern in (name, f"{name}.*tmp", f"{name}.damaged*")):
                if path.name not in KEPT_TO_THE_LAST:
                    _remove(path)
            elif path.name not in WRITTEN:
                stays.append(f"{path.relative_to(run)}{'/' if path.is_dir() else ''}")
        if folder:
            with suppress(OSError):  # not empty, or a link
                (run / folder).rmdir()
    write_json(run / "environment.json", {"starts": [], "begun_by": launch_names()})
    (run / "config.yaml").unlink(missing_ok=True)
    if stays:
        say(f"overwrite=true: {run} keeps {_list(stays)}, which no run has written")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # a temporary file that has become the lease by now


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")


def write_settings(run: Path, settings: str) -> None:
    """Writes config.yaml. One that cannot be read is set aside: it may be another program's."""
    path = run / "config.yaml"
    if path.exists() and read_mapping(path) is None:
        set_aside(path)
    with write_atomically(path) as temporary:
        temporary.write_text(settings)


def write_json(path: Path, contents: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2) + "\n")


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Returns an object with these keys from a JSON file of ours, empty without the file.

    A file that a power failure has damaged is set aside with a warning: no bookkeeping keeps a run from starting.
    """
    contents = read_mapping(path)
    if contents is not None and all(key in contents for key in keys):
        return contents
    if path.exists():
        set_aside(path)
    return {}


def record_start(run: Path, step: int, ranks: int, begins: bool | None = None) -> None:
    """Writes environment.json: machine and versions of this start, all starts of the run, the launch that began it.

    begins  whether this start begins the run, at another one's step if it is a branch; None: if the step is 0

    Removes the summary.json of a shorter run: a run that goes on is not finished.
    """
    (run / "summary.json").unlink(missing_ok=True)
    path = run / "environment.json"
    recorded = read_json(path, "starts")
    starts = recorded.get("starts", [])
    starts.append(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "ranks": ranks,
            "command": sys.argv,
            "git": _git("rev-parse", "HEAD") or os.environ.get("MAE_COMMIT") or None,  # an image has no repository
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
            "begun_by": launch_names() if (step == 0 if begins is None else begins) else recorded.get("begun_by", {}),
        },
    )


def leave_word(run: Path, state: str, sentence: str) -> None:
    """Writes ended.json, how and why a run ended, for `python -m mae.runs`. Of several ranks' words the first stays.

    Raises nothing where it cannot write: the error under way says more.
    """
    where = {"host": socket.gethostname(), "pid": os.getpid(), "job": launch_names().get("SLURM job")}
    word = {"state": state, "sentence": sentence, "time": datetime.now(UTC).isoformat(timespec="seconds"), **where}
    if (run / "environment.json").is_file():  # otherwise no start came as far as making it a run
        with suppress(OSError), open(run / "ended.json", "x") as file:  # "x" asks the server of a network file system
            file.write(json.dumps(word, indent=2) + "\n")


def remove_word(run: Path) -> None:
    """Removes what `leave_word` has written in an earlier start."""
    with suppress(OSError):
        (run / "ended.json").unlink()


def _git(*words: str) -> str:
    """Returns git's answer about this checkout; an empty string if there is no git or no repository."""
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
