"""Features on disk, so that no probe extracts what another has extracted before."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae.distributed.rank_zero import warn
from mae.errors import CheckpointError
from mae.probes.features import Features
from mae.run.checkpoint_files import read, verify
from mae.run.checkpoint_writer import AtomicCheckpointIO

VERSION = 1  # of what is extracted: a higher one makes everything kept before stale


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def thumbnails_key(images: dict[str, Any]) -> dict[str, Any]:
    """The key of thumbnails, which depend on no model.

    images  plain values of everything that the pixels depend on
    """
    return {"kind": "thumbnails", "images": images}


class FeatureCache:
    """Files of features, each under a hash of everything that it depends on.

    limit  bytes that are kept; the oldest files go first, and nothing is kept at 0

    A file is used when its checksums hold, its key is the same and it has all the samples that are wanted.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder = folder
        self.limit = limit

    def find(self, key: dict[str, Any], samples: Tensor) -> Features | None:
        """The features of these samples, left in their file until they are used; None where there are none."""
        for path in sorted(self.folder.glob(f"{_name(key)}-*.pt")):
            try:
                verify(path)
                kept = read(path)
            except CheckpointError as error:
                warn(f"extracted anew: {error}")
                path.unlink(missing_ok=True)
                continue
            if kept["key"] == _text(key) and torch.isin(samples, kept["samples"]).all():
                return Features(kept["samples"], kept["labels"], kept["values"]).take(samples)
        return None

    def kept(self, **fields: Any) -> Iterator[tuple[dict[str, Any], Features]]:
        """All that is kept under keys with these values, with its key, newest first; damaged files are passed over."""
        for path in sorted(self.folder.glob("*.pt"), key=lambda file: file.stat().st_mtime_ns, reverse=True):
            try:
                contents = read(path)
                key = json.loads(contents["key"])
                if (fields | {"version": VERSION}).items() <= key.items():
                    verify(path)
                    yield key, Features(contents["samples"], contents["labels"], contents["values"])
            except CheckpointError as error:
                warn(f"passed over: {error}")

    def keep(self, key: dict[str, Any], features: Features) -> None:
        """Writes the features, whole or not at all, and removes the oldest files beyond the limit."""
        if features.values.nbytes > self.limit:
            return
        path = self.folder / f"{_name(key)}-{len(features.samples)}.pt"
        AtomicCheckpointIO().save_checkpoint({"key": _text(key), **features._asdict()}, path)
        files = sorted(self.folder.glob("*.pt"), key=lambda file: file.stat().st_mtime_ns)
        while sum(file.stat().st_size for file in files) > self.limit:
            files.pop(0).unlink()


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key | {"version": VERSION}, sort_keys=True)


def _name(key: dict[str, Any]) -> str:
    return hashlib.sha256(_text(key).encode()).hexdigest()[:20]
