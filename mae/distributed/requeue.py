"""Requeueing a SLURM job: who has ended it, and who brings it back. Loaded when a run is stopped."""

import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress

from mae.distributed.rank_zero import is_rank_zero
from mae.distributed.slurm import job_id, submitit_signal


def requeue(signum: int, *, agreed: bool) -> bool:
    """Requeues this SLURM job, if it is one, nobody else does and it shall come back. Called on every rank; rank 0 asks
    SLURM and prints what becomes of the job.

    agreed   all ranks have stopped after the same step; False: this one has, outside of the training loop
    returns  False if the end has to count as a crash: srun may have ended this rank because another one has crashed

    SIGINT is the user's: no requeue. Under submitit its own signal is answered by its handler, in place again by now.
    """
    if "SLURM_JOB_ID" not in os.environ or signum == signal.SIGINT:
        return True
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # A requeue sends it and leaves half a minute for the exit.
    owner = submitit_signal()
    if not is_rank_zero() or (owner is not None and signum == signal.SIGUSR1):
        return True
    if owner is not None and signum == owner:
        with suppress(SystemExit):  # submitit's handler exits; all ranks have to exit together.
            signal.raise_signal(owner)
        return True
    try:
        job = show_job()
        ranks = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        comes_back, sentence = why_ended(signum, job, preempt_mode(job), told=agreed or ranks == "1")
        if comes_back:
            ask_slurm("scontrol", "requeue", job_id())
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        print(f"job {job_id()} could not be requeued ({reason}): submit it again", flush=True)
        return True
    print(sentence, flush=True)
    return comes_back is not None


def why_ended(signum: int, job: dict[str, str], mode: str, told: bool) -> tuple[bool | None, str]:
    """Returns whether the run has to requeue its job, and the sentence that says what becomes of it.

    None stands for a SIGTERM that may have come from srun, which ends the ranks beside one that has crashed.

    signum  SIGUSR1: `--signal=USR1@120` ahead of the time limit, or PreemptParameters=send_user_signal. SIGTERM: a
            pre-emption, the time limit, scancel, `scontrol requeue`, or somebody who wants the run to stop
    job     what `scontrol show job` says after the save
    mode    PreemptMode of the job's partition or QOS
    told    all ranks were told to stop, or there is one only

    SLURM requeues by itself what it has ended (a pre-emption without a grace time, or after it, `scontrol requeue`) and
    has then counted a restart. It books a run that leaves within the grace time as failed, and never requeues that.
    """
    name = f"job {job_id()}"
    if int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        if "held" in job.get("Reason", ""):
            return False, f"{name} requeued by SLURM and held: `scontrol release {job_id()}` lets it start"
        return False, f"{name} requeued by SLURM"
    if job.get("PreemptTime", "None") not in ("None", "Unknown"):
        if "CANCEL" in mode:
            return False, f"{name} pre-empted with PreemptMode={mode}, after which nothing requeues it: submit it again"
        return True, f"{name} requeued: pre-empted"
    if job.get("Reason") == "TimeLimit":
        return True, f"{name} requeued: its time limit was reached"
    if job.get("JobState") != "RUNNING":
        return False, f"{name} cancelled: submit it again to resume"
    if signum == signal.SIGUSR1:
        return True, f"{name} requeued: warned of its end by SIGUSR1"
    if not told and signum == signal.SIGTERM:
        return None, f"{name}: SIGTERM was sent by scancel --signal, or another rank has crashed"
    return False, f"{name} not requeued: {signal.Signals(signum).name} was sent by scancel --signal, or not by SLURM"


def show_job(job: str | None = None) -> dict[str, str]:
    """Returns what `scontrol show job` says of a job, this one unless another is named."""
    words = ask_slurm("scontrol", "--oneliner", "show", "job", job or job_id()).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def preempt_mode(job: dict[str, str]) -> str:
    """Returns what SLURM does with this job when another one pre-empts it: REQUEUE, CANCEL, …; "" if not known."""
    if job.get("PreemptTime", "None") in ("None", "Unknown"):
        return ""
    settings = ask_slurm("scontrol", "show", "config")
    cluster = _value("PreemptMode", settings)
    if _value("PreemptType", settings) == "preempt/qos":
        try:
            mode = ask_slurm("sacctmgr", "-nP", "show", "qos", job["QOS"], "format=preemptmode").strip()
        except (OSError, subprocess.SubprocessError):  # no accounting from here
            return ""
        return cluster if mode == "cluster" else mode.upper()
    return _value("PreemptMode", ask_slurm("scontrol", "show", "partition", job["Partition"])) or cluster


def _value(name: str, said: str) -> str:
    found = re.search(rf"\b{name}\s*=\s*(\S+)", said)
    return found[1] if found else ""


def ask_slurm(*words: str, environment: dict[str, str] | None = None) -> str:
    """Returns what a command of SLURM prints. A controller that does not answer is asked again twice."""
    for pause in (2, 5, None):
        try:
            done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60, env=environment)
            return done.stdout
        except subprocess.CalledProcessError as error:
            if pause is None or "controller" not in error.stderr:
                raise
            time.sleep(pause)
    raise AssertionError
