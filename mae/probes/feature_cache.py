"""Disk cache of features, shared by all probes of a run."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae.distributed.rank_zero import warn
from mae.errors import CheckpointError
from mae.probes.features import Features
from mae.run.checkpoint_files import read, verify
from mae.run.checkpoint_writer import write_checkpoint

VERSION = 1  # of the extraction; a part of every key, so that raising it makes all kept features stale


def weights_fingerprint(model: nn.Module) -> str:
    """Hashes names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def thumbnails_key(images: dict[str, Any]) -> dict[str, Any]:
    """Returns the key of thumbnails, which depend on no model.

    images  plain values of everything that the pixels depend on
    """
    return {"kind": "thumbnails", "images": images}


class FeatureCache:
    """Files of features, each named by a hash of everything that it depends on.

    limit  bytes to keep: the oldest files are removed first; 0 keeps none

    A file is used if its checksums hold, its key is equal and it has all samples asked for but those that could not be
    read, whose numbers it holds too.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder = folder
        self.limit = limit

    def find(self, key: dict[str, Any], samples: Tensor) -> Features | None:
        """Returns the features of those of these samples that could be read, memory-mapped; None if not kept."""
        for path in sorted(self.folder.glob(f"{_name(key)}-*.pt")):
            try:
                verify(path)
                kept = read(path)
            except CheckpointError as error:
                warn(f"extracted anew: {error}")
                path.unlink(missing_ok=True)
                continue
            known = torch.cat([kept["samples"], kept.get("unreadable", samples[:0])])
            if kept["key"] == _text(key) and torch.isin(samples, known).all():
                return Features(kept["samples"], kept["labels"], kept["values"]).take(samples)
        return None

    def kept(self, **fields: Any) -> Iterator[tuple[dict[str, Any], Features]]:
        """Yields key and features of all files whose key has these values, newest first; skips damaged files."""
        for _, _, path in reversed(self._files()):
            try:
                contents = read(path)
                key = json.loads(contents["key"])
                if (fields | {"version": VERSION}).items() <= key.items():
                    verify(path)
                    yield key, Features(contents["samples"], contents["labels"], contents["values"])
            except CheckpointError as error:
                warn(f"passed over: {error}")

    def keep(self, key: dict[str, Any], features: Features, unreadable: Tensor | None = None) -> None:
        """Writes the features atomically, and removes the oldest files beyond the limit.

        Another evaluation may have kept the same meanwhile, and mapped the file: it stays. On a network file system a
        mapping of a file that another machine replaces is lost.

        unreadable  int64 [m], the samples that could not be read
        """
        if features.values.nbytes > self.limit:
            return
        numbers = torch.cat([features.samples, *([] if unreadable is None else [unreadable])]).numpy().tobytes()
        path = self.folder / f"{_name(key)}-{len(features.samples)}-{hashlib.sha256(numbers).hexdigest()[:8]}.pt"
        if path.exists():
            return
        lacking = {} if unreadable is None or not len(unreadable) else {"unreadable": unreadable}
        write_checkpoint({"key": _text(key), **features._asdict(), **lacking}, path)
        files = self._files()
        while sum(size for _, size, _ in files) > self.limit:
            files.pop(0)[-1].unlink(missing_ok=True)

    def _files(self) -> list[tuple[int, int, Path]]:
        """Returns time, bytes and path of the files, oldest first. Other evaluations may remove some meanwhile."""
        found = []
        for path in self.folder.glob("*.pt"):
            with suppress(FileNotFoundError):
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        return sorted(found)


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key | {"version": VERSION}, sort_keys=True)


def _name(key: dict[str, Any]) -> str:
    return hashlib.sha256(_text(key).encode()).hexdigest()[:20]
