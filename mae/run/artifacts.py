"""W&B artifacts: checkpoints, in the W&B run of their training. Works without a server."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger


def log_checkpoint(loggers: Iterable[Logger], path: Path, step: int, how: str) -> None:
    """Logs a checkpoint as the next version of model-ID, with the aliases `latest` and step-N, if W&B is a logger.

    how  "upload" copies the file, which may be deleted before it is sent; "reference" stores its path only
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            send_checkpoint(logger.experiment, path, step, how)


def send_checkpoint(wandb_run: Any, path: Path, step: int, how: str) -> None:
    """Logs a checkpoint in a W&B run, see `log_checkpoint`."""
    import wandb

    metadata = {"step": step, "path": str(path.resolve())}
    artifact = wandb.Artifact(f"model-{wandb_run.id}", type="model", metadata=metadata)
    if how == "upload":
        artifact.add_file(str(path), name="model.ckpt")
    else:
        add_reference(artifact, path)
    wandb_run.log_artifact(artifact, aliases=["latest", f"step-{step}"])


def add_reference(artifact: Any, path: Path) -> None:
    """Adds the path of a checkpoint to an artifact."""
    # A checksum would read the whole file, and the path says already which checkpoint it is.
    artifact.add_reference(path.resolve().as_uri(), name="model.ckpt", checksum=False)
