"""Exit codes and closing sentences: 2 for wrong input, a full disk or too little memory, 143 and 130 for a stop."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from data.errors import DataError
from data.storage.credentials import hide
from mae.callbacks.stop_on_signal import Stopped
from mae.distributed.launch import leave_together
from mae.distributed.rank_zero import say
from mae.errors import CheckpointError, ConfigError, RunEnded, first_sentence
from tasks.cli import FULL_ERROR, failed_runs

WAYS_TO_LESS_MEMORY = (
    "In training lower micro_batch (accumulation follows, the result stays), or set blocks.recompute=all; "
    "plan=true says what fits. In an evaluation lower batch_size"
)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Ends the process on an error that a user can mend: one sentence and an exit code.

    In a multirun it ends that run alone. HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    try:
        yield
    except Stopped as stop:
        say(f"{stop}, checkpoint saved; run the same command to resume")
        leave_together(stop.exit_code)
    except RunEnded as end:
        sentence = hide(str(end))
        say(f"error: {sentence}", sys.stderr)
        if not note_failed_run(sentence):
            leave_together(end.exit_code)
    except (ConfigError, CheckpointError, DataError, ValidationError, OmegaConfBaseException) as error:
        if FULL_ERROR:
            raise
        sentence = first_sentence(error) if isinstance(error, ValidationError) else str(error)
        sentence = hide(" ".join(sentence.split()))
        say(f"error: {sentence}", sys.stderr)
        if not note_failed_run(sentence):
            sys.exit(2)
    except torch.OutOfMemoryError as error:
        if FULL_ERROR:
            raise
        reason = ". ".join(str(error).split(". ")[:2])
        print(f"error: {reason}. {WAYS_TO_LESS_MEMORY}", file=sys.stderr, flush=True)
        if not note_failed_run(reason):
            sys.exit(2)
    except OSError as error:
        if FULL_ERROR or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        # Printed by whichever rank it was: no other rank knows.
        print(f"error: {error.strerror}. Make room and run the same command to resume", file=sys.stderr, flush=True)
        sys.exit(2)


def note_failed_run(sentence: str) -> bool:
    """Notes the end of one of several runs of this process, so that the others follow. Returns False for any other."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return False
    hydra = HydraConfig.get()
    if not hydra.launcher._target_.endswith("BasicLauncher"):
        return False  # each run has a process of its own
    failed_runs[hydra.job.override_dirname or hydra.job.name] = sentence
    return True
