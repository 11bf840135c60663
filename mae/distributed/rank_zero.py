"""Output of rank 0 only: one process speaks for all ranks of a run."""

import os
import warnings
from contextlib import suppress
from typing import TextIO


def is_rank_zero() -> bool:
    """Returns True on rank 0. Reads the environment alone, so that a wrong launch can be reported too."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def say(sentence: str, file: TextIO | None = None) -> None:
    """Prints the sentence on rank 0, to stdout unless `file` is given."""
    if is_rank_zero():
        print(sentence, file=file, flush=True)


def say_at_once(sentence: str) -> None:
    """Prints the sentence on rank 0, from a signal handler: print may be at work already, and then raises."""
    if is_rank_zero():
        with suppress(OSError):
            os.write(1, f"{sentence}\n".encode())


def warn(sentence: str) -> None:
    """Warns on rank 0; the warning points at the caller's caller."""
    if is_rank_zero():
        warnings.warn(sentence, stacklevel=3)
