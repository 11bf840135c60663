"""W&B artifacts: checkpoints and exports, in the W&B run of their training. Works without a server."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger

from mae.run.folder import stored_settings

Artifacts = Literal["none", "reference", "upload"]


def log_checkpoint(loggers: Iterable[Logger], path: Path, step: int, how: Artifacts) -> None:
    """Logs a checkpoint as the next version of model-ID, with the aliases `latest` and step-N, if W&B is a logger.

    how  "upload" copies the file, which may be deleted before it is sent; "reference" stores its path only
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger) and how != "none":
            _log_checkpoint(logger.experiment, path, step, how)


def _log_checkpoint(wandb_run: Any, path: Path, step: int, how: Artifacts) -> None:
    import wandb

    metadata = {"step": step, "path": str(path.resolve())}
    artifact = wandb.Artifact(f"model-{wandb_run.id}", type="model", metadata=metadata)
    if how == "upload":
        artifact.add_file(str(path), name="model.ckpt")
    else:
        _add_reference(artifact, path)
    wandb_run.log_artifact(artifact, aliases=["latest", f"step-{step}"])


def _add_reference(artifact: Any, path: Path) -> None:
    # A checksum would read the whole file, and the path says already which checkpoint it is.
    artifact.add_reference(path.resolve().as_uri(), name="model.ckpt", checksum=False)


def log_export(wandb_run: Any, run: Path, out: Path, card: Path) -> None:
    """Logs an export as an artifact of the W&B run of a finished training, with its card as metadata.

    The artifact refers to the checkpoint of the export, which is logged as well unless the training has done so.
    """
    import wandb

    about = json.loads(card.read_text())
    checkpoint, step = Path(about["source"]), about["step"]
    if (stored_settings(run) or {}).get("checkpoint", {}).get("artifacts", "none") == "none":
        _log_checkpoint(wandb_run, checkpoint, step, "reference")
    metadata = {"made_from": f"model-{wandb_run.id}:step-{step}", **about}
    artifact = wandb.Artifact(f"{about['format']}-{wandb_run.id}", type="export", metadata=metadata)
    for file in [*(out.parent / name for name in about["sha256"]), card]:
        artifact.add_file(str(file), name=str(file.relative_to(out.parent)))
    _add_reference(artifact, checkpoint)
    wandb_run.log_artifact(artifact, aliases=["latest", f"step-{step}"])
    print(f"{out}: artifact {artifact.name} of the W&B run {wandb_run.id}, made from {metadata['made_from']}")
