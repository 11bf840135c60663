"""One trial of a sweep: an ordinary run of train.py, followed in its metrics.csv, then the probe of the objective.

The programs run here, one after the other, or are one SLURM job (tasks/search/jobs.py).
"""

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
from typing import IO, Any, NoReturn, Protocol

from optuna import TrialPruned

from data.storage.credentials import reveal_all
from mae.distributed.rank_zero import say
from mae.run.metrics import read_metrics
from mae.runs.signs_of_life import SignsOfLife
from tasks.cli import FULL_ERROR
from tasks.search import jobs
from tasks.search.config import SweepConfig
from tasks.words import setting

ROOT = Path(__file__).resolve().parents[2]
PROBES = ("knn", "linear", "attentive")
POLL_SECONDS = 1.0  # between two readings of metrics.csv
SHOWN_SECONDS = 60.0  # until NFS shows a file that was looked for before it was there (acdirmax)
STOPPED = (143, -signal.SIGTERM, -signal.SIGUSR1)  # exit codes of programs that were told to stop
ERROR = re.compile(r"^(?:error: .*|(?:\w+\.)*\w+(?:Error|Exception)\b.*)$", re.MULTILINE)

ShouldPrune = Callable[[int, float], bool]


class TrialFailed(Exception):
    """The run, or its evaluation, ended with an error."""


class Work(Protocol):
    """A process or a job that trains."""

    def poll(self) -> int | None: ...

    def end(self) -> None: ...


def run_trial(
    config: SweepConfig,
    folder: Path,
    settings: list[str],
    should_prune: ShouldPrune,
    job: dict[str, Any],
    note_job: Callable[[dict[str, Any]], None],
) -> float:
    """Returns the objective's value for `settings`. The output of the programs goes to FOLDER.log.

    The programs run where the sweep was started: paths in their settings count from there.

    should_prune  called with each new (step, value) of the metric to prune by
    job           of SLURM, that this trial was submitted as; empty if it was not
    note_job      keeps a new one

    Raises TrialFailed if a program fails, TrialPruned if `should_prune` says so, SystemExit if the sweep is to stop.
    """
    programs = commands(config, folder, settings)
    with open(folder.with_suffix(".log"), "ab") as log, open(folder.with_suffix(".lock"), "w") as lock:
        as_job = (job or config.as_jobs) and _run_as_job(
            config, folder, programs, log, lock, should_prune, job, note_job
        )
        if not as_job:
            wait_for_earlier_programs(folder, lock)
            _run_here(config, folder, programs, log, lock, should_prune)
    return read_objective(config, folder, SHOWN_SECONDS if as_job else 0)


def commands(config: SweepConfig, folder: Path, settings: list[str]) -> list[list[str]]:
    """Returns the programs of a trial with their words: train.py, and eval.py if a probe gives the objective."""
    place = [setting("runs", str(folder.parent.resolve())), f"name={folder.name}"]
    train = [str(ROOT / "train.py"), *config.settings, *settings, *place]
    probe = config.objective.split("/")[0]
    if probe not in PROBES:
        return [train]
    evaluation = [setting("checkpoint", str(folder.resolve())), f"probe={probe}", *config.evaluation]
    return [train, [str(ROOT / "eval.py"), *evaluation]]


def read_objective(config: SweepConfig, folder: Path, patience: float = 0) -> float:
    """Returns the objective's value as the programs of a trial have written it. Raises TrialFailed if they have not.

    patience  seconds in which a network file system may still show the folder as it was before a job's end
    """
    probe, metric = config.objective.split("/")
    results, began = folder / "eval", time.monotonic()
    while True:
        if probe in PROBES:  # with data.path= among the settings in a folder of it
            written = [results / f"{probe}.json", *results.glob(f"on-*/{probe}.json")]
            file = max(filter(Path.exists, written), key=lambda file: file.stat().st_mtime_ns, default=written[0])
        else:
            file = folder / "summary.json"
        if file.exists() or time.monotonic() - began >= patience:
            return _read(file, *(("trained", metric) if probe in PROBES else (config.objective,)))
        time.sleep(POLL_SECONDS)


def wait_for_earlier_programs(folder: Path, lock: IO[str]) -> None:
    """Waits for the programs that a killed sweep has left behind here or elsewhere: no folder has two runs at a time.

    Here they hold the lock, for which a program inherits it; on another machine a run renews its lease.
    """
    signs = SignsOfLife()
    while not _locked(lock) or signs.look(folder) is not False:
        if stopping.is_set():
            leave()
        time.sleep(POLL_SECONDS)


def _locked(lock: IO[str]) -> bool:
    """Takes a lock. Returns False if a process has it; True also where the file system knows none."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def environment_of(config: SweepConfig) -> dict[str, str]:
    """Returns the environment of the programs of a trial."""
    environment = {"WANDB_RUN_GROUP": config.name} | os.environ
    if not FULL_ERROR:
        environment.pop("HYDRA_FULL_ERROR", None)  # run_program set it: the programs shall start as this one did
    return environment


class Program(subprocess.Popen):
    """A program of a trial that runs here."""

    def end(self) -> None:
        """Has the run save and stop; returns when it has."""
        self.send_signal(signal.SIGTERM)
        self.wait()
        running.discard(self)


def _run_here(
    config: SweepConfig,
    folder: Path,
    programs: list[list[str]],
    log: IO[bytes],
    lock: IO[str],
    should_prune: ShouldPrune,
) -> None:
    """Runs the programs of a trial, one after the other. They inherit the lock of the trial, and outlive the sweep."""
    begin = os.fstat(log.fileno()).st_size  # an earlier start may have written its error there
    for words in programs:
        if stopping.is_set():
            leave()
        program = Program(
            [*reveal_all(config.launch), sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],
            env=environment_of(config),
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on once
        )
        running.add(program)
        if stopping.is_set():  # since the program was started
            program.send_signal(received[-1])
        if config.prune_by and words is programs[0]:
            _prune(program, folder / "metrics.csv", config.prune_by, should_prune)
        _wait(program, log.name, begin)


def _run_as_job(
    config: SweepConfig,
    folder: Path,
    programs: list[list[str]],
    log: IO[bytes],
    lock: IO[str],
    should_prune: ShouldPrune,
    record: dict[str, Any],
    note_job: Callable[[dict[str, Any]], None],
) -> bool:
    """Submits the programs of a trial, or finds the job that they are already, and waits for its end.

    Returns False if there is something left to run, and the sweep submits no jobs any more.
    """
    job = jobs.find(config, folder, record)
    if job is not None:
        say(f"{folder.name}: goes on as job {job.id}")
    while True:
        if job is None:
            if not config.as_jobs:
                return False
            wait_for_earlier_programs(folder, lock)
            trained, step = jobs.progress(folder)
            job = jobs.submit(config, folder, programs, environment_of(config))
            record = {"id": job.id, "log": os.fstat(log.fileno()).st_size, "trained": trained, "step": step}
            note_job(record)
            say(f"{folder.name}: job {job.id}")
        _prune(job, folder / "metrics.csv", config.prune_by, should_prune)
        if job.state == "COMPLETED":
            return True
        before = record.get("trained", False), record.get("step", -1)
        if job.state != jobs.FORGOTTEN and not (jobs.may_go_on(job) and jobs.progress(folder) > before):
            raise TrialFailed(_why_ended(job, Path(log.name), record.get("log", 0)))
        say(f"{folder.name}: job {job.id} has ended ({job.state}) and is not requeued: it starts again")
        job = None


def _why_ended(job: jobs.Job, log: Path, begin: int) -> str:
    """Returns why the job of a trial has failed: the error that it has written, else what SLURM says."""
    if job.state == "CANCELLED":
        return f"job {job.id} was cancelled (scancel)"
    if job.state != "FAILED":
        return f"job {job.id} has ended: {job.state}"
    return f"job {job.id}: {_error(log, begin) or f'exit code {job.code}'}"


running: set[Program] = set()
stopping = threading.Event()
received: list[int] = []  # signals that told the sweep to stop


def stop_running(signum: int) -> None:
    """Sends a signal to all programs that run here: they save and stop, and their trials stay open."""
    received.append(signum)
    stopping.set()
    for program in list(running):
        program.send_signal(signum)


def leave() -> NoReturn:
    """Ends a worker of a sweep that was told to stop: the sweep is not finished, even if its run is."""
    raise SystemExit(130 if received[:1] == [signal.SIGINT] else 143)


def _prune(work: Work, metrics: Path, name: str | None, should_prune: ShouldPrune) -> None:
    """Follows a run until it ends. Stops it and raises TrialPruned if `should_prune` says so.

    A job goes on if the sweep is told to stop; a program was told so too, and is waited for.
    """
    seen = -1
    while True:
        ended = work.poll() is not None  # before its last rows are read
        for row in read_metrics(metrics) if name else ():
            step = int(row["step"])
            if step <= seen or name not in row:
                continue
            seen = step
            if should_prune(step, float(row[name])) and not ended:
                work.end()
                raise TrialPruned(f"pruned after step {step} with {name} {float(row[name]):.4f}")
        if ended:
            return
        if stopping.is_set() and isinstance(work, jobs.Job):
            leave()
        time.sleep(POLL_SECONDS)


def _wait(process: subprocess.Popen, log: str, begin: int) -> None:
    """Waits for a program. Raises TrialFailed with its error, SystemExit if the sweep itself was told to stop.

    begin  of what it writes in the log, bytes
    """
    code = process.wait()
    running.discard(process)  # pyright: ignore[reportArgumentType]
    if code in STOPPED and not stopping.is_set() and jobs.job_is_ending():
        stop_running(signal.SIGTERM)  # with the job that the sweep and its trials are in
    if stopping.is_set():
        leave()
    if code < 0:
        raise TrialFailed(f"killed by {signal.Signals(-code).name}, as for want of memory")
    if code:
        raise TrialFailed(_error(Path(log), begin) or f"exit code {code}")


def _error(log: Path, begin: int) -> str:
    """Returns the last error in a log; nothing if there is none."""
    errors = ERROR.findall(log.read_bytes()[begin:].decode(errors="replace"))
    return errors[-1] if errors else ""


def _read(file: Path, *keys: str) -> float:
    """Returns a number of a JSON file. Raises TrialFailed if it is not there or not finite."""
    value: Any = json.loads(file.read_text()) if file.is_file() else {}
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise TrialFailed(f"{file} holds no finite {'/'.join(keys)}")
    return float(value)
