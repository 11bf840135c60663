"""What SLURM tells a job and what a job asks of SLURM: its ranks, and to be started again."""

import os
import signal
import subprocess
from contextlib import suppress

from mae.errors import ConfigError


def job_id() -> str:
    """The id that scontrol knows this job by, as a task of an array where it is one."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def submitit_signal() -> signal.Signals | None:
    """The signal by which SLURM tells submitit of the end; None when this job was not started by submitit."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    return signal.Signals["SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")]


def refuse_unlaunched_ranks() -> None:
    """Raises ConfigError where SLURM has room for several ranks, but this process was not started as one of them."""
    ranks = os.environ["SLURM_NTASKS"]
    if ranks == "1":
        return
    if "SLURM_STEP_ID" not in os.environ:
        raise ConfigError(
            f"this job has SLURM_NTASKS={ranks}, but only one process was started: write srun before the command"
        )
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError(f"SLURM_NTASKS={ranks} without a number per node: set --ntasks-per-node, one task per GPU")


def requeue(signum: int, rank: int) -> None:
    """Has the stopped job started again, asked for once, by rank 0, when all is saved.

    SIGUSR1 comes by `--signal=USR1@120` ahead of the time limit, after which SLURM does not requeue, and ahead of a
    pre-emption where the cluster sets PreemptParameters=send_user_signal. SIGTERM comes from scancel, when nobody
    wants the job any more, and ahead of other pre-emptions, after which SLURM itself requeues
    (PreemptMode=REQUEUE). SIGINT is the user's. Under submitit its own handler is in place again, and requeues.
    """
    owner = submitit_signal()
    if signum != (owner or signal.SIGUSR1) or "SLURM_JOB_ID" not in os.environ:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue sends it: half a minute for what is left to be done
    if rank != 0:
        return
    if owner is not None:
        with suppress(SystemExit):  # submitit would leave here; all ranks leave together
            signal.raise_signal(owner)
        return
    try:
        subprocess.run(["scontrol", "requeue", job_id()], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        print(f"job {job_id()} could not be requeued ({reason}): submit it again", flush=True)
    else:
        print(f"job {job_id()} requeued", flush=True)
