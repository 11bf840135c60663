"""Runs a Hydra program: refused settings become one sentence, hints of libraries are silenced. Loads no torch."""

import faulthandler
import io
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from data.storage.credentials import hide, pass_on
from mae.distributed.processes import end_with_launcher
from mae.distributed.rank_zero import say, say_error
from mae.distributed.restarts import journal_of_end
from tasks.words import readable, refusal

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"
QUIET = (
    ".*your dataloader is not resumable.*",  # it is: see MicroBatches
    ".*does not have many workers.*",  # data.workers is the user's to set
    ".*LeafSpec.*",  # Lightning's own use of torch
    "provider=hydra.searchpath in main, path=.* is not available.*",  # there are no recipes of the user's own
    ".*``noload``.*",  # MLflow's own use of SQLAlchemy
    "The `srun` command is available on your system but is not used.*",  # it is on every login node
)

failed_runs: dict[str, str] = {}  # of a multirun in this process: what differs -> why it ended


def quieten() -> None:
    """Silences hints of libraries that a user can do nothing about."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


class _Unheard(io.FileIO):
    """Standard output or error that nobody may be reading any more: what cannot be written is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # a full pipe that somebody has made non-blocking
                select.select([], [self], [])
            return written
        except OSError:  # the reader of a pipe is gone, the terminal closed, the disk of a log file full
            return memoryview(data).nbytes


def unheard(stream: TextIO) -> TextIO:
    """Returns a stream to the same file that never fails: no line on a screen is worth a run."""
    if type(stream) is not io.TextIOWrapper:  # closed, or another program's own
        return stream
    stream.flush()
    file = io.BufferedWriter(_Unheard(stream.fileno(), "w", closefd=False))
    same = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
    return io.TextIOWrapper(file, write_through=stream.write_through, **same)


@journal_of_end()
def run_program(program: Callable[[], None], prepare: Callable[[list[str]], list[str]] = list) -> None:
    """Runs a Hydra program. Settings that cannot be composed end it with one sentence and exit code 2.

    A multirun in which a run failed ends with exit code 2 too, after all of them.

    prepare  is given the words of the command line as Hydra can read them, and returns those that it shall read
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them and exiting with 1
    quieten()
    sys.stdout, sys.stderr = unheard(sys.stdout), unheard(sys.stderr)
    faulthandler.enable()  # a crash inside a library then shows the line of every thread
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    typed = sys.argv[1:]
    failed_runs.clear()
    try:
        # Hydra keeps words in multirun.yaml, environment.json and W&B keep sys.argv. Its own it needs whole.
        words = [word if word.lstrip("+").startswith("hydra") else hide(word) for word in readable(typed)]
        sys.argv[1:] = prepare(words)
        pass_on()
        program()
    except (HydraException, OmegaConfBaseException) as error:
        if FULL_ERROR:
            raise
        reason = refusal(str(error).split("Config search path")[0], Path(sys.argv[0]).stem, typed)
        say_error(hide(" ".join(reason.split())))
        sys.exit(2)
    finally:
        for run, sentence in failed_runs.items():
            say(f"failed: {run}: {sentence}", sys.stderr)
    if failed_runs:
        sys.exit(2)
