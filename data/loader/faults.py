"""Bad samples: counts them, records them in a file, and ends the run if they are too many."""

import json
import sys
from pathlib import Path
from typing import Any

from data.errors import DataError

MIN_SEEN = 1000  # samples before the fraction of bad ones is judged
LAST_SHOWN = 5  # bad samples in the message


class Faults:
    """Counts the bad samples of one rank.

    path      a file that gets a line of JSON for each: shard, key, reason, epoch, position; None: no file
    fraction  of the samples that may be bad

    Photographs without an object ("damaged": false) are replaced as well, but are no damage: each is recorded once,
    the first is said, and none counts. After a resume the bad samples since the checkpoint are recorded again.
    """

    def __init__(self, path: Path | None, fraction: float):
        self.path, self.fraction = path, fraction
        self.seen = self.bad = 0
        self.last: dict[tuple[str, str], str] = {}  # reason by shard and key
        self.empty: set[tuple[str, str]] = set()  # shard and key of the photographs without an object

    def note(self, seen: int, bad: list[dict[str, Any]]) -> None:
        """Counts and records bad samples. Raises DataError if they exceed `fraction` of all samples seen so far."""
        self.seen += seen
        recorded = [record for record in bad if record.get("damaged", True) or self._is_new(record)]
        if self.path is not None and recorded:
            with open(self.path, "a") as file:  # one write, so that the lines of several ranks do not mix
                file.write("".join(json.dumps(record) + "\n" for record in recorded))
        damaged = [record for record in recorded if record.get("damaged", True)]
        if not damaged:
            return
        self.bad += len(damaged)
        found = self.last | {(record["shard"], record["key"]): record["reason"] for record in damaged}
        self.last = dict(list(found.items())[-LAST_SHOWN:])
        if self.seen >= MIN_SEEN and self.bad > self.fraction * self.seen:
            listed = "; ".join(f"{shard}, {key}: {reason}" for (shard, key), reason in self.last.items())
            raise DataError(
                f"{self.bad} of {self.seen} samples cannot be read, more than data.max_bad_fraction={self.fraction:g}. "
                f"The last are: {listed}. "
                f"{f'{self.path} lists all. ' if self.path else ''}"
                "Repair or pack the images again, or raise data.max_bad_fraction."
            )

    def _is_new(self, record: dict[str, Any]) -> bool:
        """Returns whether this photograph without an object is met for the first time; says so of the first of all."""
        place = record["shard"], record["key"]
        if not self.empty:
            where = f" All are listed in {self.path}." if self.path else ""
            print(
                f"{place[1]} of {place[0]} has no object to train on ({record['reason']}): other photographs are shown "
                f"in the place of such ones, which does not count as damage.{where}",
                file=sys.stderr,
            )
        return place not in self.empty and not self.empty.add(place)
