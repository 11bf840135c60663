"""One run on a real SLURM cluster that is interrupted in all ways, one after another."""

import json
import os
import random
import secrets
import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.processes import assert_same_run
from tests.slurm_cluster import GRACE_SECONDS, Cluster, cluster
from tests.slurm_jobs import DOCUMENTED, Job, preempt_all, submit, uninterrupted_run, wait_until

pytestmark = pytest.mark.slow
__all__ = ["cluster", "submit", "uninterrupted_run"]


def interruptions(
    job: Job, cluster: Cluster, draw: random.Random, broken: Path
) -> dict[str, tuple[str, Callable[[], object]]]:
    """Returns kind -> state in sacct that is documented for it, and what brings it about."""

    def reach_time_limit() -> None:
        ends = (datetime.now() + timedelta(seconds=25)).isoformat(timespec="seconds")
        cluster.command("scontrol", "update", f"job={job.id}", f"EndTime={ends}")

    def preempt(grace: int) -> None:
        cluster.command("scontrol", "update", "partition=low", f"GraceTime={grace}")
        preempt_all(cluster)

    def break_node() -> None:
        restarts = job.restarts()
        cluster.break_node("n2", job.tasks()[1])
        wait_until(lambda: job.restarts() > restarts)
        cluster.mend_node("n2")

    def hold() -> None:
        cluster.command("scontrol", "requeuehold", job.id)
        wait_until(lambda: cluster.show(job.id).get("Reason") == "job_requeued_in_held_state")
        cluster.command("scontrol", "release", job.id)

    def stop() -> None:
        cluster.command("scancel", "--signal=TERM", job.id)
        job.wait_for("FAILED")
        job.submit()

    warned = DOCUMENTED["time limit, with --signal=USR1@…"]
    return {
        "time limit, with --signal": (warned, reach_time_limit),
        "scancel --signal=USR1": (warned, lambda: cluster.command("scancel", "--signal=USR1", job.id)),
        "scancel --signal=TERM, submitted again": (DOCUMENTED["scancel --signal=TERM"], stop),
        "pre-emption with a grace time": (DOCUMENTED["pre-emption with a grace time"], lambda: preempt(GRACE_SECONDS)),
        "pre-emption without": (DOCUMENTED["pre-emption without a grace time"], lambda: preempt(0)),
        "node failure": (DOCUMENTED["node failure"], break_node),
        "scontrol requeue": (
            DOCUMENTED["scontrol requeue"],
            lambda: cluster.command("scontrol", "requeue", job.id),
        ),
        "scontrol requeuehold, release": (DOCUMENTED["scontrol requeuehold"], hold),
        "a rank killed (SIGKILL)": (
            DOCUMENTED["a rank killed (SIGKILL)"],
            lambda: os.kill(job.tasks()[draw.randrange(2)], signal.SIGKILL),
        ),
        "a rank stopped (SIGSTOP)": (
            DOCUMENTED["a rank stopped (SIGSTOP), or hanging"],
            lambda: os.kill(job.tasks()[draw.randrange(2)], signal.SIGRTMIN),
        ),
        "CUDA error (raised)": (DOCUMENTED["CUDA error"], broken.touch),
    }


def test_eleven_interruptions_of_all_kinds_leave_no_trace(
    submit, cluster: Cluster, uninterrupted_run: Path, tmp_path: Path
) -> None:
    """In one run, in an order and at steps that are drawn with a seed: INTERRUPTIONS_SEED repeats them."""
    seed = int(os.environ.get("INTERRUPTIONS_SEED", secrets.randbelow(1000)))
    print(f"\nseed {seed}")  # -s shows it, and a failure
    draw = random.Random(seed)
    fails = {"pause": 0.4, "error": "cuda", "when": str(tmp_path / "broken")}
    job = submit("mixed", "hang.step=5", options="--time=60 --signal=USR1@20", RUN_FAILS=json.dumps(fails))
    kinds = interruptions(job, cluster, draw, tmp_path / "broken")
    order, seen, jobs, begun = draw.sample(list(kinds), len(kinds)), [], [job.id], time.monotonic()
    for number, kind in enumerate(order, 1):
        wait_until(lambda n=number: len(job.starts()) == n, lambda: job.said[-3000:])
        at = job.starts()[-1]["step"] + draw.randint(3, 9)
        wait_until(lambda at=at: job.step() >= at, lambda: job.said[-3000:])
        time.sleep(draw.random() / 2)
        seen.append(job.step())
        kinds[kind][1]()
        if job.id not in jobs:
            jobs.append(job.id)
        wait_until(lambda n=number: len(job.starts()) > n, lambda kind=kind: f"{kind}\n{job.said[-3000:]}")
        cluster.command("scontrol", "update", f"job={job.id}", "TimeLimit=60")
    job.wait_for("COMPLETED")

    states = [state for each in jobs for state in cluster.states(each)]
    resumed = [start["step"] for start in job.starts()[1:]]
    for row in zip(order, seen, resumed, job.lost(), states, strict=False):
        print(f"| {' | '.join(map(str, row))} |")
    print(f"{time.monotonic() - begun:.0f} s")
    wait_until(
        lambda: (
            [state for each in jobs for state in cluster.states(each)]
            == [*(kinds[kind][0] for kind in order), "COMPLETED"]
        ),
        lambda: str(states),
    )
    assert_same_run(job.folder, uninterrupted_run)
