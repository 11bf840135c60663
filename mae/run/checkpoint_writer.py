"""Checkpoint writing: whole, or not at all."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from mae.atomic import write_atomically
from mae.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint writer with `write_atomically` around torch.save.

    Raises CheckpointError if the file cannot be written (disk full, quota, limit of the file size).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        final = Path(path)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(final) as temporary, open(temporary, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch replaces the OSError by a RuntimeError of its own.
            reason = error.__context__ if isinstance(error, RuntimeError) else error
            if not isinstance(reason, OSError):
                raise
            raise CheckpointError(f"{final} cannot be written ({reason.strerror})") from reason
