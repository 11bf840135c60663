"""Process pool for jobs of many images each, with one progress bar over the images."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.errors import DataError

ShardJob = TypeVar("ShardJob")
Result = TypeVar("Result")
Work = Callable[[ShardJob, Callable[[], None]], Result]
POLL_SECONDS = 0.2  # between two updates of the progress

_done: Any = None  # in a worker: the shared counter of images that all workers have done


class Bar(Progress):
    """Progress bar over images, with rate and remaining time."""

    def __init__(self, what: str, total: int):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        rate = TextColumn("{task.fields[rate]}")
        super().__init__(*columns, rate, TimeRemainingColumn(), console=Console(stderr=True))
        self.images = self.add_task(what, total=total, rate="")

    def count(self, images: int) -> None:
        self.advance(self.images, images)
        task = self.tasks[0]
        self.update(self.images, rate=f"{task.completed / max(task.elapsed or 0, 1e-3):,.0f} images/s")

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def cores() -> int:
    """Returns the number of CPU cores that this process may use. Schedulers often grant fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def run(
    work: Work[ShardJob, Result], tasks: Iterable[ShardJob], jobs: int, what: str, images: int
) -> Iterator[tuple[Iterator[Result], Bar]]:
    """Yields the results of `work(task, tick)` in the order of completion, and the bar that shows the progress.

    work          function of a module, which calls tick() after each image
    tasks         iterated lazily, a few ahead of the results
    jobs          processes, which end with the block; 1: works in this process
    what, images  label and length of the bar

    Raises DataError if a process was killed.
    """
    if jobs == 1:
        with Bar(what, images) as bar:
            yield (work(task, partial(bar.count, 1)) for task in tasks), bar
        return
    # Workers fork from a server without threads, which imports torch once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.pack.writer"])
    done = context.Value("q", 0)
    # Nothing is ever sent. When the parent's end closes, the parent has died or wants no more results.
    lifeline, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(jobs, context, _prepare, (done, lifeline))
    try:
        with Bar(what, images) as bar:
            yield _results(pool, work, iter(tasks), 2 * jobs, done, bar.count), bar
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, most likely for want of memory. Repeat the command with fewer --jobs."
        ) from None
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        lifeline.close()


def _results(
    pool: ProcessPoolExecutor, work: Work, tasks: Iterator, most: int, done: Any, advance: Callable[[int], None]
) -> Iterator:
    """Yields results, with at most `most` tasks submitted at a time."""
    waiting: set[Future] = set()
    reported = 0
    while True:
        while len(waiting) < most and (task := next(tasks, None)) is not None:
            waiting.add(pool.submit(work, task, _tick))
        if not waiting:
            return
        finished, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
        now = done.value
        advance(now - reported)
        reported = now
        for future in finished:
            yield future.result()


def _prepare(done: Any, lifeline: Connection) -> None:
    """Sets up a worker before its first task."""
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent handles Ctrl-C.
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)


def _tick() -> None:
    """Counts one image, in a worker."""
    with _done.get_lock():
        _done.value += 1
