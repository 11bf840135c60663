"""Converts docstrings to Markdown: tables of shapes keep their columns, everything else is plain text."""

import re
import textwrap
from typing import Any

import griffe

# A row of a table is `name  [B, N]  meaning`; it may continue on indented lines.
ROW = re.compile(r"\S.*?\S? {2,}\S")
CONTINUATION = re.compile(r" {2,}\S")
LETTERS = 78  # that a page of the site shows beside its two menus
CODE = re.compile(r"(`[^`]*`)")


class Tables(griffe.Extension):
    """griffe extension that rewrites each docstring when it is read from the sources."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """Returns a docstring of this project as Markdown; blocks are separated by empty lines."""
    return "\n\n".join(_block(block) for block in re.split(r"\n\s*\n", docstring))


def _block(block: str) -> str:
    lines = block.splitlines()
    if is_table(lines):
        return "\n".join(["```text", *wrap(lines), "```"])
    if block.startswith("    "):  # Markdown takes an indented example as code
        return block
    # Text between backticks needs no escapes.
    parts = CODE.split(block)
    return "".join(part if CODE.fullmatch(part) else re.sub(r"([*<\[\]])", r"\\\1", part) for part in parts)


def wrap(lines: list[str]) -> list[str]:
    """Returns the lines of a table no longer than LETTERS: longer ones go on below the beginning of their meaning."""
    if max(map(len, lines)) <= LETTERS:
        return lines
    rows: list[str] = []
    for line in lines:
        if CONTINUATION.match(line) and rows:
            rows[-1] += f" {line.strip()}"
        else:
            rows.append(line)
    wrapped = []
    for row in rows:
        gaps = [gap.end() for gap in re.finditer(r"\S {2,}(?=\S)", row)]
        indent = max((gap for gap in gaps[:2] if gap < LETTERS // 2), default=4)  # after name and shape
        meaning = textwrap.wrap(row[indent:], LETTERS - indent)
        wrapped += [row[:indent] + meaning[0], *(" " * indent + more for more in meaning[1:])]
    return wrapped


def is_table(lines: list[str]) -> bool:
    """Returns whether a block is a table of names, shapes and meanings."""
    return bool(ROW.match(lines[0])) and all(
        ROW.match(line) or CONTINUATION.match(line) or line.startswith("returns ") for line in lines
    )
