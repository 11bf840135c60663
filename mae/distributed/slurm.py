"""SLURM: checks of its variables, the id of the job, requeueing."""

import os
import signal
import subprocess
from contextlib import suppress

from mae.errors import ConfigError

INTERACTIVE = ("bash", "interactive")  # names that SLURM gives to the jobs of people who try things


def job_id() -> str:
    """Returns the id for scontrol: ARRAY_TASK for a task of a job array, else that of the job."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def submitit_signal() -> signal.Signals | None:
    """Returns the signal by which SLURM warns submitit of the end; None if submitit did not start this job."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    return signal.Signals["SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")]


def started_tasks() -> int:
    """Returns how many tasks srun has started, of which this process is one; 1 without srun.

    Raises ConfigError if a job with room for several was given to one process, or lacks what Lightning asks for.
    """
    environment = os.environ
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks == "1":
        return 1
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        if environment.get("SLURM_JOB_NAME") in INTERACTIVE:
            return 1
        raise ConfigError(
            f"this job has SLURM_NTASKS={tasks}, but only one process was started: write srun before the command"
        )
    if "SLURM_NTASKS_PER_NODE" not in environment:
        raise ConfigError(f"SLURM_NTASKS={tasks} without a number per node: set --ntasks-per-node, one task per GPU")
    return int(tasks)


def requeue(signum: int, rank: int) -> None:
    """Requeues this SLURM job if its warning signal stopped the run. Called on every rank after the save; only rank 0
    asks SLURM.

    SIGUSR1   the warning: `--signal=USR1@120` sends it ahead of the time limit, after which SLURM does not requeue, and
              PreemptParameters=send_user_signal ahead of a pre-emption
    SIGTERM   no requeue here: scancel sends it when nobody wants the job any more, and SLURM ahead of other
              pre-emptions, after which it requeues by itself (PreemptMode=REQUEUE)
    SIGINT    the user's: no requeue
    submitit  sends its own signal; its handler, in place again by now, requeues
    """
    owner = submitit_signal()
    if signum != (owner or signal.SIGUSR1) or "SLURM_JOB_ID" not in os.environ:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # The requeue sends it and leaves half a minute for the exit.
    if rank != 0:
        return
    if owner is not None:
        with suppress(SystemExit):  # submitit's handler exits; all ranks have to exit together.
            signal.raise_signal(owner)
        return
    try:
        subprocess.run(["scontrol", "requeue", job_id()], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        print(f"job {job_id()} could not be requeued ({reason}): submit it again", flush=True)
    else:
        print(f"job {job_id()} requeued", flush=True)
