"""One trial of a sweep: an ordinary run of train.py, followed in its metrics.csv, then the probe of the objective."""

import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna import TrialPruned

from data.storage.credentials import reveal_all
from mae.run.metrics import read_metrics
from tasks.cli import FULL_ERROR
from tasks.search.config import SweepConfig
from tasks.words import setting

ROOT = Path(__file__).resolve().parents[2]
PROBES = ("knn", "linear", "attentive")
POLL_SECONDS = 1.0  # between two readings of metrics.csv
ERROR = re.compile(r"^(?:error: .*|(?:\w+\.)*\w+(?:Error|Exception)\b.*)$", re.MULTILINE)


class TrialFailed(Exception):
    """The run, or its evaluation, ended with an error."""


def run_trial(
    config: SweepConfig, folder: Path, settings: list[str], should_prune: Callable[[int, float], bool]
) -> float:
    """Returns the objective's value for `settings`. The output of the programs goes to FOLDER.log.

    The programs run where the sweep was started: paths in their settings count from there.

    should_prune  called with each new (step, value) of the metric to prune by

    The programs hold the lock of their trial. Those of a killed sweep run on by themselves, and are waited for here:
    no folder has two runs at a time.

    Raises TrialFailed if a program fails, TrialPruned if `should_prune` says so.
    """
    with open(folder.with_suffix(".log"), "ab") as log, open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begin = os.fstat(log.fileno()).st_size  # an earlier start may have written its error there
        environment = {"WANDB_RUN_GROUP": config.name} | os.environ
        if not FULL_ERROR:
            environment.pop("HYDRA_FULL_ERROR", None)  # run_program set it: the programs shall start as this one did

        def start(program: str, *words: str) -> subprocess.Popen:
            command = [*reveal_all(config.launch), sys.executable, str(ROOT / program), *words]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on once
            )
            running.add(process)
            return process

        place = [setting("runs", str(folder.parent.resolve())), f"name={folder.name}"]
        train = start("train.py", *config.settings, *settings, *place)
        if config.prune_by:
            _prune(train, folder / "metrics.csv", config.prune_by, should_prune)
        _wait(train, log.name, begin)
        probe, metric = config.objective.split("/")
        if probe in PROBES:
            evaluation = [setting("checkpoint", str(folder.resolve())), f"probe={probe}", *config.evaluation]
            _wait(start("eval.py", *evaluation), log.name, begin)
            results = folder / "eval"  # with data.path= among the settings in a folder of it
            written = [results / f"{probe}.json", *results.glob(f"on-*/{probe}.json")]
            newest = max(filter(Path.exists, written), key=lambda file: file.stat().st_mtime_ns, default=written[0])
            return _read(newest, "trained", metric)
        return _read(folder / "summary.json", config.objective)


running: set[subprocess.Popen] = set()
stopping = threading.Event()


def stop_running(signum: int) -> None:
    """Sends a signal to all programs that run: they save and stop, and their trials stay open."""
    stopping.set()
    for process in list(running):
        process.send_signal(signum)


def _prune(train: subprocess.Popen, metrics: Path, name: str, should_prune: Callable[[int, float], bool]) -> None:
    """Follows a run until it ends. Stops it and raises TrialPruned if `should_prune` says so."""
    seen = -1
    while True:
        ended = train.poll() is not None  # before its last rows are read
        for row in read_metrics(metrics):
            step = int(row["step"])
            if step <= seen or name not in row:
                continue
            seen = step
            if should_prune(step, float(row[name])) and not ended:
                train.send_signal(signal.SIGTERM)  # it saves before it stops
                train.wait()
                running.discard(train)
                raise TrialPruned(f"pruned after step {step} with {name} {float(row[name]):.4f}")
        if ended:
            return
        time.sleep(POLL_SECONDS)


def _wait(process: subprocess.Popen, log: str, begin: int) -> None:
    """Waits for a program. Raises TrialFailed with its error, SystemExit if the sweep itself was told to stop.

    begin  of what it writes in the log, bytes
    """
    code = process.wait()
    running.discard(process)
    if stopping.is_set():
        raise SystemExit(code or 143)  # the sweep is not finished, even if this run is
    if code < 0:
        raise TrialFailed(f"killed by {signal.Signals(-code).name}, as for want of memory")
    if code:
        errors = ERROR.findall(Path(log).read_bytes()[begin:].decode(errors="replace"))
        raise TrialFailed(errors[-1] if errors else f"exit code {code}")


def _read(file: Path, *keys: str) -> float:
    """Returns a number of a JSON file. Raises TrialFailed if it is not there or not finite."""
    value: Any = json.loads(file.read_text()) if file.is_file() else {}
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise TrialFailed(f"{file} holds no finite {'/'.join(keys)}")
    return float(value)
