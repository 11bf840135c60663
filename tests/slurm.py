"""Stand-ins for sbatch, srun, scontrol and sacct: one node, one job, real processes.

`install` puts them into a folder for the PATH, which also holds what they note: the running tasks, the requeues, the
state of the job. They do what is promised in SLURM's manual pages, and the unpleasant with it: a requeue sends SIGTERM
to the tasks, and --kill-on-bad-exit kills all tasks as soon as one has failed.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from tests.forked import Program, sessions

JOB = "4242"
COMMANDS = ("sbatch", "srun", "scontrol", "sacct")


def install(folder: Path) -> dict[str, str]:
    """Installs the commands and returns the environment in which they are found."""
    folder.mkdir()
    for command in COMMANDS:
        file = folder / command
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {command} "$@"\n')
        file.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_STAND_IN": str(folder), "PYTHON": sys.executable}


def requeues(folder: Path) -> list[str]:
    file = folder / "requeues"
    return file.read_text().split() if file.exists() else []


def exit_code(folder: Path, seconds: float = 150) -> int:
    """Returns the job's, once it has ended for good."""
    deadline = time.monotonic() + seconds
    while not (folder / "exit").exists():
        assert time.monotonic() < deadline, "the job does not end"
        time.sleep(0.05)
    return int((folder / "exit").read_text())


def signal_step(folder: Path, signum: int) -> None:
    """To every process of the running step, loader workers and services included, as from a cgroup."""
    tasks = {int(task) for task in (folder / "tasks").read_text().split()}
    for pid, session in sessions().items():
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if session in tasks or (f"SLURM_STAND_IN={folder}".encode() in words and b"SLURM_STEP_ID=0" in words):
                os.kill(pid, signum)
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue


def sbatch(words: list[str]) -> None:
    """Submits words = OPTIONS SCRIPT ARGUMENTS; options on the command line win over those in the script."""
    at = next(i for i, word in enumerate(words) if not word.startswith("--"))
    lines = Path(words[at]).read_text().splitlines()
    options = [line.split()[1].replace("'", "") for line in lines if line.startswith("#SBATCH")] + words[:at]
    settings = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    log = Path(settings["output"].replace("%j", JOB))
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        environment = {
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NAME": settings["job-name"],
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_NNODES": "1",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NODELIST": "localhost",
            "SLURM_NTASKS": settings["ntasks-per-node"],
            "SLURM_NTASKS_PER_NODE": settings["ntasks-per-node"],
            "SLURM_CPUS_PER_TASK": settings["cpus-per-task"],
        }
        subprocess.Popen(
            [sys.executable, __file__, "controller", *words[at:]],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    print(f"Submitted batch job {JOB}")


def controller(words: list[str]) -> None:
    """Runs the batch script again for every requeue that was asked for while it ran."""
    starts, code = 0, 0
    while starts <= len(requeues(FOLDER)):
        code = subprocess.call(["bash", *words], env=os.environ | {"SLURM_RESTART_COUNT": str(starts)})
        starts += 1
    (FOLDER / "exit").write_text(str(code))


def srun(words: list[str]) -> None:
    """One process per task of words = OPTIONS COMMAND ARGUMENTS."""
    kill_on_bad_exit, streams = False, {}
    while words[0].startswith("--"):
        name, _, value = words.pop(0).removeprefix("--").partition("=")
        if name in ("output", "error"):
            streams[{"output": "stdout", "error": "stderr"}[name]] = value or words.pop(0)
        kill_on_bad_exit |= name == "kill-on-bad-exit"
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        names = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_STEP_ID": 0}
        files = {k: open(v.replace("%j", JOB).replace("%t", str(rank)), "ab") for k, v in streams.items()}  # noqa: SIM115
        start = Program if words[0] == sys.executable else subprocess.Popen
        environment = os.environ | {name: str(value) for name, value in names.items()}
        tasks.append(start(words, env=environment, **files, start_new_session=True))
    (FOLDER / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    while any(task.poll() is None for task in tasks):
        if kill_on_bad_exit and any(task.poll() for task in tasks):
            for task in tasks:
                task.kill()
        time.sleep(0.01)
    sys.exit(max(task.returncode % 256 for task in tasks))


def scontrol(words: list[str]) -> None:
    assert words[0] == "requeue", words
    with open(FOLDER / "requeues", "a") as file:
        file.write(f"{words[1]}\n")
    for task in (FOLDER / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)


def sacct(words: list[str]) -> None:
    state = "COMPLETED" if (FOLDER / "exit").exists() else "RUNNING"
    print(f"JobID|State|NodeList\n{JOB}|{state}|localhost")


if __name__ == "__main__":
    FOLDER = Path(os.environ["SLURM_STAND_IN"])
    globals()[sys.argv[1]](sys.argv[2:])
