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
FENCE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
SETTING = re.compile(r"[A-Z_]+=.*")


class Command(NamedTuple):
    """One command of a page.

    words     without what stands for "and so on" (…)
    settings  environment variables before the program
    needs     why the tests do not run it; empty when they do
    """

    place: str
    words: list[str]
    settings: dict[str, str]
    needs: str


def commands(page: Path) -> list[Command]:
    """Every command of a page, in order."""
    found = []
    for number, line in _command_lines(page):
        line, _, remark = line.partition(" # ")
        needs = remark.strip().removeprefix(NEEDS) if remark.strip().startswith(NEEDS) else ""
        found += [_command(f"{page.name}:{number}", part, needs) for part in line.split(" && ")]
    return found


def indented(page: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines of indented blocks, which follow an empty line."""
    inside, before = False, ""
    for number, line in enumerate(unfenced(page).splitlines(), start=1):
        inside = line.startswith("    ") and (inside or not before.strip())
        if inside:
            yield number, line.strip()
        before = line


def unfenced(page: Path) -> str:
    """Returns the page without what is in fences, as many lines."""
    return FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text())


def python_blocks(page: Path) -> list[str]:
    """Returns the contents of the fences of Python."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Returns the targets of all links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", unfenced(page)))


def anchors(page: Path) -> set[str]:
    """Returns what links to headings may end in, as repositories make it of them."""
    headings = re.findall(r"^#+ (.+)$", unfenced(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(page: Path) -> list[list[str]]:
    """Returns the cells of all rows of tables."""
    lines = [line for line in unfenced(page).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _command_lines(page: Path) -> Iterator[tuple[int, str]]:
    """(number of the first line, command) with continued lines joined."""
    joined, start = "", 0
    for number, line in indented(page):
        start = start if joined else number
        joined += line.removesuffix("\\")
        if not line.endswith("\\"):
            yield start, joined
            joined = ""


def _command(place: str, line: str, needs: str) -> Command:
    words = [word for word in shlex.split(line) if word != "…"]
    count = next(number for number, word in enumerate(words) if not SETTING.fullmatch(word))
    settings = dict(word.split("=", 1) for word in words[:count])
    return Command(place, words[count:], settings, needs)
