"""DataError, what is said on stderr, the exit codes of the commands, what image libraries raise on damaged files."""

import os
import struct
import sys
import zlib
from collections.abc import Callable
from typing import NoReturn

FORMAT_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)


class DataError(Exception):
    """A file or a sample cannot be used. The message is one sentence that says what is wrong and the way out."""

    def __init__(self, sentence: str):
        # A DataLoader raises a worker's exception again, with the worker's traceback as its message and the sentence at
        # its end.
        super().__init__(sentence.rsplit("DataError: ", 1)[-1].strip())


class NoObject(DataError):
    """A photograph has no object to segment: it is not damaged, but of no use in training."""


def say(sentence: str) -> None:
    """Prints a sentence on stderr, of several ranks on rank 0 alone."""
    ranks = map(os.environ.get, ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"))
    if next(filter(None, ranks), "0") == "0":
        print(sentence, file=sys.stderr)


def command(main: Callable[[], None]) -> NoReturn:
    """Runs a command: errors become one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
