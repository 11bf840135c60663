"""Runs a Hydra program: refused settings become one sentence, hints of libraries are silenced. Loads no torch."""

import logging
import os
import sys
import warnings
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from data.storage.credentials import hide
from mae.distributed.processes import end_with_launcher
from mae.distributed.rank_zero import say

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"
QUIET = (
    ".*your dataloader is not resumable.*",  # it is: see MicroBatches
    ".*does not have many workers.*",  # data.workers is the user's to set
    ".*LeafSpec.*",  # Lightning's own use of torch
    ".*``noload``.*",  # MLflow's own use of SQLAlchemy
    "The `srun` command is available on your system but is not used.*",  # it is on every login node
)


def quieten() -> None:
    """Silences hints of libraries that a user can do nothing about."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def run_program(program: Callable[[], None]) -> None:
    """Runs a Hydra program. Settings that cannot be composed end it with one sentence and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them and exiting with 1
    quieten()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    try:
        program()
    except (HydraException, OmegaConfBaseException) as error:
        if FULL_ERROR:
            raise
        reason = str(error).split("Config search path")[0]  # which Hydra lists after the reason
        say(f"error: {hide(' '.join(reason.split()))}", sys.stderr)
        sys.exit(2)
