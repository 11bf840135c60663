"""Lease of a run folder: one start at a time writes there, on whatever machine its ranks are.

1 await_turn  every rank: waits while another start goes on renewing the lease it finds
2 hold_lease  rank 0 takes the lease and renews it every RENEW_SECONDS; it is removed at the end
3 share       every rank renews it if it sees nobody else do so: it lasts as long as any rank lives

A lease that changes while somebody looks on is alive; no clocks of two machines are compared. It counts as dead without
waiting if all its processes were on this machine and have ended.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mae.distributed.processes import Process, identify, is_dead
from mae.distributed.rank_zero import say
from mae.distributed.restarts import start_name
from mae.errors import ConfigError

NAME = "lease.json"
RENEW_SECONDS = 10.0
WAIT_SECONDS = 60.0  # in which the other start has to end, or its lease to stay as it is
POLL_SECONDS = 1.0


def await_turn(run: Path, rank: int) -> bytes | None:
    """Returns the lease that another start left behind, as soon as nobody renews it any more; None if there is none.

    Writes nothing. Raises ConfigError if the other start still renews its lease after WAIT_SECONDS.
    """
    lease = _read(run)
    if not _blocks(lease, rank):
        return lease
    say(f"{run} is in use: {_holder(lease)}. Waiting until it ends, at most about a minute")
    began = changed = time.monotonic()
    while True:
        time.sleep(POLL_SECONDS)
        latest, now = _read(run), time.monotonic()
        if not _blocks(latest, rank) or (latest == lease and now - changed > WAIT_SECONDS):
            return latest
        if latest != lease:
            lease, changed = latest, now
            if now - began > WAIT_SECONDS:
                raise _in_use(run, lease)


def _blocks(lease: bytes | None, rank: int) -> bool:
    """Returns False if there is no lease, its processes are known to be dead, or rank 0 of this start has taken it."""
    if lease is None:
        return False
    contents = _parse(lease)
    if rank != 0 and contents.get("start") == start_name():
        return False
    processes = contents.get("processes", [])
    return len(processes) != contents.get("ranks") or not all(map(is_dead, processes))


def _read(run: Path) -> bytes | None:
    # Opening by name asks a network file system for the newest contents.
    try:
        return (run / NAME).read_bytes()
    except OSError:
        return None


def _parse(lease: bytes | None) -> dict[str, Any]:
    """Returns the contents of a lease; nothing if a power failure has damaged it: only its changes count then."""
    try:
        contents = json.loads(lease or b"")
        contents["processes"] = [Process(*process) for process in contents["processes"]]
    except (ValueError, TypeError, LookupError):
        return {}
    return contents if {"token", "host", "pid", "time", "ranks"} <= contents.keys() else {}


def _holder(lease: bytes | None) -> str:
    contents = _parse(lease)
    if not contents:
        return f"somebody renews its {NAME}, which cannot be read,"
    return f"process {contents['pid']} on {contents['host']} has been writing there since {contents['time']}"


def _in_use(run: Path, lease: bytes | None) -> ConfigError:
    return ConfigError(
        f"{run} is in use: {_holder(lease)} and goes on. Wait until it has ended, stop it, or choose another name="
    )


@contextmanager
def hold_lease(run: Path, rank: int, ranks: int, left_behind: bytes | None) -> Iterator["Lease"]:
    """Holds the lease of a run folder within the block.

    left_behind  what `await_turn` has returned

    Raises ConfigError on rank 0 if another start has taken it since.
    """
    lease = Lease(run, rank, ranks)
    if rank == 0:
        lease.take(left_behind)
    try:
        yield lease
    finally:
        lease.release()


class Lease:
    """This rank's part in the lease of a run folder."""

    def __init__(self, run: Path, rank: int, ranks: int) -> None:
        self.run, self.rank = run, rank
        self.contents: dict[str, Any] = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "start": start_name() if ranks > 1 else "",
            "ranks": ranks,
            "processes": [identify(os.getpid())],
        }
        self.seen: bytes | None = None
        self.unchanged = 0  # looks in a row at which nobody had renewed the lease
        self.written = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self, left_behind: bytes | None) -> None:
        """Takes the lease in the place of a dead one. Raises ConfigError if there is another by now."""
        folder = os.open(self.run, os.O_RDONLY)
        try:
            with suppress(OSError):  # on some network file systems; then the next renewal finds out
                fcntl.flock(folder, fcntl.LOCK_EX)
            lease = _read(self.run)
            if lease != left_behind and lease is not None:
                raise _in_use(self.run, lease)
            if lease is None:
                with open(self.run / NAME, "x"):  # fails if another start is faster
                    pass
            self._write()
        except FileExistsError:
            raise _in_use(self.run, _read(self.run)) from None
        finally:
            os.close(folder)
        self.thread.start()

    def share(self, processes: Sequence[Sequence[int]]) -> None:
        """Has this rank renew the lease too. Called on every rank, while rank 0 holds it.

        processes  of all ranks
        """
        if self.rank == 0:
            self.contents["processes"] = [list(process) for process in processes]
            self._write()
        else:
            self.contents = {}  # those of rank 0, at the first look
            self.thread.start()

    def _keep(self) -> None:
        while not self.ended.wait(RENEW_SECONDS):
            with suppress(OSError):  # a full disk, a server that is away
                self.look()

    def look(self) -> None:
        """Renews the lease: rank 0 always, others if nobody has since their last two looks. Ends the process if it is
        another's by now.
        """
        lease = _read(self.run)
        contents = _parse(lease)
        if not self.contents and contents.get("start") == start_name():
            self.contents = contents
        if contents and self.contents and contents.get("token") != self.contents["token"]:
            self._leave(lease)
        self.unchanged = self.unchanged + 1 if lease == self.seen else 0
        self.seen = lease
        if self.rank == 0 or (self.unchanged >= 2 and self.contents):
            self._write()

    def _leave(self, lease: bytes | None) -> None:
        """Ends this process at once, without another word to the folder: it has stood still for a minute or more."""
        sentence = (
            f"error: {self.run} was taken over while this start stood still: {_holder(lease)}. This one ends here\n"
        )
        with suppress(OSError):
            os.write(2, sentence.encode())
        os._exit(2)

    def _write(self) -> None:
        """Writes the lease, other bytes each time."""
        temporary = self.run / f"{NAME}.{secrets.token_hex(4)}.tmp"
        try:
            temporary.write_text(json.dumps({**self.contents, "renewal": secrets.token_hex(4)}) + "\n")
            os.replace(temporary, self.run / NAME)  # unflushed: it is of no use after a crash of the machine
        finally:
            temporary.unlink(missing_ok=True)
        self.written = True

    def release(self) -> None:
        """Ends renewing; removes the lease if this rank has written it and it is still this start's."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join(RENEW_SECONDS)
        if self.written and _parse(_read(self.run)).get("token") == self.contents["token"]:
            with suppress(OSError):
                (self.run / NAME).unlink()
