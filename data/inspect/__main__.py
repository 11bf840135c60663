"""Statistics of shards: counts, formats, sizes, colours, faults, duplicates, a contact sheet.

    python -m data.inspect SHARDS…

Reads at most 5,000 evenly spread samples, and decodes at most 500 of them; --deep reads and decodes every sample.
Corrupt and duplicate images are found only among the samples that are read. --duplicates compares how all of them look.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.errors import DataError, command
from data.index.classes import some
from data.index.index import index_tars
from data.index.passed_over import BESIDE, PassedOver, printable
from data.index.samples import normalise_extension
from data.index.splits import list_shards
from data.inspect.contact_sheet import SAMPLES, draw_sheet
from data.inspect.duplicates import near_duplicates
from data.inspect.inspect import inspect
from data.parallel import cores

ROWS_SHOWN = 5  # corrupt images and duplicates in the table; --json has all of them
BAR = 24  # characters of the longest bar


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="tars, globs in quotes, or folders of tars")
    parser.add_argument("--deep", action="store_true", help="read and decode all samples")
    parser.add_argument(
        "--jobs", type=int, default=cores(), metavar="N", help=f"processes (default: the cores, here {cores()})"
    )
    parser.add_argument("--duplicates", action="store_true", help="find images that look alike, among all samples")
    table = "with --duplicates: write the groups into this table for data.sampling (.npy)"
    parser.add_argument("--table", type=Path, metavar="FILE", help=table)
    parser.add_argument("--sheet", type=Path, metavar="PNG", help=f"draw {SAMPLES} samples with their keys")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings to this file")
    image = "the image of samples with several: png, left.jpg; first: any"
    parser.add_argument("--image", type=normalise_extension, metavar="EXT", help=image)
    parser.add_argument(
        "--strict", action="store_true", help="end with exit code 1 if a sample is corrupt or anything passed over"
    )
    arguments = parser.parse_args(words)
    if arguments.table and not arguments.duplicates:
        raise DataError(
            f"--table {arguments.table} is for the groups that --duplicates finds. Add it, or leave it out."
        )
    index = index_tars(list_shards(arguments.shards), image=arguments.image)
    found = inspect(index, deep=arguments.deep, jobs=arguments.jobs)
    if arguments.duplicates:
        found |= near_duplicates(index, arguments.jobs, arguments.table)
    _print(found)
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"--json {arguments.json} cannot be written ({error.strerror}). Choose another.") from None
    if arguments.sheet:
        draw_sheet(index, arguments.sheet, names=found["classes"])
    if arguments.strict and (found["corrupt"] or found["not_packed"] or index.passed_over.but(BESIDE)):
        sys.exit(1)


def _print(found: dict[str, Any]) -> None:
    """Prints the statistics as a table of two columns, readable at 80 characters."""
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
            bar = "█" * -(-count * BAR // most)
            table.add_row("" if number else "shorter side", f"{name:>12} {bar:<{BAR}} {count:,}")
    for name in ("mean", "std"):
        if found[name]:
            table.add_row(f"data.{name}", f"[{', '.join(f'{value:.4f}' for value in found[name])}]  of values in 0 … 1")
    if found["ranges"]:
        table.add_row("values", "\n".join(_range(int(bits), *range) for bits, range in found["ranges"].items()))
    for title, name in (("passed over", "passed_over"), ("not packed", "not_packed")):
        if found[name]:
            table.add_row(title, escape(str(PassedOver.from_json(found[name])).replace("; ", "\n")))
    table.add_row("", "")
    constant = found["constant"]
    lines = [f"{len(constant):,} images of one colour" if constant else "0", *map(_name, constant[:ROWS_SHOWN])]
    table.add_row("constant", escape(_lines(lines, len(constant))))
    corrupt, groups = found["corrupt"], found["duplicates"]
    lines = [f"{len(corrupt):,}", *(f"{_name(place)}: {place['reason']}" for place in corrupt[:ROWS_SHOWN])]
    table.add_row("corrupt", escape(_lines(lines, len(corrupt))))
    copies = sum(len(group) - 1 for group in groups)
    lines = [
        f"{copies:,} copies of {len(groups):,} images" if groups else "0",
        *(" = ".join(map(_name, group[:3])) for group in groups[:ROWS_SHOWN]),
    ]
    table.add_row("duplicates", escape(_lines(lines, len(groups))))
    if (alike := found.get("near_duplicates")) is not None:
        count = sum(len(group) - 1 for group in alike)
        lines = [
            f"{count:,} images that look like one of {len(alike):,} others; {found['different']:,} are different",
            *(" ~ ".join(map(_name, group[:3])) for group in alike[:ROWS_SHOWN]),
        ]
        table.add_row("near-duplicates", escape(_lines(lines, len(alike))))
    console = Console(width=min(100, Console().width), highlight=False)
    console.print(table)


def _classes(found: dict[str, Any]) -> str:
    counts = found["labels"].values()
    if not counts:
        return "no labels"
    rest = f"; {found['unlabelled']:,} samples without a label" if found["unlabelled"] else ""
    names = f": {some(found['classes'])}" if found["classes"] else ""
    lines = [f"{len(counts):,} with {min(counts):,} … {max(counts):,} samples{rest}{names}", found["classes_differ"]]
    return escape("\n".join(filter(None, lines)))


def _range(bits: int, lowest: int, highest: int) -> str:
    said = f"{bits} bits, {lowest:,} … {highest:,}"
    if bits == 8:
        return said
    left = round(highest / 257) - round(lowest / 257) + 1
    return f"{said} of 0 … 65,535: set data.bits=16 (8 would leave {left} levels)"


def _shares(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _name(place: dict[str, str]) -> str:
    return printable(f"{os.path.basename(place['shard'])}:{place['key']}")


def _lines(lines: list[str], number: int) -> str:
    return "\n".join(lines + ([f"… {number - ROWS_SHOWN:,} more in --json"] if number > ROWS_SHOWN else []))


if __name__ == "__main__":
    command(main)
