"""One process speaks for all ranks of a run."""

import os
import warnings
from typing import TextIO


def is_rank_zero() -> bool:
    """Whether this process speaks for the run; also where nothing is known yet of the launch but that it is wrong."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def say(sentence: str, file: TextIO | None = None) -> None:
    """Rank 0 says it, on stdout unless told otherwise."""
    if is_rank_zero():
        print(sentence, file=file, flush=True)


def warn(sentence: str) -> None:
    """Rank 0 warns of it, as of something where `warn` was called."""
    if is_rank_zero():
        warnings.warn(sentence, stacklevel=3)
