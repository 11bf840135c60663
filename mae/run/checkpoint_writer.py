"""How checkpoints get onto the disk: whole, or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from mae.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's torch.save, into a temporary name that becomes the final one only when everything is on disk.

    Raises CheckpointError when it cannot be written (disk full, quota, limit of the file size).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        final = Path(path)
        temporary = final.with_name(final.name + ".tmp")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
        except (OSError, RuntimeError) as error:
            reason = error.__context__ if isinstance(error, RuntimeError) else error  # torch puts its own before it
            if not isinstance(reason, OSError):
                raise
            raise CheckpointError(f"{final} cannot be written ({reason.strerror})") from reason
        finally:
            temporary.unlink(missing_ok=True)
