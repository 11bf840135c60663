"""Samples that cannot be read: counted, written down, and too many of them end the run."""

import json
from pathlib import Path
from typing import Any

from data.errors import DataError

JUDGED_AFTER = 1000
LISTED = 5


class Faults:
    """Counts what one rank meets.

    path      a line of JSON is appended to it for each bad sample: shard, key, reason, epoch, position; or None
    fraction  of the samples that may be bad, judged after the first 1,000

    After a resume the samples since the checkpoint are met, and written down, again.
    """

    def __init__(self, path: Path | None, fraction: float):
        self.path, self.fraction = path, fraction
        self.seen = self.bad = 0
        self.last: dict[tuple[str, str], str] = {}  # reason by shard and key

    def note(self, seen: int, bad: list[dict[str, Any]]) -> None:
        """DataError: more than the fraction of all samples seen so far are bad; lists the last of them."""
        self.seen += seen
        self.bad += len(bad)
        if not bad:
            return
        found = self.last | {(record["shard"], record["key"]): record["reason"] for record in bad}
        self.last = dict(list(found.items())[-LISTED:])
        if self.path is not None:
            with open(self.path, "a") as file:  # one write, so that the lines of several ranks do not mix
                file.write("".join(json.dumps(record) + "\n" for record in bad))
        if self.seen >= JUDGED_AFTER and self.bad > self.fraction * self.seen:
            listed = "; ".join(f"{shard}, {key}: {reason}" for (shard, key), reason in self.last.items())
            raise DataError(
                f"{self.bad} of {self.seen} samples cannot be read, more than data.max_bad_fraction={self.fraction:g}. "
                f"The last are: {listed}. "
                f"{f'{self.path} lists all. ' if self.path else ''}"
                "Repair or pack the images again, or raise data.max_bad_fraction."
            )
