"""Bad samples: counts them, records them in a file, and ends the run if they are too many."""

import json
from pathlib import Path
from typing import Any

from data.errors import DataError

MIN_SEEN = 1000  # samples before the fraction of bad ones is judged
LAST_SHOWN = 5  # bad samples in the message


class Faults:
    """Counts the bad samples of one rank.

    path      a file that gets a line of JSON for each: shard, key, reason, epoch, position; None: no file
    fraction  of the samples that may be bad

    After a resume the bad samples since the checkpoint are recorded again.
    """

    def __init__(self, path: Path | None, fraction: float):
        self.path, self.fraction = path, fraction
        self.seen = self.bad = 0
        self.last: dict[tuple[str, str], str] = {}  # reason by shard and key

    def note(self, seen: int, bad: list[dict[str, Any]]) -> None:
        """Counts and records bad samples. Raises DataError if they exceed `fraction` of all samples seen so far."""
        self.seen += seen
        self.bad += len(bad)
        if not bad:
            return
        found = self.last | {(record["shard"], record["key"]): record["reason"] for record in bad}
        self.last = dict(list(found.items())[-LAST_SHOWN:])
        if self.path is not None:
            with open(self.path, "a") as file:  # one write, so that the lines of several ranks do not mix
                file.write("".join(json.dumps(record) + "\n" for record in bad))
        if self.seen >= MIN_SEEN and self.bad > self.fraction * self.seen:
            listed = "; ".join(f"{shard}, {key}: {reason}" for (shard, key), reason in self.last.items())
            raise DataError(
                f"{self.bad} of {self.seen} samples cannot be read, more than data.max_bad_fraction={self.fraction:g}. "
                f"The last are: {listed}. "
                f"{f'{self.path} lists all. ' if self.path else ''}"
                "Repair or pack the images again, or raise data.max_bad_fraction."
            )
