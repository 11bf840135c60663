"""Converts docstrings to Markdown: tables of shapes keep their columns, everything else is plain text."""

import re
from typing import Any

import griffe

# A row of a table is `name  [B, N]  meaning`; it may continue on indented lines.
ROW = re.compile(r"\S.*?\S? {2,}\S")
CONTINUATION = re.compile(r" {2,}\S")
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
        return "\n".join(["```text", *lines, "```"])
    if block.startswith("    "):  # Markdown takes an indented example as code
        return block
    # Text between backticks needs no escapes.
    parts = CODE.split(block)
    return "".join(part if CODE.fullmatch(part) else re.sub(r"([*<\[\]])", r"\\\1", part) for part in parts)


def is_table(lines: list[str]) -> bool:
    """Returns whether a block is a table of names, shapes and meanings."""
    return bool(ROW.match(lines[0])) and all(
        ROW.match(line) or CONTINUATION.match(line) or line.startswith("returns ") for line in lines
    )
