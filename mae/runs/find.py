"""Finds the run folders below a folder."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from mae.run.lease import parse_lease, read_lease

CHECKPOINT = re.compile(r"step-(\d{8})\.ckpt")
SETTINGS = re.compile(r"^(model|optim|global_batch):", re.MULTILINE)


@dataclass
class Found:
    """Run folders, and what lies beside them.

    runs         name, the path below the given folder, and folder
    passed_over  number of folders in which no run is, those inside them not counted
    unreadable   folders that cannot be listed, with the reason
    """

    runs: list[tuple[str, Path]] = field(default_factory=list)
    passed_over: int = 0
    unreadable: list[str] = field(default_factory=list)


def find_runs(root: Path) -> Found:
    """Returns all runs in `root` and below it, by name; one that links lead to as well is found once."""
    found, about = Found(), root.stat()
    _walk(root, root, found, {(about.st_dev, about.st_ino)})
    found.runs.sort()
    return found


def _walk(root: Path, folder: Path, found: Found, seen: set[tuple[int, int]]) -> bool:
    """Adds the runs in a folder and below it to `found`. Returns False if there is none."""
    try:
        with os.scandir(folder) as entries:
            folders = {entry.name: entry.is_symlink() for entry in entries if entry.is_dir()}
    except OSError as error:
        found.unreadable.append(f"{folder} ({error.strerror})")
        return True
    if is_run(folder):
        found.runs.append((folder.name if folder == root else str(folder.relative_to(root)), folder))
        return True
    foreign, first = 0, len(found.runs)
    for name in sorted(folders, key=lambda name: (folders[name], name)):  # links last: a run has the name of its folder
        try:
            about = os.stat(folder / name)
        except OSError:  # removed by now
            continue
        if (about.st_dev, about.st_ino) not in seen:
            seen.add((about.st_dev, about.st_ino))
            foreign += not _walk(root, folder / name, found, seen)
    if len(found.runs) > first or folder == root:
        found.passed_over += foreign
    return len(found.runs) > first


def is_run(folder: Path) -> bool:
    """Returns whether a folder is that of a run: by its environment.json, lease or config.yaml; by its checkpoints if
    these are damaged.
    """
    marks = {name: _text(folder / name) for name in ("environment.json", "config.yaml")}
    try:
        if "starts" in json.loads(marks["environment.json"] or ""):
            return True
    except (ValueError, TypeError, RecursionError):
        pass
    if len(set(SETTINGS.findall(marks["config.yaml"] or ""))) == 3 or parse_lease(read_lease(folder)):
        return True
    return any(text is not None for text in marks.values()) and newest_checkpoint(folder) is not None


def newest_checkpoint(run: Path) -> tuple[int, Path] | None:
    """Returns step and path of the newest checkpoint; None without any."""
    try:
        names = os.listdir(run / "checkpoints")
    except OSError:
        return None
    steps = [(int(match[1]), run / "checkpoints" / match[0]) for match in map(CHECKPOINT.fullmatch, names) if match]
    return max(steps, default=None)


def _text(path: Path) -> str | None:
    """Returns a text; an empty one if it cannot be read, None if there is no such file."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return ""
