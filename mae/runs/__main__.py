"""All runs below a folder as one table, from their files alone.

    python -m mae.runs runs/
    python -m mae.runs runs/ --watch
    python -m mae.runs runs/ --json

Runs of other machines are looked at for up to 15 seconds: those that renew their leases meanwhile are running.
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.live import Live

from mae.runs.best import BestValues
from mae.runs.find import Found, find_runs
from mae.runs.read import BEST, Run, as_json, read_run
from mae.runs.signs_of_life import SignsOfLife
from mae.runs.table import show

SECONDS = 10.0  # from one look to the next
READERS = 8  # threads: on a network file system each file is a question to a server
FILE_WIDTH = 10_000  # characters of a line that goes to a file or a pipe, where nothing is folded


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mae.runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=SECONDS,
        metavar="SECONDS",
        help=f"go on showing them until Ctrl-C (default: every {SECONDS:g} seconds)",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON in place of each table")
    arguments = parser.parse_args(words)
    if arguments.watch is not None and not arguments.watch > 0:
        parser.error(f"--watch={arguments.watch:g}: a number of seconds above 0 is needed")
    folder, signs, values = arguments.folder, SignsOfLife(), BestValues(BEST)
    if not folder.is_dir():
        print(f"error: {folder} is no folder. Give the folder that holds the runs", file=sys.stderr)
        return 2
    try:
        found, runs = survey(folder, signs, values)
        if arguments.watch is not None:
            watch(lambda: survey(folder, signs, values), (found, runs), arguments.watch, arguments.json)
    except KeyboardInterrupt:
        return 0 if arguments.watch is not None else 130
    if not runs:
        unreadable = f"; cannot be read: {', '.join(found.unreadable)}" if found.unreadable else ""
        print(f"error: there is no run in {folder} or below it{unreadable}", file=sys.stderr)
        return 2
    _print(found, runs, arguments.json)
    return 0


def survey(folder: Path, signs: SignsOfLife, values: BestValues) -> tuple[Found, list[Run]]:
    """Returns what lies in a folder, and how its runs stand."""
    found = find_runs(folder)
    alive = signs.watch([path for _, path in found.runs])
    with ThreadPoolExecutor(READERS) as pool:
        return found, list(pool.map(lambda run: read_run(run[0], run[1], alive[run[1]], values), found.runs))


def watch(
    survey: Callable[[], tuple[Found, list[Run]]], seen: tuple[Found, list[Run]], seconds: float, json: bool
) -> None:
    """Shows what is seen, then what `survey` finds every so many seconds; off a terminal one table after the other."""
    terminal = Console()
    if json or not terminal.is_terminal:
        while True:
            _print(*seen, json)
            time.sleep(seconds)
            seen = survey()
    with Live(console=terminal, screen=True, auto_refresh=False) as live:
        while True:
            found, runs = seen
            size = terminal.size
            live.update(show(runs, found.passed_over, found.unreadable, size.width, size.height), refresh=True)
            time.sleep(seconds)
            seen = survey()


def _print(found: Found, runs: list[Run], json: bool) -> None:
    if json:
        print(as_json(runs, found.passed_over, found.unreadable), flush=True)
        return
    terminal = Console(highlight=False)
    if not terminal.is_terminal:
        terminal.width = FILE_WIDTH
    terminal.print(show(runs, found.passed_over, found.unreadable, terminal.width))


if __name__ == "__main__":
    sys.exit(main())
