"""Processes recognised again: whether one that is named in a file still lives, and whether this one's launcher does.

Loads no torch: a rank notes its launcher as soon as it starts.
"""

import os
import signal
import threading
import time
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

GRACE_SECONDS = 45  # from SIGTERM to the exit of a rank whose launcher is gone


class Process(NamedTuple):
    """One process among those of all machines and times; a process id alone is given again and again.

    machine  number of this boot of the machine and of the container's PID namespace; 0: not known
    started  clock ticks from the boot to its start
    """

    machine: int
    pid: int
    started: int


@cache
def machine() -> int:
    """Returns the number of this boot and PID namespace; 0 where there is no /proc, or that of another namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        if os.readlink("/proc/self") != str(os.getpid()):
            return 0
        return int.from_bytes(sha256(boot + os.readlink("/proc/self/ns/pid").encode()).digest()[:7], "big")
    except OSError:
        return 0


def identify(pid: int) -> Process:
    """Returns the process that has this number now; `started` is -1 if none has, or only its exit code is left."""
    stat = _stat(pid)
    return Process(machine(), pid, int(stat[19]) if stat and stat[0] not in "ZX" else -1)


def is_dead(process: Process) -> bool:
    """Returns True if the process has ended; False also if nothing is known of it: on another machine, or hidden."""
    if process.machine != machine() or machine() == 0 or identify(process.pid) == process:
        return False
    try:
        os.kill(process.pid, 0)
    except PermissionError:  # another user's, whose /proc may be hidden (hidepid)
        return False
    except ProcessLookupError:
        pass
    return True


def _stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat from the state on; none if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() if machine() else []
    except OSError:
        return []


def _parent(pid: int) -> int:
    """Returns the parent of a process; 0 if the process is gone."""
    if pid == os.getpid():
        return os.getppid()
    stat = _stat(pid)
    return int(stat[1]) if stat else 0


# torchrun makes each rank, or the script around it, the leader of a session.
LEADER = os.getsid(0) or os.getpid()
LAUNCHER = _parent(LEADER)


def end_with_launcher() -> None:
    """Has this rank end when torchrun is gone: by SIGTERM, on which a run saves, at last by an exit.

    A torchrun that is killed (SIGKILL, out of memory) leaves its ranks running: they would train on beside a restart.
    """

    def watch() -> None:
        while _parent(LEADER) == LAUNCHER:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)  # a rank that waits for a dead one never gets to its next step
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="end_with_launcher", daemon=True).start()
