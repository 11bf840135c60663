"""Real runs of train.py in processes of their own, small enough to take seconds."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mae.run.checkpoint_files import checkpoints, read_own
from mae.run.metrics import read_metrics
from tests.conftest import ROOT
from tests.forked import ADDRESS, Program, parent, sessions

Process = Program | subprocess.Popen

# 1,438 digits in global batches of 64: 22 steps an epoch.
STEPS_PER_EPOCH = 22
SMALL = (
    "model.width=32",
    "model.depth=1",
    "model.num_heads=2",
    "model.decoder_width=32",
    "model.decoder_depth=1",
    "model.decoder_num_heads=2",
    "global_batch=64",
    "log_every=1",
    "pictures_every=1000",
    "val_every=20",
    "trainer=cpu",
)


def command(runs: Path, root: Path, *overrides: str, ranks: int = 1) -> list[str]:
    """Returns the command line of a small run; with ranks > 1 under torchrun."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "train.py", f"runs={runs}", f"data.root={root}", *SMALL, *overrides]


def start(words: list[str], folder: Path = ROOT, **environment: str) -> Process:
    """Starts a command as a session of its own; a Python program is forked from a warm parent."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"} | environment  # so that no path is folded
    if words[0] == sys.executable:
        return Program(words, settings, folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(
        words,
        env=settings | {ADDRESS: parent()},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: Process, code: int | None = 0) -> str:
    """Returns what the process printed; it has to end with this exit code (None: any)."""
    try:
        output, _ = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # or it goes on beside all other tests
        process.wait()
        raise
    assert code is None or process.returncode == code, f"exit code {process.returncode}\n{output}"
    return output


def run(words: list[str], code: int | None = 0, folder: Path = ROOT, **environment: str) -> str:
    return finish(start(words, folder, **environment), code)


def completed(words: list[str], folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python program that has ended in whatever way, with what it printed and its complaints apart."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        code = Program(words, settings, folder, stdout=output, stderr=errors).wait(1800)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, code, output.read(), errors.read())


def ranks_of(process: Process) -> list[int]:
    """Returns the ranks that torchrun has started, in their order."""
    assert isinstance(process, Program)
    return process.started()


def processes_of(process: Process) -> list[int]:
    """Returns the processes of a program and of the ranks that it started: loader workers too."""
    leaders = {process.pid, *(process.started() if isinstance(process, Program) else ())}
    return [pid for pid, session in sessions().items() if session in leaders]


def wait_for_checkpoint(process: Process | None, folder: Path, step: int = 1) -> None:
    """Returns as soon as the run has a checkpoint of this step or a later one; the process must still be running then.

    process  None for a run that was handed to a scheduler
    """
    deadline = time.monotonic() + 120
    while not any(int(path.stem.removeprefix("step-")) >= step for path in checkpoints(folder)):
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before step {step}\n{finish(process, None)}")
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in two minutes"
        time.sleep(0.005)


def kill(process: Process) -> None:
    """SIGKILL, to the main process alone; it must not have ended by itself."""
    os.kill(process.pid, signal.SIGKILL)
    finish(process, -signal.SIGKILL)


def losses(folder: Path) -> dict[tuple[str, str], str]:
    """(step, metric) -> value as it stands in metrics.csv; timings left out."""
    return {
        (row["step"], name): value
        for row in read_metrics(folder / "metrics.csv")
        for name, value in row.items()
        if name in ("train/loss", "train/lr", "val/loss")
    }


def state(folder: Path) -> dict[str, Any]:
    """Parameters and optimiser state of the newest checkpoint."""
    contents = read_own(checkpoints(folder)[0])
    return {"step": contents["mae"]["step"], "model": contents["state_dict"], "optimiser": contents["optimizer_states"]}


def bit_equal(one: Any, other: Any) -> bool:
    """Compares dictionaries, lists and tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(bit_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(bit_equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs have bit-equal parameters and optimiser states, and logged the same losses."""
    assert bit_equal(state(one), state(other))
    assert losses(one) == losses(other)
