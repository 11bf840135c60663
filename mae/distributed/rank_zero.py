"""Output of rank 0 only: one process speaks for all ranks of a run."""

import os
import sys
import time
import warnings
from contextlib import suppress
from typing import TextIO

RANK_ZERO_SECONDS = 10
# Of MPI before SLURM: in a job mpirun starts its daemons by srun, and its ranks inherit their variables.
RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def is_rank_zero() -> bool:
    """Returns True on rank 0. Reads the environment alone, so that a wrong launch can be reported too."""
    return _rank() == "0"


def _rank() -> str:
    return next(filter(None, map(os.environ.get, RANK)), "0")


def say(sentence: str, file: TextIO | None = None) -> None:
    """Prints the sentence on rank 0, to stdout unless `file` is given."""
    if is_rank_zero():
        print(sentence, file=file, flush=True)


def say_error(sentence: str) -> None:
    """Prints why this process will exit: rank 0 at once, another rank if nobody has ended it after RANK_ZERO_SECONDS.

    srun and torchrun end all ranks as soon as one has exited. That shall be rank 0, which says for all what all have
    met, or a rank that has said itself what it alone has met.
    """
    if is_rank_zero():
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        return
    time.sleep(RANK_ZERO_SECONDS)
    print(f"error on rank {_rank()}: {sentence}", file=sys.stderr, flush=True)


def say_at_once(sentence: str) -> None:
    """Prints the sentence on rank 0, from a signal handler: print may be at work already, and then raises."""
    if is_rank_zero():
        with suppress(OSError):
            os.write(1, f"{sentence}\n".encode())


def warn(sentence: str) -> None:
    """Warns on rank 0; the warning points at the caller's caller."""
    if is_rank_zero():
        warnings.warn(sentence, stacklevel=3)
