"""What the README and the pages of docs/ hold: commands, links, headings.

Two conventions make them checkable. A block that is indented holds commands; anything else has a fence that names its
language. A command that ends in `# needs …` (GPUs, SLURM, data of the reader's own, …) is not run by the tests.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = "needs "


class Command(NamedTuple):
    """One command of a page.

    words    without what stands for "and so on" (…)
    settings environment variables before the program
    needs    why the tests do not run it; empty when they do
    """

    place: str
    words: list[str]
    settings: dict[str, str]
    needs: str


def commands(page: Path) -> list[Command]:
    """Every command of a page, in order."""
    return [_command(f"{page.name}:{number}", line) for number, line in _command_lines(page)]


def _command_lines(page: Path) -> Iterator[tuple[int, str]]:
    """(line number, command) of each indented block, continued lines joined."""
    fenced, before, joined, start = False, "", "", 0
    in_block = False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        in_block = not fenced and line.startswith("    ") and (in_block or not before.strip())
        if in_block:
            start = start if joined else number
            joined += line.strip()
            if joined.endswith("\\"):
                joined = joined[:-1]
            else:
                yield start, joined
                joined = ""
        before = line


def _command(place: str, line: str) -> Command:
    command, _, remark = line.partition(" # ")
    words = [word for word in shlex.split(command) if word != "…"]
    count = next(number for number, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word))
    settings = dict(word.split("=", 1) for word in words[:count])
    remark = remark.strip()
    return Command(place, words[count:], settings, remark.removeprefix(NEEDS) if remark.startswith(NEEDS) else "")
