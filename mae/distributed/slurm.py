"""SLURM: the tasks that srun has started, the id of the job."""

import os
import signal

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


def started_tasks() -> list[int]:
    """Returns how many tasks srun has started on each node, this process being one of them; [1] without srun.

    The variables of the step say so: those of the job may speak of another step, or of nothing that was started.
    Raises ConfigError if a job with room for several tasks was given to one process.
    """
    environment = os.environ
    if "SLURM_STEP_TASKS_PER_NODE" in environment and "SLURM_PROCID" in environment:
        counts = []
        for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):  # 4(x2),3
            tasks, _, times = part.rstrip(")").partition("(x")
            counts += [int(tasks)] * int(times or 1)
        if sum(counts) > 1:
            return counts  # one alone may be the shell of salloc, whose job has room for more
    name = "SLURM_NTASKS" if "SLURM_NTASKS" in environment else "SLURM_NNODES"
    if environment.get(name, "1") != "1" and environment.get("SLURM_JOB_NAME") not in INTERACTIVE:
        raise ConfigError(
            f"this job has {name}={environment[name]}, but only one process was started: write srun before the command"
        )
    return [1]


def describe_step() -> None:
    """Sets the variables by which Lightning finds the ranks to those of this step, where srun leaves the job's.

    The number of tasks per node is that of sbatch, or absent (--ntasks); the list of nodes is that of the job, of which
    the step may not have the first. The port tells the steps of a job apart, which may run side by side.
    """
    environment = os.environ
    environment["SLURM_NTASKS_PER_NODE"] = str(started_tasks()[0])
    environment["SLURM_NODELIST"] = environment["SLURM_STEP_NODELIST"]
    port = int(environment["SLURM_JOB_ID"][-4:]) + 97 * int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_PORT", str(15000 + port % 10000))
