"""The one exception of this package, how its commands end on it, and what image readers raise in its place."""

import struct
import sys
import zlib
from collections.abc import Callable
from typing import NoReturn

# What readers of image formats raise on damaged files.
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
    """What is wrong with a file or with the samples, in one readable sentence that says the way out."""

    def __init__(self, sentence: str):
        # A DataLoader raises a worker's exception again with the worker's traceback as its message:
        # what a user needs of it is the sentence at its end.
        super().__init__(sentence.rsplit("DataError: ", 1)[-1].strip())


def command(main: Callable[[], None]) -> NoReturn:
    """A command line program: what is wrong becomes one line on stderr and exit code 2, Ctrl-C 130."""
    try:
        main()
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
