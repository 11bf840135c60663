"""How a program ends: wrong input as one sentence, and what the shell sees."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from data.errors import DataError
from mae.callbacks.stop_on_signal import Stopped
from mae.distributed.launch import leave_together
from mae.distributed.rank_zero import say
from mae.errors import CheckpointError, ConfigError, RunEnded, first_sentence
from tasks.cli import FULL_ERROR

LESS_MEMORY = (
    "In training lower micro_batch (more steps are accumulated, the result stays), or set blocks.recompute=all; "
    "plan=true reckons what fits. In an evaluation lower batch_size"
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
    except (ConfigError, CheckpointError, DataError, ValidationError, OmegaConfBaseException) as error:
        if FULL_ERROR:
            raise
        sentence = first_sentence(error) if isinstance(error, ValidationError) else str(error)
        say(f"error: {' '.join(sentence.split())}", sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        if FULL_ERROR:
            raise
        wanted = ". ".join(str(error).split(". ")[:2])
        print(f"error: {wanted}. {LESS_MEMORY}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if FULL_ERROR or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        # Whichever rank it was: it is the only one that knows.
        print(f"error: {error.strerror}. Make room and start the same command again", file=sys.stderr, flush=True)
        sys.exit(2)
