"""Restarts by torchrun, SLURM and Kubernetes: whether this process continues an earlier one of the same launch.

A launch is what a person starts once. MAE_LAUNCH_ID, where it is set, names it: another one for each launch, the same
for all its restarts.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mae.distributed.processes import LAUNCHER, Process, identify
from mae.distributed.slurm import job_id
from mae.errors import ConfigError

COUNTERS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
WITHOUT_ID = "torchrun without --rdzv-id"
LOOPBACK = ("127.0.0.1", "localhost")  # where torchrun of one machine has its store


def launch_names() -> dict[str, str]:
    """Returns what this launch can be recognised by, kind by kind; nothing for a program started by hand."""
    environment = os.environ
    names = {}
    if given := environment.get("MAE_LAUNCH_ID"):
        names["MAE_LAUNCH_ID"] = given
    if "SLURM_JOB_ID" in environment:
        names["SLURM job"] = job_id()
    if "TORCHELASTIC_RUN_ID" in environment:
        run_id = environment["TORCHELASTIC_RUN_ID"]
        names["torchrun"] = run_id if run_id != "none" else _words(identify(LAUNCHER))
        # Several machines, or one that is left of them, whose rank 0 may have moved to another one.
        if run_id == "none" and environment.get("MASTER_ADDR", "127.0.0.1") not in LOOPBACK:
            names[WITHOUT_ID] = "on several machines"
    if "KUBERNETES_SERVICE_HOST" in environment:
        names["pod"] = socket.gethostname()
        names["container"] = _words(identify(1))  # a namespace's own number is given again at once
    return names


def _words(process: Process) -> str:
    return " ".join(map(str, process))


def is_counted_restart() -> bool:
    """Returns True if torchrun or SLURM says that it has started this program before."""
    return any(os.environ.get(name, "0") != "0" for name in COUNTERS)


def continues(begun_by: dict[str, str]) -> str | None:
    """Returns by what this process is known as a restart of the launch that has these names; None if it is none.

    In one SLURM job a person may start many runs: only SLURM's or torchrun's counter makes a restart of them. So does a
    pod's new container, but not a second program in the same one.

    Raises ConfigError where nothing tells a restart from another launch: torchrun counts none when a machine joins.
    """
    names = launch_names()
    if "MAE_LAUNCH_ID" in names:
        return "MAE_LAUNCH_ID" if begun_by.get("MAE_LAUNCH_ID") == names["MAE_LAUNCH_ID"] else None
    for kind, proves in (
        ("torchrun", True),
        (WITHOUT_ID, is_counted_restart()),
        ("SLURM job", is_counted_restart()),
        ("pod", names.get("container") != begun_by.get("container")),
    ):
        if proves and kind in names and names[kind] == begun_by.get(kind):
            return f"{kind} {names[kind]}"
    if names.get(WITHOUT_ID, "") == begun_by.get(WITHOUT_ID):
        raise ConfigError(
            "resume=never: torchrun on several machines without --rdzv-id may have begun this very run, and start it "
            "again because a machine has joined. Give torchrun an --rdzv-id, another one for each launch"
        )
    return None


def start_name() -> str:
    """Returns what the ranks of this start have in common, and other starts of the same launch have not.

    Each torchrun counts its own restarts: one that has joined later has another number.
    """
    elastic = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    shared = elastic if "TORCHELASTIC_RUN_ID" in os.environ else ()
    shared += ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return " ".join(f"{name}={os.environ[name]}" for name in shared if name in os.environ)


def note_in_journal(line: str) -> None:
    """Appends a line to the file that the batch script reads when this start has ended (MAE_JOURNAL), if there is one.

    `step 500`  rank 0 starts at this step
    `end 2`     a rank ends on purpose with this exit code. srun may give another one: that of a rank which it has ended
    """
    if journal := os.environ.get("MAE_JOURNAL"):
        with suppress(OSError), open(journal, "a") as file:  # on a full disk the batch script cannot go on either
            file.write(f"{line}\n")


class NotedExit(SystemExit):
    """An exit of which the journal says already what the batch script shall know."""


@contextmanager
def journal_of_end() -> Iterator[None]:
    """Notes an end on purpose with another code than 0: told to stop, or unable to go on."""
    try:
        yield
    except NotedExit:
        raise
    except SystemExit as end:
        if end.code:
            note_in_journal(f"end {end.code}")
        raise
