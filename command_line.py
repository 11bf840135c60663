"""How the programs meet the person who starts them: errors as one sentence, exit codes, quiet libraries."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from data.errors import DataError
from mae.callbacks.signals import Stopped
from mae.errors import CheckpointError, ConfigError, RunEnded, first_sentence
from mae.launch import leave_together
from mae.rank_zero import say

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"
QUIET = (
    ".*your dataloader is not resumable.*",  # it is: see MicroBatches
    ".*does not have many workers.*",  # data.workers is the user's to set
    ".*LeafSpec.*",  # Lightning's own use of torch
)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Wrong input: one sentence, exit code 2; a stopped run: 143 or 130. HYDRA_FULL_ERROR=1 shows tracebacks."""
    try:
        yield
    except Stopped as stop:
        say(f"{stop}; the same command goes on from there")
        leave_together(stop.exit_code)
    except RunEnded as end:
        say(f"error: {end}", sys.stderr)
        leave_together(end.exit_code)
    except (ConfigError, CheckpointError, DataError, ValidationError, HydraException, OmegaConfBaseException) as error:
        if FULL_ERROR:
            raise
        sentence = first_sentence(error) if isinstance(error, ValidationError) else str(error)
        # Hydra lists its search path after the reason.
        say(f"error: {' '.join(sentence.split('Config search path')[0].split())}", sys.stderr)
        sys.exit(2)
    except OSError as error:
        if FULL_ERROR or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        # Whichever rank it was: it is the only one that knows.
        print(f"error: {error.strerror}. Make room and start the same command again", file=sys.stderr, flush=True)
        sys.exit(2)


def quieten() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def run_program(program: Callable[[], None]) -> None:
    """Runs a Hydra program with readable errors, from the command line to the last line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them and exiting with 1
    quieten()
    with readable_errors():
        program()
