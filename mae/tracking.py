"""One W&B run for one training, through any number of restarts."""

import os
import secrets
import sys
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse


def wandb_identity(run: Path) -> dict[str, Any]:
    """Arguments of Lightning's WandbLogger: the id kept in the run folder, resumed; offline where there is no key.

    Without a key W&B would stop and ask for one, which nobody answers on a cluster.
    """
    file = run / "wandb_id.txt"
    if not file.is_file():
        file.write_text(secrets.token_hex(4))
    return {"id": file.read_text().strip(), "resume": "allow", "offline": not _has_key()}


def _has_key() -> bool:
    """Whether W&B would find a key, in the environment or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return file.is_file() and netrc(file).authenticators(host or "") is not None
    except NetrcParseError:
        return False


def finish_wandb(exit_code: int) -> None:
    """Closes the W&B run, if one is open, so that nothing stays unsent."""
    if (wandb := sys.modules.get("wandb")) and wandb.run is not None:
        wandb.finish(exit_code=exit_code)
