"""Which runs are under way: by the processes in their leases, or by looking whether the leases are renewed.

Clocks of two machines are never compared. A run on this machine is known by its processes, at once. Any other is looked
at: one whose lease changes is under way, one whose lease stays as it is for SILENT_SECONDS has ended.
"""

import sys
import time
from pathlib import Path
from typing import NamedTuple

from mae.distributed.processes import identify, is_dead
from mae.run.lease import RENEW_SECONDS, parse_lease, read_lease

SILENT_SECONDS = 1.5 * RENEW_SECONDS
POLL_SECONDS = 0.5


class Look(NamedTuple):
    """A lease as it was seen.

    since    monotonic seconds at the first look at this form of it
    renewed  whether another form was seen before
    """

    lease: bytes
    since: float
    renewed: bool


class SignsOfLife:
    """Looks at leases again and again."""

    def __init__(self) -> None:
        self.looks: dict[Path, Look] = {}
        self.said = False  # why the first look takes a while

    def look(self, run: Path) -> bool | None:
        """Returns whether a run is under way; None if that needs another look, later."""
        lease = read_lease(run)
        if lease is None:
            self.looks.pop(run, None)
            return False
        if (known := _known_here(lease)) is not None:
            return known
        now, before = time.monotonic(), self.looks.get(run)
        if before is None or before.lease != lease:
            self.looks[run] = Look(lease, now, renewed=before is not None)
            return True if before is not None else None
        if now - before.since > SILENT_SECONDS:
            return False
        return True if before.renewed else None

    def watch(self, runs: list[Path]) -> dict[Path, bool]:
        """Returns which runs are under way. Takes SILENT_SECONDS at most, and no time for those of this machine."""
        alive: dict[Path, bool] = {}
        while open_runs := [run for run in runs if run not in alive]:
            looks = {run: self.look(run) for run in open_runs}
            alive |= {run: life for run, life in looks.items() if life is not None}
            if waiting := len(open_runs) - len(alive.keys() & set(open_runs)):
                if not self.said and sys.stderr.isatty():
                    said = (
                        f"looking whether {waiting} runs of other machines go on: {SILENT_SECONDS:.0f} seconds at most"
                    )
                    print(said, file=sys.stderr)
                self.said = True
                time.sleep(POLL_SECONDS)
        return alive


def _known_here(lease: bytes) -> bool | None:
    """Returns whether a process of the lease lives, as far as this machine can tell."""
    processes = parse_lease(lease).get("processes", [])
    if any(process.started >= 0 and identify(process.pid) == process for process in processes):
        return True
    return False if processes and all(map(is_dead, processes)) else None
