"""What is in shards: counts, formats, sizes, colours, faults, duplicates, a contact sheet.

    python -m data.inspect SHARDS…

Quick by default: the headers of at most 5,000 samples, evenly spread, and the pixels of at most 500 of them. --deep
reads and decodes every sample. Unreadable and duplicate images are looked for among the samples that are read.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.contact_sheet import SAMPLES, draw_sheet
from data.errors import DataError, command
from data.index import ShardIndex, index_tars
from data.parallel import bar, cores, run
from data.samplers import spread
from data.splits import list_shards
from data.survey import CHUNK, Survey, classes_of, look, looks

HEADERS, DECODED = 5000, 500
SHOWN = 5  # faults and duplicates in the table; --json has all of them
EDGES = (32, 64, 128, 224, 256, 384, 512, 768, 1024, 1536, 2048)
BAR = 24  # characters of the longest bar


def inspect(index: ShardIndex, *, deep: bool = False, jobs: int = 1) -> dict[str, Any]:
    """All that is found out about the samples of an index, as plain numbers."""
    samples = np.arange(len(index)) if deep else spread(len(index), HEADERS)
    decoded = samples if deep else spread(len(index), DECODED)
    if not deep:
        samples = np.union1d(samples, decoded)
    survey = Survey()
    jobs = max(1, min(jobs, len(samples) // CHUNK))
    with (
        bar("decoding" if deep else "reading", len(samples)) as shown,
        contextlib.closing(run(look, looks(index, samples, decoded), jobs, shown.advance)) as answers,
    ):
        for answer in answers:
            for seen in answer:
                survey.add(seen)
    return _found(index, survey, deep)


def _found(index: ShardIndex, survey: Survey, deep: bool) -> dict[str, Any]:
    colours = survey.colours()
    sizes = {"smallest": survey.least, "largest": survey.most}
    faults = sorted(survey.faults)
    return {
        "shards": len(index.shards),
        "samples": len(index),
        "bytes": sum(os.path.getsize(shard) for shard in index.shards),
        **classes_of(index),
        "fingerprint": index.fingerprint,
        "deep": deep,
        "read": survey.read,
        "decoded": survey.decoded,
        "formats": dict(survey.forms.most_common()),
        "modes": dict(survey.modes.most_common()),
        "shorter_sides": _histogram(survey.sides),
        "median_shorter_side": survey.median_side() if survey.sides else None,
        **{name: [header.height, header.width] if header else None for name, header in sizes.items()},
        "mean": colours[0] if colours else None,
        "std": colours[1] if colours else None,
        "corrupt": [{**_place(index, sample), "reason": reason} for sample, reason in faults],
        "duplicates": [[_place(index, sample) for sample in group] for group in survey.duplicates()],
    }


def _place(index: ShardIndex, sample: int) -> dict[str, str]:
    return {"shard": index.shards[index.locate(sample)[0]], "key": index.key(sample)}


def _histogram(sides: dict[int, int]) -> dict[str, int]:
    """Numbers of images by their shorter side, without the empty ends."""
    bounds = [0, *EDGES, sys.maxsize]
    names = [f"below {EDGES[0]}", *(f"{a} to {b - 1}" for a, b in itertools.pairwise(EDGES)), f"from {EDGES[-1]}"]
    counts = np.histogram(list(sides), bounds, weights=list(sides.values()))[0].astype(int).tolist()
    filled = [number for number, count in enumerate(counts) if count]
    return {names[i]: counts[i] for i in range(filled[0], filled[-1] + 1)} if filled else {}


def _print(found: dict[str, Any]) -> None:
    """The findings as a table of two columns, readable at 80 characters."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("shards", f"{found['shards']:,}, {found['bytes'] / 1e6:,.1f} MB")
    mean_size = found["image_bytes"] / found["samples"] / 1e3
    table.add_row("samples", f"{found['samples']:,}, {mean_size:,.1f} kB an image on average")
    table.add_row("classes", _classes(found))
    looked = "every sample" if found["read"] == found["samples"] else f"{found['read']:,} samples, evenly spread"
    pixels = "all" if found["decoded"] + len(found["corrupt"]) >= found["samples"] else f"{found['decoded']:,}"
    table.add_row("", "")
    table.add_row("read", f"{looked}; decoded: {pixels}" + ("" if found["deep"] else " (--deep: all)"))
    table.add_row("formats", _shares(found["formats"]))
    table.add_row("pixels", _shares(found["modes"]))
    if found["smallest"]:
        (h, w), (height, width) = found["smallest"], found["largest"]
        table.add_row(
            "height, width", f"{h}x{w} … {height}x{width}, median shorter side {found['median_shorter_side']}"
        )
        most = max(found["shorter_sides"].values())
        for number, (name, count) in enumerate(found["shorter_sides"].items()):
            drawn = "█" * -(-count * BAR // most)
            table.add_row("" if number else "shorter side", f"{name:>12} {drawn:<{BAR}} {count:,}")
    for name in ("mean", "std"):
        if found[name]:
            table.add_row(f"data.{name}", f"[{', '.join(f'{value:.4f}' for value in found[name])}]  of values in 0 … 1")
    table.add_row("", "")
    corrupt, groups = found["corrupt"], found["duplicates"]
    lines = [f"{len(corrupt):,}", *(f"{_said(place)}: {place['reason']}" for place in corrupt[:SHOWN])]
    table.add_row("corrupt", escape(_lines(lines, len(corrupt))))
    copies = sum(len(group) - 1 for group in groups)
    lines = [
        f"{copies:,} copies of {len(groups):,} images" if groups else "0",
        *(" = ".join(map(_said, group[:3])) for group in groups[:SHOWN]),
    ]
    table.add_row("duplicates", escape(_lines(lines, len(groups))))
    console = Console(width=min(100, Console().width), highlight=False)
    console.print(table)


def _classes(found: dict[str, Any]) -> str:
    counts = found["labels"].values()
    if not counts:
        return "no labels"
    rest = f"; {found['unlabelled']:,} samples without a label" if found["unlabelled"] else ""
    return f"{len(counts):,} with {min(counts):,} … {max(counts):,} samples{rest}"


def _shares(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _said(place: dict[str, str]) -> str:
    return f"{os.path.basename(place['shard'])}:{place['key']}"


def _lines(lines: list[str], number: int) -> str:
    return "\n".join(lines + ([f"… {number - SHOWN:,} more in --json"] if number > SHOWN else []))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="tars, globs in quotes, or folders of tars")
    parser.add_argument("--deep", action="store_true", help="read and decode all samples")
    parser.add_argument(
        "--jobs", type=int, default=cores(), metavar="N", help=f"processes (default: the cores, here {cores()})"
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help=f"draw {SAMPLES} samples with their keys")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings to this file")
    parser.add_argument("--strict", action="store_true", help="end with exit code 1 if a sample is corrupt")
    arguments = parser.parse_args(words)
    index = index_tars(list_shards(arguments.shards))
    found = inspect(index, deep=arguments.deep, jobs=arguments.jobs)
    _print(found)
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"--json {arguments.json} cannot be written ({error.strerror}). Choose another.") from None
    if arguments.sheet:
        draw_sheet(index, arguments.sheet)
    if arguments.strict and found["corrupt"]:
        sys.exit(1)


if __name__ == "__main__":
    command(main)
