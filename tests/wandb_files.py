"""What lies in the files that W&B writes before it sends anything, or instead."""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768
HEADER = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    """Those of a run-ID.wandb, which is a LevelDB log after its first seven bytes; one that was cut off is left out."""
    contents = path.read_bytes()
    assert contents[:4] == b":W&B"
    place, pieces = 7, b""
    while place + HEADER.size <= len(contents):
        if (left := BLOCK - place % BLOCK) < HEADER.size:
            place += left
            continue
        checksum, length, kind = HEADER.unpack_from(contents, place)
        piece = contents[place + HEADER.size : place + HEADER.size + length]
        if len(piece) < length:
            return
        assert zlib.crc32(bytes([kind]) + piece) == checksum
        pieces = piece if kind in (WHOLE, FIRST) else pieces + piece
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(pieces)
            yield record
        place += HEADER.size + length


def ended(path: Path) -> Path:
    """Returns the file once the end of its run is written, which W&B's process does after `finish` has returned."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(AssertionError, struct.error):  # a record that is half written
            if any(record.HasField("exit") for record in records(path)):
                return path
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end")


def rows(path: Path) -> list[dict[str, Any]]:
    """Returns what was logged, in order; nested names are joined by a slash."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.HasField("history")
    ]


def config(path: Path) -> dict[str, Any]:
    """Returns the settings that the run was told."""
    items = [item for record in records(path) if record.HasField("config") for item in record.config.update]
    return {item.key: json.loads(item.value_json) for item in items}


def summary(path: Path) -> dict[str, Any]:
    """Returns the last value of everything that was put into the summary."""
    items = [item for record in records(path) if record.HasField("summary") for item in record.summary.update]
    return {item.key: json.loads(item.value_json) for item in items}


def artifacts(path: Path) -> list[Any]:
    """Returns the artifacts that were logged, without the tables that are artifacts to W&B as well."""
    return [
        record.artifact
        for record in records(path)
        if record.HasField("artifact") and record.artifact.type != "run_table"
    ]
