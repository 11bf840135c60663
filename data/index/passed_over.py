"""What was given and is not used as it stands: counted by reason, with the first names of each, said in one line."""

import re
from collections.abc import Mapping
from typing import Any

from data.errors import DataError

EXAMPLES = 3  # names of each reason
BYTES = "bytes after the end of an archive"
ZEROS = "bytes of zeros after the end of an archive, as unfinished downloads leave them"
BESIDE = "images beside the image of their sample, not read"


class PassedOver:
    """Counts by reason, a phrase in the plural such as "links". False if there are none."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return "; ".join(map(self._say, self.counts))

    def _say(self, reason: str) -> str:
        count, names = self.counts[reason], self.names[reason]
        more = ", …" if count > len(names) and reason not in (BYTES, ZEROS) else ""
        return f"{count:,} {reason} ({', '.join(names)}{more})"

    def add(self, reason: str, *names: str, count: int | None = None) -> None:
        """Counts one for each name, or `count` of which some have these names."""
        if count := len(names) if count is None else count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            known = self.names.setdefault(reason, [])
            known += [printable(name) for name in names[: EXAMPLES - len(known)]]

    def update(self, other: "PassedOver") -> None:
        """Adds all counts of another one."""
        for reason, count in other.counts.items():
            self.add(reason, *other.names[reason], count=count)

    def but(self, reason: str) -> "PassedOver":
        """Returns the same without one reason."""
        others = PassedOver()
        others.update(self)
        others.counts.pop(reason, None)
        return others

    def to_json(self) -> dict[str, Any]:
        return {reason: {"count": count, "examples": self.names[reason]} for reason, count in self.counts.items()}

    @classmethod
    def from_json(cls, found: Any) -> "PassedOver":
        """Returns what `to_json` gave; nothing for anything else, such as a manifest of an earlier version."""
        passed_over = cls()
        for reason, entry in found.items() if isinstance(found, Mapping) else ():
            passed_over.add(reason, *entry["examples"], count=entry["count"])
        return passed_over

    def refuse(self) -> None:
        """Raises DataError if there is anything but a second image beside the first: what --strict asks for."""
        if others := self.but(BESIDE):
            raise DataError(f"--strict: passed over: {others}. Remove or mend them, or leave out --strict.")


def printable(name: str) -> str:
    """Returns a name as one line that any terminal and any JSON can hold: bytes that are not UTF-8 as \\xe9."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", _escape, name)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(found[0])[1:-1]
