"""How the programs meet the person who starts them: Hydra's refusals as one sentence, quiet libraries."""

import logging
import os
import sys
import warnings
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"
QUIET = (
    ".*your dataloader is not resumable.*",  # it is: see MicroBatches
    ".*does not have many workers.*",  # data.workers is the user's to set
    ".*LeafSpec.*",  # Lightning's own use of torch
    ".*``noload``.*",  # MLflow's own use of SQLAlchemy
)


def quieten() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def run_program(program: Callable[[], None]) -> None:
    """Runs a Hydra program; settings that cannot be put together are one sentence and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them and exiting with 1
    quieten()
    try:
        program()
    except (HydraException, OmegaConfBaseException) as error:
        if FULL_ERROR:
            raise
        # Hydra lists its search path after the reason. Each rank has read the same settings: one of them says it.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            reason = str(error).split("Config search path")[0]
            print(f"error: {' '.join(reason.split())}", file=sys.stderr, flush=True)
        sys.exit(2)
