"""Signals that tell a run to stop: outside of its training loop it ends at once, for nothing would be lost.

1 stop_at_once     from the program's first moment on, `Stopped` is raised in the main thread, wherever that is
2 _end_if_kept     a thread ends the process if the main thread cannot: it waits for other ranks or threads in a library
3 ask_for_requeue  rank 0 requeues the job if nobody else does and it shall come back
4 leave            says so, and exits with 143 or 130

In the training loop `mae.callbacks.stop_on_signal` answers instead: the ranks finish a step and save. Loads no torch.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from mae.distributed.rank_zero import is_rank_zero, say, say_at_once
from mae.distributed.restarts import NotedExit, note_in_journal

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
KEPT_SECONDS = 5.0  # that the main thread may be kept by a library before the process ends without it
LEAVE_SECONDS = 30.0  # that it then has for its farewell, of which W&B's may be long
BEFORE = "before its first step: nothing is lost, run the same command again"
AFTER = "after its last step, which is saved: run the same command to finish"


class Stopped(BaseException):
    """Ends a run that was told to stop. The exit codes are a shell's for SIGINT and SIGTERM. No library catches it.

    step    after which all ranks have agreed to stop, and saved; None: this rank has stopped at once
    asked   whether the end is on purpose, as `requeue` says; None if SLURM was not asked yet
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        saved = f"after step {step}, checkpoint saved; run the same command to resume"
        super().__init__(f"stopped by {signal.Signals(signum).name} {program.where if step is None else saved}".strip())
        self.signum, self.step = signum, step
        self.exit_code = 130 if signum == signal.SIGINT else 143
        self.asked: bool | None = None


class Program:
    """What a signal finds.

    where        what is said of the place at which a run is stopped at once
    in_training  StopOnSignal answers
    told         `Stopped` was raised at once
    interrupts   how often Ctrl-C came
    ending       set when it ends, for whatever reason: signals are not heard any more
    left         set when it has ended
    """

    def __init__(self) -> None:
        self.pid, self.where, self.in_training = os.getpid(), "", False
        self.told, self.interrupts = False, 0
        self.ending, self.left = threading.Event(), threading.Event()

    def begin_run(self) -> None:
        """Has signals answered at once, also after another run of this process has ended."""
        self.where, self.told = BEFORE, False
        self.ending.clear()


program = Program()
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a worker's signals are not its parent's


def hangup_ignored() -> bool:
    """Returns True if this process was started to ignore that its terminal closes, as nohup does."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Answers signals within the block: it ends by `leave`, wherever it is. Later ones do not change how it has ended.

    A program that was started to ignore SIGHUP goes on when its terminal closes. A second Ctrl-C ends it as it stands.
    """
    program.__init__()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handled = [signum for signum in HANDLED if signum != signal.SIGHUP or not hangup_ignored()]
    for signum in handled:
        signal.signal(signum, _raise)
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_end_if_kept, args=(reading,), name="stop", daemon=True)
    thread.start()
    try:
        yield
    except Stopped as stop:
        leave(stop)
    finally:
        for signum in handled:
            signal.signal(signum, signal.SIG_DFL if signum == signal.SIGINT else signal.SIG_IGN)
        signal.set_wakeup_fd(wakeup)
        program.left.set()
        os.close(writing)
        thread.join()
        os.close(reading)


def _raise(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != program.pid:  # a worker that is being started
        return
    if signum == signal.SIGINT:
        program.interrupts += 1
        if program.interrupts > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
    if not program.told and not program.ending.is_set():
        program.told = True
        raise Stopped(signum)


def _end_if_kept(reading: int) -> None:
    """Waits for the numbers of signals, which arrive here whatever the main thread does, and ends the process."""
    while received := os.read(reading, 1):
        if received[0] not in HANDLED or program.in_training:
            continue
        if not program.ending.wait(KEPT_SECONDS):
            if program.in_training:  # it has begun since, and the signal is noted
                continue
            stop = Stopped(received[0])
            ask_for_requeue(stop)
            say_at_once(str(stop))
            _note_end(stop)
            os._exit(stop.exit_code)
        if not program.left.wait(LEAVE_SECONDS):
            os._exit(Stopped(received[0]).exit_code)


def ask_for_requeue(stop: Stopped) -> None:
    """Has rank 0 requeue the SLURM job of a run that is stopped if nobody else does. Asks once."""
    program.ending.set()
    if stop.asked is None:
        from mae.distributed.requeue import requeue

        stop.asked = requeue(stop.signum, agreed=stop.step is not None)


def leave(stop: Stopped) -> NoReturn:
    """Says why the program ends, and exits: all ranks together if they have agreed to stop."""
    ask_for_requeue(stop)
    say(str(stop))
    if stop.step is not None:
        from mae.distributed.launch import leave_together

        leave_together(stop.exit_code)
    _note_end(stop)
    raise NotedExit(stop.exit_code)


def _note_end(stop: Stopped) -> None:
    """Has the batch script not take an end at once for a crash. Only rank 0 knows: if it dies before, that is one."""
    if stop.asked and is_rank_zero():
        note_in_journal(f"end {stop.exit_code}")
