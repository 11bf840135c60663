"""Runs of train.py as real processes, and what they leave behind.

A cold start of python train.py costs about eight seconds of imports. Most tests start it warm: `python -m tests.runs`
has imported everything, computed nothing, and forks a process for each run, which executes train.py from its first line
to its exit code, in a session of its own. Tests of what the operating system sees start it cold.
"""

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 180  # seconds, on two cores that others use as well
TINY = (
    "model.width=32 model.depth=1 model.num_heads=2 model.decoder_width=32 model.decoder_depth=1 "
    "model.decoder_num_heads=2 trainer=cpu precision=32-true data.workers=0 log_every=1 val_every=null "
    "optim.warmup_epochs=5"
).split()
STEPS_PER_EPOCH = 1438 // 128  # digits_tiny: 11


@dataclass
class Running:
    """A started process; `code` is its exit status as Python counts it, negative for a signal."""

    pid: int
    log: Path
    poll: Callable[[], int | None]

    def wait(self, patience: float = PATIENCE) -> int:
        until(lambda: self.poll() is not None, self, patience)
        code = self.poll()
        assert code is not None
        return code

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def succeeds(self) -> str:
        """Waits for exit code 0; returns what it printed."""
        assert self.wait() == 0, self.output
        return self.output


def until(condition: Callable[[], Any], running: Running, patience: float = PATIENCE) -> Any:
    """Waits for a condition and returns its value; fails with the output when it does not come."""
    end = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {patience} s in vain:\n{running.output}"
        time.sleep(0.01)
    return value


def wait_for_step(running: Running, run: Path, step: int) -> None:
    """Until the run has written the line of `step` to metrics.csv; fails when it ends before."""

    def reached() -> bool:
        assert running.poll() is None, f"ended with {running.poll()}:\n{running.output}"
        return any(int(row["step"]) >= step for row in rows(run, whole_lines=True))

    until(reached, running)


def wait_for_checkpoint(running: Running, run: Path, step: int) -> None:
    """Until the checkpoint of `step` exists; fails when the process ends before."""

    def there() -> bool:
        assert running.poll() is None, f"ended with {running.poll()}:\n{running.output}"
        return checkpoint(run, step).is_file()

    until(there, running)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}.ckpt"


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*.ckpt"))


def contents(run: Path, step: int) -> dict[str, Any]:
    """Everything in a checkpoint."""
    return torch.load(checkpoint(run, step), map_location="cpu", weights_only=True)


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """The places in which two nested structures differ; tensors are compared bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield where
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), f"{where}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{where}[{i}]")
    elif one != other:
        yield f"{where}: {one} and {other}"


def rows(run: Path, whole_lines: bool = False) -> list[dict[str, str]]:
    """metrics.csv as it stands, read with nothing of ours; `whole_lines` drops one that is being written."""
    path = run / "metrics.csv"
    if not path.is_file():
        return []
    text = path.read_text()
    if whole_lines:
        text = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(text.splitlines()) if not whole_lines or None not in row.values()]


def metric(run: Path, name: str) -> list[tuple[int, str]]:
    """(step, value) of one column, as text: every digit counts."""
    return [(int(row["step"]), row[name]) for row in rows(run) if row.get(name)]


def starts(run: Path) -> list[int]:
    """The steps from which a run was started, one for each start."""
    return [start["step"] for start in json.loads((run / "environment.json").read_text())["starts"]]


def descendants(pid: int) -> list[int]:
    """The processes below `pid` at this moment."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, new = [], [pid]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Launcher:
    """Starts train.py, warm, cold or under torchrun, with the tiny model and the packed digits of this session."""

    def __init__(self, folder: Path, datasets: Path) -> None:
        self.folder = folder
        self.datasets = datasets
        self.warm: subprocess.Popen[str] | None = None
        self.logs = 0
        self.started: list[Running] = []

    def __call__(
        self, runs: Path, *overrides: str, cold: bool = False, torchrun: int = 0, env: dict[str, str] | None = None
    ) -> Running:
        settings = [f"runs={runs}", f"data.root={self.datasets}", *TINY, *overrides]
        self.logs += 1
        log = self.folder / f"{self.logs:03d}.log"
        if torchrun:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)]
            running = self._cold([*launch, str(ROOT / "train.py"), *settings], log, env or {})
        elif cold:
            running = self._cold([str(ROOT / "train.py"), *settings], log, env or {})
        else:
            running = self._warm(settings, log, env or {})
        self.started.append(running)
        return running

    def _cold(self, arguments: list[str], log: Path, env: dict[str, str]) -> Running:
        with open(log, "w") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return Running(process.pid, log, process.poll)

    def _warm(self, settings: list[str], log: Path, env: dict[str, str]) -> Running:
        pid = self._ask({"settings": settings, "log": str(log), "env": env})
        finished: list[int] = []

        def poll() -> int | None:
            if not finished and (code := self._ask({"poll": pid})) is not None:
                finished.append(code)
            return finished[0] if finished else None

        return Running(pid, log, poll)

    def _ask(self, question: dict[str, Any]) -> Any:
        if self.warm is None:
            self.warm = subprocess.Popen(
                [sys.executable, "-m", "tests.runs"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        assert self.warm.stdin is not None and self.warm.stdout is not None
        print(json.dumps(question), file=self.warm.stdin, flush=True)
        return json.loads(self.warm.stdout.readline())

    def clean(self) -> None:
        """Ends what a failed test has left running."""
        for running in self.started:
            if running.poll() is None:
                for pid in [*descendants(running.pid), running.pid]:
                    if alive(pid):
                        os.kill(pid, signal.SIGKILL)
                running.wait()
        self.started = []

    def close(self) -> None:
        self.clean()
        if self.warm is not None:
            self.warm.communicate()


def serve() -> None:
    """Answers {"settings", "log", "env"} with the process id of a fork that goes on to train, {"poll"} with its code."""
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return _become(question)
        print(json.dumps(answer), flush=True)
    sys.exit(0)


def _become(question: dict[str, Any]) -> None:
    os.setsid()
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, log, log)):
        os.dup2(file, number)
    os.environ.update(question["env"])
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / "train.py"), *question["settings"]]


if __name__ == "__main__":
    import train  # noqa: F401  The seconds that are saved.

    serve()
    runpy.run_path(sys.argv[0], run_name="__main__")
