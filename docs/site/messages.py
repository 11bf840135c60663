"""Collects all messages of errors and warnings from the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCES = ("*.py", "data/**/*.py", "mae/**/*.py", "tasks/**/*.py")
TOPICS = {
    "Settings": ("ConfigError", "ValueError", "ArgumentTypeError"),
    "Data": ("DataError", "Missing"),
    "Checkpoints, weights, exports": ("CheckpointError",),
    "Runs and sweeps that end early": ("RunEnded", "TrialFailed", "exit"),
    "Warnings": ("warn",),
}
WORD = re.compile(r"[A-Za-z]{2,}")
TOPIC_OF = {name: topic for topic, names in TOPICS.items() for name in names}


class Message(NamedTuple):
    """One message.

    text  with … for each value; empty if the message is that of another error, passed on
    """

    topic: str
    text: str
    file: str
    line: int


def messages(root: Path) -> list[Message]:
    """Returns the messages of all programs and packages below the root, in the order of the files."""
    return [message for file in sources(root) for message in _of_file(file, str(file.relative_to(root)))]


def sources(root: Path) -> list[Path]:
    """Returns the files whose messages are listed."""
    return sorted({file for pattern in SOURCES for file in root.glob(pattern)})


def called(call: ast.Call) -> str:
    """Returns the name of the function that is called, without its module."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def as_markdown(found: list[Message]) -> str:
    """Returns a list of messages for each topic."""
    lines = []
    for topic in TOPICS:
        listed = [message for message in found if message.topic == topic and message.text]
        lines += [f"## {topic}", "", *(f"- `{message.text.replace('`', '')}` {message.file}" for message in listed), ""]
    return "\n".join(lines)


def _of_file(file: Path, name: str) -> Iterator[Message]:
    tree = ast.parse(file.read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not call.args or called(call) not in TOPIC_OF:
            continue
        for text in _texts(call.args[0], functions):
            yield Message(TOPIC_OF[called(call)], text if len(WORD.findall(text)) >= 2 else "", name, call.lineno)


def _texts(node: ast.expr, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """Returns all texts of an expression: several if it, or the function of its file that it calls, chooses one."""
    match node:
        case ast.IfExp(body=one, orelse=other):
            return _texts(one, functions) + _texts(other, functions)
        case ast.Call(func=ast.Name(id=name)) if name in functions:
            returned = [n.value for n in ast.walk(functions[name]) if isinstance(n, ast.Return) and n.value]
            others = {other: function for other, function in functions.items() if other != name}
            return [text for value in returned for text in _texts(value, others)]
    return [_text(node)]


def _text(node: ast.expr) -> str:
    """Returns a string of the source with … for each value."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _text(left) + _text(right)
    return "…"
