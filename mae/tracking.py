"""One W&B run for one training, through any number of restarts."""

import secrets
import sys
from pathlib import Path
from typing import Any


def wandb_identity(run: Path) -> dict[str, Any]:
    """Arguments of Lightning's WandbLogger: the id kept in the run folder, resumed; offline where there is no key.

    Without a key W&B would stop and ask for one, which nobody answers on a cluster.
    """
    import wandb

    file = run / "wandb_id.txt"
    if not file.is_file():
        file.write_text(secrets.token_hex(4))
    return {"id": file.read_text().strip(), "resume": "allow", "offline": not wandb.api.api_key}


def finish_wandb(exit_code: int) -> None:
    """Closes the W&B run, if one is open, so that nothing stays unsent."""
    if (wandb := sys.modules.get("wandb")) and wandb.run is not None:
        wandb.finish(exit_code=exit_code, quiet=True)
