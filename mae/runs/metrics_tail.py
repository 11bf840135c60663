"""The newest values in metrics.csv, from its last rows: a long run has hundreds of megabytes of them."""

from collections.abc import Mapping
from pathlib import Path

TAIL_BYTES = 1 << 16  # some hundreds of rows
LONGER_TAIL_BYTES = 1 << 18  # where a metric that is rarely logged is not among these

Values = dict[str, list[float]]  # newest first


def read_tail(path: Path, wanted: Mapping[str, int]) -> tuple[int, Values, int]:
    """Returns the last step, so many of the newest values of each metric as are wanted and found, and damaged lines.

    A last line without its line end is still being written. Raises OSError if the file cannot be read.
    """
    with open(path, "rb") as file:
        columns = file.readline(TAIL_BYTES).decode(errors="replace").rstrip("\r\n").split(",")
        begin, end = file.tell(), file.seek(0, 2)
        wanted = {name: count for name, count in wanted.items() if name in columns}
        for size in (TAIL_BYTES, LONGER_TAIL_BYTES):
            whole = end - size <= begin
            file.seek(max(begin, end - size))
            lines = file.read(size).decode(errors="replace").split("\n")
            # The first line may be cut off, and the last one is not whole yet.
            found = _newest(lines[:-1] if whole else lines[1:-1], columns, wanted)
            if whole or wanted.keys() <= found[1].keys():
                break
    return found


def _newest(lines: list[str], columns: list[str], wanted: Mapping[str, int]) -> tuple[int, Values, int]:
    """Returns what `read_tail` does, of these lines; reads no more cells of them than it needs."""
    step, values, damaged = 0, {}, 0
    missing = {"step": 1} | dict(wanted)
    places = {name: columns.index(name) for name in missing if name in columns}
    for line in reversed(lines):
        cells = line.rstrip("\r").split(",")
        try:
            if len(cells) != len(columns):
                raise ValueError("cut off")
            row = {name: float(cells[places[name]]) for name in missing if cells[places[name]]}
            step = int(row.get("step", step))
        except (ValueError, KeyError, OverflowError):
            damaged += 1
            continue
        missing.pop("step", None)
        for name in wanted.keys() & row.keys():
            values.setdefault(name, []).append(row[name])
            if len(values[name]) == wanted[name]:
                del missing[name]
        if not missing:
            break
    return step, values, damaged
