"""A cool-down as a branch: init_from=RUN@STEP goes on with a wsd run from one of its steps, in a folder of its own.

A branch is that run, resumed: weights, optimiser state, order of the images, random numbers and counts of the guard are
those of the checkpoint. What differs is the end: the cool-down.
"""

import os
import re
import shutil
from pathlib import Path
from statistics import median
from typing import Any

from mae.atomic import write_atomically
from mae.errors import CheckpointError, ConfigError
from mae.plan.tables import duration
from mae.run.checkpoint_files import checkpoint_path, checkpoints, read_own, step_of
from mae.run.folder import stored_settings
from mae.run.metrics import by_name, read_metrics
from mae.train.schedule import Schedule
from tasks.config import TrainConfig

BRANCH = re.compile(r"(.+)@(\d+)")
COUNT_IN_COOLDOWN = ("cooldown", "min_lr")  # settings of `optim` that may differ from the run's


def resolve_branch(config: TrainConfig) -> TrainConfig:
    """Returns the settings of a branch: `branch` is RUN@STEP, `init_from` what that run itself was begun from.

    A path that exists is no branch, whatever its name; the settings are then returned as they are.

    Raises ConfigError if the run folder belongs to something else, or other settings do not go with a branch.
    """
    found = BRANCH.fullmatch(config.init_from or "")
    stored = None if config.overwrite or not checkpoints(config.run) else stored_settings(config.run)
    before = (stored or {}).get("branch")
    if found is None or Path(config.init_from or "").exists():
        if before is not None:
            raise ConfigError(
                f"{config.run} is a branch of {before}, from which its length follows: resume it with "
                f"init_from={before}, or choose another name="
            )
        return config
    branch = config.model_copy(update={"branch": config.init_from})
    run, step = branch.branched or (Path(), 0)
    if run.resolve() == config.run.resolve():
        raise ConfigError(f"init_from={branch.branch} begins a folder of its own, and this is the run's: set name=")
    if stored is not None and (before is None or _place(before) != _place(f"{run}@{step}")):
        is_now = "no branch" if before is None else f"a branch of {before}"
        raise ConfigError(f"{config.run} is {is_now}, and init_from={branch.branch} is another run: set another name=")
    path = checkpoint_path(run, step)
    if config.resume not in ("auto", "never"):
        raise ConfigError(
            f"init_from={branch.branch} and resume={config.resume} both say where to begin: leave one of them out"
        )
    if config.init_weights is not None:
        raise ConfigError(
            f"init_weights={config.init_weights} is for a warm start, and init_from={branch.branch} takes over all: "
            "leave it out"
        )
    if config.optim.schedule != "wsd":
        raise ConfigError(
            f"init_from={branch.branch} branches a cool-down off, and optim.schedule={config.optim.schedule} has none: "
            f"set optim.schedule=wsd as in that run. resume={path} goes on with it, init_from={path} begins anew with "
            "its weights"
        )
    if config.overwrite or not checkpoints(config.run):
        refuse_branch_point(run, step)
    origin = stored or stored_settings(run) or {}
    return branch.model_copy(update={name: origin.get(name) for name in ("init_from", "init_weights")})


def _place(branch: str) -> tuple[Path, int]:
    run, _, step = branch.rpartition("@")
    return Path(run).resolve(), int(step)


def refuse_branch_point(run: Path, step: int) -> None:
    """Raises ConfigError if a run has no checkpoint of this step, or it is not one of the constant part."""
    path, there = checkpoint_path(run, step), [str(step_of(path)) for path in reversed(checkpoints(run))]
    if not there:
        raise ConfigError(f"init_from={run}@{step}: {run} has no checkpoints/step-*.ckpt. Give the folder of a run")
    if not path.exists():
        raise ConfigError(f"init_from={run}@{step}: there is no checkpoint of this step. There are {', '.join(there)}")
    group = read_own(path)["optimizer_states"][0]["param_groups"][0]
    if group["lr"] != group["initial_lr"]:
        raise ConfigError(
            f"init_from={run}@{step} is not of the constant part, where a cool-down begins: the learning rate is "
            f"{group['lr'] / group['initial_lr']:.2g} of its peak. The run has checkpoints of {', '.join(there)}"
        )


def with_own_cooldown(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Returns the recipe of a checkpoint of the constant part, with the settings of this run's cool-down."""
    return stored | {"optim": stored["optim"] | {name: now["optim"][name] for name in COUNT_IN_COOLDOWN}}


def take_over(path: Path, run: Path) -> None:
    """Links a checkpoint into the folder of a branch, or copies it: the run that has it may delete it one day.

    Raises CheckpointError if it cannot be written.
    """
    own = run / "checkpoints" / path.name
    own.parent.mkdir(parents=True, exist_ok=True)
    try:
        with write_atomically(own) as temporary:
            try:
                os.link(path, temporary)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(path, temporary)
    except OSError as error:
        raise CheckpointError(f"{own} cannot be written ({error.strerror})") from error


def describe_branch(config: TrainConfig, schedule: Schedule) -> str:
    """Returns from where to where a branch goes, and what it takes at the speed of the run that it comes from."""
    run, begin = config.branched or (Path(), 0)
    end, steps = schedule.total_steps, schedule.total_steps - begin
    if config.max_steps is None:
        length = f"to step {end:,} = {begin:,} / (1 - {config.optim.cooldown:g}), all cool-down, whatever epochs= says"
    else:
        length = f"to step {end:,} (max_steps), {schedule.cooldown_steps:,} of them cool-down"
    speeds = by_name(read_metrics(run / "metrics.csv")).get("perf/images_per_s", {})
    hours = steps * schedule.global_batch / median(speeds.values()) / 3600 if speeds else None
    takes = f"; {duration(hours)} at the speed of that run" if hours is not None else ""
    return f"step {begin:,} of {run}: {steps:,} steps, {length}{takes}"
