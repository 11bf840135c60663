"""W&B artifacts of exports, in the W&B run of their training."""

import json
from pathlib import Path
from typing import Any

from mae.run.artifacts import add_reference, send_checkpoint
from mae.run.folder import stored_settings


def log_export(wandb_run: Any, run: Path, out: Path, card: Path) -> None:
    """Logs an export as an artifact of the W&B run of a finished training, with its card as metadata.

    The artifact refers to the checkpoint of the export, which is logged as well unless the training has done so.
    """
    import wandb

    about = json.loads(card.read_text())
    checkpoint, step = Path(about["source"]), about["step"]
    if (stored_settings(run) or {}).get("checkpoint", {}).get("artifacts", "none") == "none":
        send_checkpoint(wandb_run, checkpoint, step, "reference")
    metadata = {"made_from": f"model-{wandb_run.id}:step-{step}", **about}
    artifact = wandb.Artifact(f"{about['format']}-{wandb_run.id}", type="export", metadata=metadata)
    for file in [*(out.parent / name for name in about["sha256"]), card]:
        artifact.add_file(str(file), name=str(file.relative_to(out.parent)))
    add_reference(artifact, checkpoint)
    wandb_run.log_artifact(artifact, aliases=["latest", f"step-{step}"])
    print(f"{out}: artifact {artifact.name} of the W&B run {wandb_run.id}, made from {metadata['made_from']}")
