"""Tells what kind of weights a file or folder holds without building a model."""

from pathlib import Path
from typing import Any

from mae.formats.huggingface import read_settings
from mae.run.checkpoint_files import newest_valid, read


def holds_sam(path: Path) -> bool:
    """Whether this is a SAM-style encoder, or a whole SAM, in a format of other libraries."""
    if path.is_dir():
        settings = read_settings(path) if (path / "config.json").is_file() else {}
        kind = settings.get("architecture") or settings.get("model_type") or ""
        return kind.startswith("sam")
    if path.suffix == ".safetensors":
        return False
    contents = read(path)
    return any(key.endswith("neck.0.weight") for key in contents.get("model", contents))


def is_segmentation(path: Path) -> bool:
    """Whether this is a run of task=segment, or its checkpoint."""
    if path.is_dir():
        newest = None if (path / "config.json").is_file() else newest_valid(path)
        return newest is not None and is_segmentation(newest)
    return path.suffix == ".ckpt" and _task(read(path, mmap=True)) == "segment"


def _task(contents: dict[str, Any]) -> str | None:
    return contents.get("mae", {}).get("recipe", {}).get("task", {}).get("name")
