"""Trials as SLURM jobs: `launch: [sbatch, --partition=gpu, --gpus=1]`.

1 find     the job that an earlier sweep.py has submitted for this trial, by its id, else by its name
2 submit   trial-0007.sbatch: srun train.py, then srun eval.py. A requeued job runs it again, under its id
3 poll     every JOB_POLL_SECONDS, until the job has ended for good
4 judge    COMPLETED: the results are read. Cancelled or failed: so has the trial. Stopped by the cluster and not
           requeued: it is submitted again if it got further than the job before

The job outlives sweep.py, on which nothing in it depends.
"""

import getpass
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from data.storage.credentials import reveal_all
from mae.atomic import write_atomically
from mae.distributed.rank_zero import say
from mae.distributed.requeue import ask_slurm, show_job
from mae.errors import ConfigError, RunEnded
from mae.runs.find import newest_checkpoint
from tasks.search.config import SweepConfig

JOB_POLL_SECONDS = 5.0
FORGOTTEN = "FORGOTTEN"  # SLURM knows the job no more
BY_THE_CLUSTER = ("TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL")
FINAL = (*BY_THE_CLUSTER, "COMPLETED", "FAILED", "CANCELLED", "OUT_OF_MEMORY", "DEADLINE", FORGOTTEN)
STOPPED = (143, 138)  # a run that has saved; an evaluation that was told by SIGUSR1

SCRIPT = """#!/bin/bash
#SBATCH --requeue
#SBATCH --signal=USR1@120
# {folder}, written and submitted by sweep.py: one task per GPU, as sweep.launch says. See docs/sweeps.md.
cpus=${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}}
step() {{ srun --kill-on-bad-exit=1 $cpus "${{PYTHON:-{python}}}" "$@"; }}
{steps}
"""


class Job:
    """A job that was submitted for a trial, to be followed as a process is."""

    def __init__(self, number: str, trial: str) -> None:
        self.id, self.trial = number, trial
        self.state, self.code, self.restarts = "", 0, ""  # as SLURM said last
        self.looked = -JOB_POLL_SECONDS
        self.notes: list[str] = []  # that were printed

    def poll(self) -> int | None:
        """Returns the exit code as soon as the job has ended for good: neither runs nor waits to run again.

        A state that SLURM passes through on the way to a requeue is not seen twice.
        """
        if time.monotonic() - self.looked < JOB_POLL_SECONDS:
            return None
        try:
            job = look(self.id)
        except (subprocess.SubprocessError, OSError) as error:
            self._note(f"SLURM does not answer ({_reason(error)}): waiting")
            return None
        finally:
            self.looked = time.monotonic()
        before, self.state, self.code = self.state, job["state"], int(job["code"])
        if job["restarts"] not in ("", "0", self.restarts):
            self.restarts = job["restarts"]
            self._note(f"job {self.id} was requeued, restart {self.restarts}")
        if "held" in job["reason"].lower():
            self._note(f"job {self.id} is held ({job['reason']}): scontrol release {self.id} lets it start")
        if self.state == "COMPLETED" or (self.state in FINAL and self.state == before):
            return self.code
        return None

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
            say(f"{self.trial}: {sentence}")

    def end(self) -> None:
        """Cancels the job, on which the run saves and stops; returns when it has."""
        with suppress(subprocess.CalledProcessError):  # it has ended by itself
            ask_slurm("scancel", self.id)
        while self.poll() is None:
            time.sleep(1)


def look(number: str) -> dict[str, str]:
    """Returns state, exit code, reason and restarts of a job, by the controller, or by sacct if that has forgotten it.

    Raises ConfigError where there is no SLURM, SubprocessError if it does not answer.
    """
    try:
        job = show_job(number)
        code = job.get("ExitCode", "")
        about = {"state": job["JobState"], "reason": job.get("Reason", ""), "restarts": job.get("Restarts", "")}
    except FileNotFoundError as error:
        raise ConfigError(
            f"a trial of this sweep is job {number} of SLURM, and there is no scontrol here: start sweep.py where it is"
        ) from error
    except subprocess.CalledProcessError as error:
        if "Invalid job id" not in error.stderr:
            raise
        state, code = _of_accounting(number)
        about = {"state": state, "reason": "", "restarts": ""}
    status, _, signum = code.partition(":")
    return about | {"code": status if status not in ("", "0") else f"-{signum or 0}"}


def _of_accounting(number: str) -> tuple[str, str]:
    """Returns state and exit code of a job by sacct; FORGOTTEN without accounting."""
    try:
        said = ask_slurm("sacct", "-nXP", "-j", number, "-o", "State,ExitCode").split("\n")[0]
    except (subprocess.SubprocessError, OSError):
        said = ""
    state, _, code = said.partition("|")
    return (state.split() or [FORGOTTEN])[0], code


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "stderr", None) or error).split())[:200]


def job_name(config: SweepConfig, folder: Path) -> str:
    """Returns a name that no other trial's job has: it finds a job that was submitted a moment before a SIGKILL."""
    name = re.sub(r"[^\w.-]", "_", config.name)  # squeue takes a list
    return f"{name}-{folder.name}-{sha256(os.fsencode(folder.resolve())).hexdigest()[:8]}"


def find(config: SweepConfig, folder: Path, record: dict[str, Any]) -> Job | None:
    """Returns the job of a trial that an earlier sweep.py has submitted; None if there is none.

    record  what was kept of the last one: its `id`, `log`, `step` and `trained`

    Raises RunEnded if SLURM does not answer.
    """
    name = job_name(config, folder)
    try:
        said = ask_slurm("squeue", "--noheader", "--format=%A", f"--user={getpass.getuser()}", f"--name={name}")
    except (subprocess.SubprocessError, OSError) as error:
        raise RunEnded(
            f"SLURM does not say whether {folder.name} has a job ({_reason(error)}). The same command resumes"
        ) from error
    found = said.split()
    if found:
        return Job(found[-1], folder.name)
    return Job(record["id"], folder.name) if record else None


def submit(config: SweepConfig, folder: Path, programs: list[list[str]], environment: dict[str, str]) -> Job:
    """Submits the programs of a trial, one after the other, each with as many tasks as the job has.

    Raises RunEnded if SLURM refuses it, as it would the next.
    """
    script = folder.with_suffix(".sbatch")
    steps = " || exit\n".join(f"step {shlex.join(words)}" for words in programs)
    with write_atomically(script) as temporary:
        temporary.write_text(SCRIPT.format(folder=folder, python=sys.executable, steps=steps))
    output = str(folder.with_suffix(".log").resolve()).replace("%", "%%")
    words = [*reveal_all(config.launch), f"--job-name={job_name(config, folder)}", f"--output={output}"]
    words += ["--open-mode=append", "--parsable", str(script)]
    # What describes the job that sweep.py itself may be in would count as options of srun in the new one.
    outside = {name: value for name, value in environment.items() if name == "SLURM_CONF" or name[:6] != "SLURM_"}
    try:
        return Job(ask_slurm(*words, environment=outside).strip().partition(";")[0], folder.name)
    except (subprocess.SubprocessError, OSError) as error:
        raise RunEnded(f"sbatch refuses {folder.name}: {_reason(error)}. See sweep.launch={config.launch}") from error


def progress(folder: Path) -> tuple[bool, int]:
    """Returns how far a trial is: whether it is trained, and the step of its newest checkpoint."""
    checkpoint = newest_checkpoint(folder)
    return (folder / "summary.json").exists(), checkpoint[0] if checkpoint else 0


def may_go_on(job: Job) -> bool:
    """Returns whether the job ended by no fault of the trial, and nothing requeues it."""
    return job.state in BY_THE_CLUSTER or (job.state == "FAILED" and job.code in STOPPED)


def job_is_ending() -> bool:
    """Returns whether the job that sweep.py itself is in is requeued or about to end: its time is up, or pre-empted."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    try:
        job = show_job()
    except (subprocess.SubprocessError, OSError):
        return False
    started_anew = int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    pre_empted = job.get("PreemptTime", "None") not in ("None", "Unknown")
    return started_anew or pre_empted or job.get("JobState") != "RUNNING"
