"""Work on many images in several processes, with one progress bar."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from data.errors import DataError

ShardJob = TypeVar("ShardJob")
Result = TypeVar("Result")
Work = Callable[[ShardJob, Callable[[], None]], Result]
POLL = 0.2  # seconds between two looks at what the processes have done

_done: Any = None  # In a worker: the number of images that all workers have done.


class Bar:
    """A progress bar over images, with their rate and the time that remains."""

    def __init__(self, what: str, total: int):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        rate = TextColumn("{task.fields[rate]}")
        self.progress = Progress(*columns, rate, TimeRemainingColumn(), console=Console(stderr=True))
        self.task: TaskID = self.progress.add_task(what, total=total, rate="")

    def advance(self, images: int) -> None:
        self.progress.advance(self.task, images)
        task = self.progress.tasks[0]
        self.progress.update(self.task, rate=f"{task.completed / max(task.elapsed or 0, 1e-3):,.0f} images/s")

    def say(self, line: str) -> None:
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Bar]:
    shown = Bar(what, total)
    with shown.progress:
        yield shown


def cores() -> int:
    """Those that this process may use: a scheduler often grants fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    work: Work[ShardJob, Result], tasks: Iterable[ShardJob], jobs: int, advance: Callable[[int], None]
) -> Generator[Result, None, None]:
    """The results of `work(task, tick)` as they come, from this process if jobs is 1.

    work     a function of a module; it calls tick() after each image
    tasks    taken one after the other, so that a generator needs to hold only a few of them
    advance  is told how many images were done since the last call

    Whoever stops reading before the end closes the generator (contextlib.closing), and with it the processes.
    DataError: a process was killed.
    """
    if jobs == 1:
        for task in tasks:
            yield work(task, partial(advance, 1))
        return
    # Forked from a server without threads that has torch imported once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.pack.writer"])
    done = context.Value("q", 0)
    # Nothing is ever sent: that the other end closes is the sign that the parent is gone or wants no more.
    lifeline, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(jobs, context, _prepare, (done, lifeline))
    try:
        yield from _results(pool, work, iter(tasks), 2 * jobs, _count(done, advance))
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, most likely for want of memory. Repeat the command with fewer --jobs."
        ) from None
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        lifeline.close()


def _results(pool: ProcessPoolExecutor, work: Work, tasks: Iterator, most: int, report: Callable[[], None]) -> Iterator:
    waiting: set[Future] = set()
    while True:
        while len(waiting) < most and (task := next(tasks, None)) is not None:
            waiting.add(pool.submit(_call, work, task))
        if not waiting:
            return
        finished, waiting = wait(waiting, POLL, FIRST_COMPLETED)
        report()
        for future in finished:
            yield future.result()


def _count(done: Any, advance: Callable[[int], None]) -> Callable[[], None]:
    """Tells `advance` of what was done since the last time."""
    told = 0

    def report() -> None:
        nonlocal told
        now = done.value
        advance(now - told)
        told = now

    return report


def _prepare(done: Any, lifeline: Connection) -> None:
    """Before a worker's first task."""
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair.
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)


def _call(work: Work[ShardJob, Result], task: ShardJob) -> Result:
    return work(task, _tick)


def _tick() -> None:
    with _done.get_lock():
        _done.value += 1
