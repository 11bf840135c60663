"""Checkpoint files: their names, which of a run's can be trusted, reading them, comparing their settings."""

import errno
import pickle
import re
import struct
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from mae.distributed.rank_zero import warn
from mae.errors import CheckpointError, ConfigError

Weights = Literal["raw", "average"]  # of a checkpoint that holds both: as trained, or their average (task.ema)
NAME = re.compile(r"step-(\d{8})\.ckpt")
# What zipfile raises on damaged bytes: lengths, flags and methods that no file has are among them.
UNREADABLE_ZIP = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error, zlib.error)
# What torch.load raises on damaged files and on files of something else.
UNREADABLE = (
    *(RuntimeError, pickle.UnpicklingError, struct.error, EOFError, OSError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError),
)


def checkpoint_path(run: Path, step: int) -> Path:
    """Returns runs/NAME/checkpoints/step-00000500.ckpt for step 500."""
    return run / "checkpoints" / f"step-{step:08d}.ckpt"


def step_of(path: Path) -> int:
    """Returns the step in a checkpoint's name; -1 for a foreign name."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoints of a run, newest first, valid or not. Files with other names are ignored."""
    folder = run / "checkpoints"
    found = [path for path in folder.glob("step-*.ckpt") if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


class CannotRead(CheckpointError):
    """A checkpoint that cannot be read at the moment: it is somebody else's, or its server is away. No damage."""


def verify(path: Path) -> None:
    """Checks the file against the checksums inside it. Raises CheckpointError if it is cut off or altered."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except UNREADABLE_ZIP as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise CannotRead(f"{path} cannot be read ({error.strerror})") from error
        raise CheckpointError(f"{path} is not a whole checkpoint ({error}); it was probably cut off") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of its record {damaged} does not match")


def newest_valid(run: Path) -> Path | None:
    """Returns the newest checkpoint of a run that verifies, and warns of the others after it; None without any.

    Raises CheckpointError if all of them are damaged or cannot be read.
    """
    candidates = checkpoints(run)
    way_out = "Start again with resume=never overwrite=true, or choose another name="
    for path in candidates:
        try:
            verify(path)
        except CheckpointError as error:
            if path not in checkpoints(run):  # the run is under way, and has deleted it after a newer one
                return newest_valid(run)
            warn(f"skipped: {error}")
            if isinstance(error, CannotRead):
                way_out = f"{error}: start again when it can, or choose another name="
        else:
            return path
    if candidates:
        raise CheckpointError(
            f"all {len(candidates)} checkpoints in {run / 'checkpoints'} are damaged or cannot be read. {way_out}"
        )
    return None


def set_aside(path: Path, then: str = "the run does without it") -> None:
    """Renames a damaged file to NAME.damaged, which no start looks at, and warns of it and of what follows."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    with suppress(FileNotFoundError):  # another rank has been faster
        path.rename(aside)
    warn(f"{path} is damaged; it is kept as {aside.name}, and {then}")


def set_damaged_aside(run: Path, step: int) -> None:
    """Sets aside the damaged checkpoints after `step`, from which the run resumes: they count for `keep` no longer.

    Those that cannot be read at the moment stay. Raises ConfigError if one is whole: another start has saved it since.
    """
    for path in checkpoints(run):
        if step_of(path) > step:
            try:
                verify(path)
            except CannotRead:
                continue
            except CheckpointError:
                set_aside(path)
            else:
                raise ConfigError(
                    f"{path} was saved by another start while this one began at step {step}. Run the same command again"
                )


def read(path: Path) -> dict[str, Any]:
    """Returns the contents of a file written by torch.save: tensors and plain values only, never code.

    Tensors are memory-mapped: only those that are used are read. They are valid as long as nobody overwrites the file.

    Raises CheckpointError if the file is missing or damaged, or would need to run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        # Published training checkpoints carry their argparse settings.
        with torch.serialization.safe_globals([Namespace]):
            if path.suffix == ".safetensors":  # by which torch.load would go, whatever the file is
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            try:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:
                # Files of torch before 1.6 cannot be mapped, nor can any on some network file systems.
                return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    """Returns why a file cannot be read, from how it begins and what torch says, without torch's advice to run code."""
    said = str(error)
    if isinstance(error, OSError):
        return said
    try:
        with path.open("rb") as file:
            beginning = file.read(100).lstrip()
    except OSError as gone:
        return str(gone)
    if refused := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", said):
        return f"it holds an object of {refused[1]}, which needs code, and no code of a file is run here"
    if not beginning:
        return "it is empty"
    if beginning.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS in place of the file: fetch the file with git lfs pull"
    if beginning.startswith(b"<"):
        return "it is a web page: download the file that the page is about"
    if "TorchScript" in said:
        return "it is a TorchScript program: save the state dict of the module"
    if beginning.startswith(b"PK"):
        return f"it was cut off, or is a zip archive that torch.save has not written ({said.splitlines()[0]})"
    if not beginning.translate(None, bytes(range(32, 127)) + b"\n\r\t"):
        return f"it is a text file that begins with {beginning[:30].decode()!r}"
    return "it is no file of torch.save"


def read_own(path: Path) -> dict[str, Any]:
    """Returns the contents of a checkpoint of this framework. Raises CheckpointError for any other file."""
    contents = read(path)
    if not isinstance(contents, dict) or "mae" not in contents:
        raise CheckpointError(
            f"{path} was not written by this framework, so there is no run in it to resume. For a warm start from "
            f"foreign weights use init_from={path}"
        )
    return contents


def refuse_other_run(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raises ConfigError if the settings of a checkpoint differ from those of the run that resumes, and names them all.

    stored, wanted  nested plain dictionaries of the settings that decide the result
    """
    stored_flat, wanted_flat = dict(flatten(stored)), dict(flatten(wanted))
    differing = [
        f"{key} ({stored_flat.get(key, 'absent')} in the checkpoint, {wanted_flat.get(key, 'absent')} now)"
        for key in sorted(stored_flat.keys() | wanted_flat.keys())
        if stored_flat.get(key) != wanted_flat.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{path} belongs to a different run: {', '.join(differing)}. Resume with the checkpoint's settings, or "
            f"start a new run with another name= (init_from={path} loads the weights)"
        )


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested settings with their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
