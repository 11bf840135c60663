"""The best value of a metric and its step, from all rows of metrics.csv, each of which is read once."""

import os
from collections.abc import Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import BinaryIO, NamedTuple


class Best(NamedTuple):
    value: float
    step: int  # the first at which it was reached


class BestValues:
    """Looks at files again and again, as --watch does, and reads what was added since."""

    def __init__(self, signs: Mapping[str, int]) -> None:
        """signs  metric -> 1 if higher values are better, -1 if lower ones are"""
        self.signs = signs
        self.read: dict[Path, tuple[int, int, dict[str, Best]]] = {}  # file -> inode, bytes read, what was found

    def look(self, path: Path) -> dict[str, Best]:
        """Returns metric -> best, of those that have a finite value. Raises OSError if the file cannot be read."""
        with open(path, "rb") as file:
            inode, begin, found = self.read.get(path, (0, 0, dict[str, Best]()))
            state = os.fstat(file.fileno())
            if inode != state.st_ino or begin > state.st_size:  # a resume, or a new column, puts another in its place
                begin, found = 0, {}
            columns = file.readline().rstrip(b"\r\n").decode(errors="replace").split(",")
            file.seek(begin or file.tell())
            places = {name: columns.index(name) for name in self.signs if name in columns}
            end = self._read(file, columns, places, found) if places else begin
            self.read[path] = (state.st_ino, end, found)
        return found

    def _read(self, file: BinaryIO, columns: list[str], places: dict[str, int], found: dict[str, Best]) -> int:
        """Adds what the lines say that are whole, and returns where they end."""
        end = file.tell()
        commas = b"," * (len(columns) - min(places.values()))
        nothing = (commas + b"\r\n", commas + b"\n")  # how most lines end: from the first of these columns on
        for line in file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            if line.endswith(nothing) or line.count(b",") != len(columns) - 1:
                continue
            cells = line.rstrip(b"\r\n").split(b",")
            for name, place in places.items():
                if cells[place]:
                    with suppress(ValueError, OverflowError):  # damaged
                        now, sign = Best(float(cells[place]), int(cells[columns.index("step")])), self.signs[name]
                        if isfinite(now.value) and (name not in found or sign * (now.value - found[name].value) > 0):
                            found[name] = now
        return end
