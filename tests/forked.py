"""Python programs as processes of their own that have the imports behind them: they begin in a tenth of a second."""

import multiprocessing
import os
import runpy
import shlex
import sys
from pathlib import Path

import torch

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        "tasks.train",
        "tasks.evaluate",
        "tasks.search.sweep",
        "data.pack.__main__",
        "data.inspect.__main__",
        "mae.export.write",
        "mae.report.page",
    ]
)


def run(folder: Path, words: list[str], settings: dict[str, str]) -> None:
    """`python WORDS…` in a folder, with these environment variables; it has to end with exit code 0."""
    log = folder / "output.txt"
    process = _processes.Process(target=_become, args=(folder, log, words, settings))
    process.start()
    process.join(180)
    process.kill()  # nothing, where it has ended
    assert process.exitcode == 0, f"{shlex.join(words)}: {process.exitcode}\n{log.read_text()[-3000:]}"


def _become(folder: Path, log: Path, words: list[str], settings: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(settings)
    os.chdir(folder)
    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
