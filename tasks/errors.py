"""Exit codes and closing sentences: 2 for wrong input, a full disk or too little memory, 143 and 130 for a stop."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from data.errors import DataError
from data.storage.credentials import hide
from mae.distributed.launch import leave_together
from mae.distributed.rank_zero import say, say_error
from mae.distributed.stop import Stopped, leave
from mae.errors import CheckpointError, ConfigError, RunEnded, first_sentence
from mae.run.folder import leave_word, remove_word
from mae.run.lease import is_in_use
from tasks.cli import FULL_ERROR, failed_runs

WAYS_TO_LESS_MEMORY = (
    "In training lower micro_batch (accumulation follows, the result stays), or set blocks.recompute=all; "
    "plan=true says what fits. In an evaluation lower batch_size"
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRONG_INPUT = (ConfigError, CheckpointError, DataError, ValidationError, OmegaConfBaseException)  # of all ranks alike
LONGEST_SENTENCE = 1000  # characters of one that is left in the run folder: some of torch's are pages


@contextmanager
def readable_errors() -> Iterator[None]:
    """Ends the process on an error that a user can mend: one sentence and an exit code.

    In a multirun it ends that run alone. HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    try:
        yield
    except Stopped as stop:
        leave(stop)
    except RunEnded as end:
        say(f"error: {sentence_of(end)}", sys.stderr)
        if not note_failed_run(sentence_of(end)):
            leave_together(end.exit_code)
    except (*WRONG_INPUT, torch.OutOfMemoryError, OSError) as error:
        if FULL_ERROR or (isinstance(error, OSError) and error.errno not in NO_ROOM):
            raise
        if isinstance(error, WRONG_INPUT):
            say_error(sentence_of(error))
        else:  # no other rank knows
            print(f"error: {sentence_of(error)}", file=sys.stderr, flush=True)
        if isinstance(error, OSError) or not note_failed_run(sentence_of(error)):
            sys.exit(2)


def sentence_of(error: BaseException) -> str:
    """Returns why a run ended in a sentence or two; of an error that nobody foresaw kind and message."""
    match error:
        case ValidationError():
            sentence = first_sentence(error)
        case torch.OutOfMemoryError():
            sentence = ". ".join([*str(error).split(". ")[:2], WAYS_TO_LESS_MEMORY])
        case OSError() if error.errno in NO_ROOM:
            sentence = f"{error.strerror}. Make room and run the same command to resume"
        case _:
            foreseen = isinstance(error, (Stopped, RunEnded, *WRONG_INPUT))
            sentence = str(error) if foreseen else f"{type(error).__name__}: {error}"
    return hide(" ".join(sentence.split()))


@contextmanager
def last_word(run: Path, rank: int, *, has_lease: bool = True) -> Iterator[None]:
    """Leaves ended.json in the run folder if the block ends by an error, and removes that of the start before.

    A start that is refused before it has the lease leaves none where another one may write, or the run is finished.
    """
    if has_lease and rank == 0:
        remove_word(run)
    try:
        yield
    finally:
        error = sys.exception()
        refused_beside = not has_lease and (is_in_use(run, rank) or (run / "summary.json").exists())
        # These are raised on all ranks, and rank 0 knows the reason.
        if error is not None and not refused_beside and (rank == 0 or not isinstance(error, (RunEnded, Stopped))):
            if not has_lease:
                remove_word(run)
            sentence = f"rank {rank}: {sentence_of(error)}" if rank != 0 else sentence_of(error)
            leave_word(run, "stopped" if isinstance(error, Stopped) else "failed", sentence[:LONGEST_SENTENCE])


def note_failed_run(sentence: str) -> bool:
    """Notes the end of one of several runs of this process, so that the others follow. Returns False for any other."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return False
    hydra = HydraConfig.get()
    if not hydra.launcher._target_.endswith("BasicLauncher"):
        return False  # each run has a process of its own
    failed_runs[hydra.job.override_dirname or hydra.job.name] = sentence
    return True
