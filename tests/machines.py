"""Several machines with a shared folder: forked processes with mount namespaces of their own, for root alone.

Each has the folder at another path, and takes the processes of the others for those of another machine. No server of
NFS is there: what one machine writes the others see at once.
"""

import ctypes
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mae.distributed import processes

NEW_MOUNTS, BIND, RECURSIVE, PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000


def on_machines(count: int, shared: Path, work: Callable[[int, Path], Any]) -> list[Any]:
    """Returns what `work(number, folder)` returns on each machine; `folder` is the shared one there."""
    libc = ctypes.CDLL(None)

    def machine(number: int, answers: Any) -> None:
        folder = shared.with_name(f"mounted-{number}")
        folder.mkdir()
        private = b"none", b"/", None, RECURSIVE | PRIVATE, None
        here = os.fsencode(shared), os.fsencode(folder), None, BIND, None
        if libc.unshare(NEW_MOUNTS) or libc.mount(*private) or libc.mount(*here):
            answers.put("may not mount")
        else:
            processes.machine = lambda: number + 1
            os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count)}
            answers.put((number, work(number, folder)))

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    started = [context.Process(target=machine, args=(number, answers)) for number in range(count)]
    for process in started:
        process.start()
    found = [answers.get(timeout=60) for _ in started]
    for process in started:
        process.join()
    if "may not mount" in found:
        pytest.skip("may not mount a shared folder")
    return [answer for _, answer in sorted(found)]
