"""Lease of a run folder: one start at a time writes there, on whatever machine its ranks are.

1 await_turn  every rank: waits while another start goes on renewing the lease it finds
2 hold_lease  rank 0 takes the lease and renews it every RENEW_SECONDS; it is removed at the end
3 share       every rank renews it if it sees nobody else do so: it lasts as long as any rank lives
4 check       before a checkpoint is written: ends a process whose lease is another's by now

A lease that changes while somebody looks on is alive; no clocks of two machines are compared. It counts as dead without
waiting if all its processes were on this machine and have ended.
"""

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
from mae.distributed.restarts import launch_names, start_name
from mae.errors import ConfigError

NAME = "lease.json"
RENEW_SECONDS = 10.0
WAIT_SECONDS = 60.0  # in which the other start has to end, or its lease to stay as it is
POLL_SECONDS = 1.0


def await_turn(run: Path, rank: int) -> bytes | None:
    """Returns the lease that another start left behind, as soon as nobody renews it any more; None if there is none.

    Writes nothing. Raises ConfigError if the other start still renews its lease after WAIT_SECONDS.
    """
    lease = read_lease(run)
    if not _blocks(lease, rank):
        return lease
    say(f"{run} is in use: {_holder(lease)}. Waiting until it ends, at most about a minute")
    began = changed = time.monotonic()
    while _blocks(lease, rank) and time.monotonic() - changed <= WAIT_SECONDS:
        time.sleep(POLL_SECONDS)
        if (latest := read_lease(run)) != lease:
            lease, changed = latest, time.monotonic()
            if _blocks(lease, rank) and changed - began > WAIT_SECONDS:
                raise _in_use(run, lease)
    return lease


def _blocks(lease: bytes | None, rank: int) -> bool:
    """Returns False if there is no lease, its processes are known to be dead, or rank 0 of this start has taken it."""
    if lease is None:
        return False
    contents = parse_lease(lease)
    if rank != 0 and contents.get("start") == start_name():
        return False
    processes = contents.get("processes")
    return not processes or not all(map(is_dead, processes))


def is_in_use(run: Path, rank: int) -> bool:
    """Returns whether another start may be writing in this folder now, without waiting to see."""
    return _blocks(read_lease(run), rank)


def read_lease(run: Path) -> bytes | None:
    """Returns the lease in a run folder; None if there is none, or it cannot be read."""
    # Opening by name asks a network file system for the newest contents.
    try:
        return (run / NAME).read_bytes()
    except OSError:
        return None


def parse_lease(lease: bytes | None) -> dict[str, Any]:
    """Returns the contents of a lease; nothing if a power failure has damaged it: only its changes count then."""
    try:
        contents = json.loads(lease or b"")
        contents["processes"] = [Process(*process) for process in contents["processes"]]
    except (ValueError, TypeError, LookupError):
        return {}
    return contents if {"token", "host", "pid", "time"} <= contents.keys() else {}


def _holder(lease: bytes | None) -> str:
    contents = parse_lease(lease)
    if not contents:
        return f"somebody renews its {NAME}, which cannot be read,"
    return f"process {contents['pid']} on {contents['host']} has been writing there since {contents['time']}"


def _in_use(run: Path, lease: bytes | None) -> ConfigError:
    return ConfigError(
        f"{run} is in use: {_holder(lease)} and goes on. Wait until it has ended, stop it, or choose another name="
    )


@contextmanager
def hold_lease(run: Path, rank: int, ranks: int, left_behind: bytes | None) -> Iterator["Lease"]:
    """Makes the run folder and holds its lease within the block.

    left_behind  what `await_turn` has returned

    Raises ConfigError on rank 0 if the folder cannot be written, or another start has taken the lease since.
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
            "job": launch_names().get("SLURM job"),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "start": start_name() if ranks > 1 else "",
            "processes": [identify(os.getpid())] if ranks == 1 else [],  # of all ranks, as soon as they are known
        }
        self.seen: bytes | None = None  # the lease at the last look
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self, left_behind: bytes | None) -> None:
        """Takes the lease in the place of a dead one, in a folder that is made. Raises ConfigError if it cannot."""
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            if left_behind is not None:
                self._remove(left_behind)
            try:
                (self.run / NAME).touch(exist_ok=False)
            except FileExistsError:
                raise _in_use(self.run, read_lease(self.run)) from None
            self._write()
        except OSError as error:
            reason = "a link that leads nowhere" if self.run.is_symlink() and not self.run.exists() else error.strerror
            raise ConfigError(
                f"the run folder {self.run} cannot be written ({reason}). Choose another place with runs= or name="
            ) from error
        self.thread.start()

    def _remove(self, left_behind: bytes) -> None:
        """Removes a dead lease. Of several starts that have waited for it, on any nodes, one can rename it."""
        lease, aside = self.run / NAME, self.run / f"{NAME}.{self.contents['token']}.tmp"
        with suppress(FileNotFoundError):  # another start was faster, or its holder has removed it
            lease.rename(aside)
            if aside.read_bytes() != left_behind:
                aside.rename(lease)
                raise _in_use(self.run, read_lease(self.run))
            aside.unlink()

    def share(self, token: str, processes: Sequence[Sequence[int]]) -> None:
        """Has this rank renew the lease too. Called on every rank, while rank 0 holds it.

        token      rank 0's
        processes  of all ranks
        """
        self.contents |= {"token": token, "processes": processes}
        if self.rank == 0:
            self._write()
        else:
            self.thread.start()

    def _keep(self) -> None:
        while not self.ended.wait(RENEW_SECONDS):
            with suppress(OSError):  # a full disk, a server that is away
                self.look()

    def look(self) -> None:
        """Renews the lease: rank 0 always, others if nobody has since their last look."""
        lease = self.check()
        if self.rank == 0 or (lease is not None and lease == self.seen):
            self._write()
        self.seen = lease

    def check(self) -> bytes | None:
        """Returns the lease. Ends this process at once if it is another's: this one has stood still for a minute."""
        lease = read_lease(self.run)
        if parse_lease(lease).get("token", self.contents["token"]) != self.contents["token"]:
            sentence = f"{self.run} was taken over while this start stood still: {_holder(lease)}. This one ends here"
            with suppress(OSError):
                os.write(2, f"error: {sentence}\n".encode())
            os._exit(2)  # without another word to the folder
        return lease

    def _write(self) -> None:
        """Writes the lease, other bytes each time."""
        temporary = self.run / f"{NAME}.{secrets.token_hex(4)}.tmp"
        try:
            temporary.write_text(json.dumps({**self.contents, "renewal": secrets.token_hex(4)}) + "\n")
            os.replace(temporary, self.run / NAME)  # unflushed: it is of no use after a crash of the machine
        finally:
            temporary.unlink(missing_ok=True)

    def release(self) -> None:
        """Ends renewing. Rank 0 removes the lease if it is still this start's."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join(RENEW_SECONDS)
        if self.rank == 0 and parse_lease(read_lease(self.run)).get("token") == self.contents["token"]:
            with suppress(OSError):
                (self.run / NAME).unlink()
