"""Jobs of the documented batch script on the cluster of slurm_cluster, and what docs/clusters.md says of their ends."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mae.run.metrics import read_metrics
from tests.conftest import ROOT
from tests.processes import SMALL, command, run, wait_for_checkpoint
from tests.slurm_cluster import Cluster

LENGTH = ("max_steps=150", "checkpoint.every_steps=5", "val_every=null", "data.workers=0", "precision=32-true")
SECONDS = 240


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted_run")
    run(command(runs, built_in, *LENGTH, "name=whole", ranks=2))
    return runs / "whole"


def wait_until(condition: Callable[[], bool], explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


def documented_rows() -> dict[str, str]:
    """Returns what ends a job -> state in sacct, by the table in docs/clusters.md."""
    _, _, table = (ROOT / "docs" / "clusters.md").read_text().partition("| what ends the job |")
    rows = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()[2:]]
    return {row[0].replace("`", ""): row[-1] for row in rows}


DOCUMENTED = documented_rows()


def assert_states(cluster: Cluster, job: str, *states: str) -> None:
    """Compares the ends of the job's starts by sacct, which may lag behind."""
    wait_until(lambda: cluster.states(job) == list(states), lambda: str(cluster.states(job)))


class Job:
    """A run of the batch script, submitted."""

    def __init__(
        self, cluster: Cluster, runs: Path, root: Path, name: str, *settings: str, options: str = "", **environment: str
    ) -> None:
        self.cluster, self.name, self.folder, self.output = cluster, name, runs / name, runs / f"{name}.out"
        self.runs, self.root, self.settings, self.options, self.environment = runs, root, settings, options, environment
        self.submit()

    def submit(self) -> None:
        words = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", *self.options.split()]
        words += [f"--output={self.output}", f"--chdir={self.runs}", str(ROOT / "docs" / "examples" / "train.sbatch")]
        words += [*SMALL, *LENGTH, f"runs={self.runs}", f"data.root={self.root}", f"name={self.name}", *self.settings]
        environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "300"} | self.environment
        if "RUN_FAILS" in environment:
            environment["SLURM_TASK_PROGRAM"] = str(ROOT / "tests" / "slurm_run.py")
        self.id = self.cluster.command("sbatch", "--parsable", *words, **environment).strip()

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def state(self) -> str:
        return self.cluster.show(self.id)["JobState"]

    def assert_states(self, *states: str) -> None:
        assert_states(self.cluster, self.id, *states)

    def wait_for(self, *states: str) -> None:
        wait_until(lambda: self.state() in states, lambda: f"job {self.id} is {self.state()}\n{self.said[-3000:]}")

    def wait_for_step(self, step: int = 10) -> None:
        wait_for_checkpoint(None, self.folder, step)

    def lost(self) -> list[int]:
        """Returns at each restart the number of steps that it had to compute again."""
        before, *after = re.split(r"resumed at step (\d+)", self.said)
        starts, said = [0, *map(int, after[0::2])], [before, *after[1::2]]
        reached = [
            max([start, *map(int, re.findall(r"step (\d+)/", text))]) for start, text in zip(starts, said, strict=True)
        ]
        return [last - start for last, start in zip(reached, starts[1:], strict=False)]

    def step(self) -> int:
        """Returns the last step that was logged."""
        return max((int(row["step"]) for row in read_metrics(self.folder / "metrics.csv")), default=0)

    def starts(self) -> list[dict[str, Any]]:
        path = self.folder / "environment.json"
        return json.loads(path.read_text())["starts"] if path.exists() else []

    def restarts(self) -> int:
        return int(self.cluster.show(self.id)["Restarts"])

    def tasks(self) -> dict[int, int]:
        """Returns rank -> process of the running step."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "environ").read_bytes().split(b"\0")
                if b"slurm_task" in (process / "cmdline").read_bytes() and f"SLURM_JOB_ID={self.id}".encode() in words:
                    ranks = [word for word in words if word.startswith(b"SLURM_PROCID=")]
                    if b"SLURM_STEP_ID=0" in words:
                        found[int(ranks[0].partition(b"=")[2])] = int(process.name)
            except OSError:
                continue
        return found


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path, built_in: Path) -> Iterator:
    jobs: list[Job] = []

    def submit(name: str, *settings: str, options: str = "", **environment: str) -> Job:
        jobs.append(Job(cluster, tmp_path, built_in, name, *settings, options=options, **environment))
        return jobs[-1]

    yield submit
    for job in jobs:  # -s prints it
        states = cluster.command("sacct", "-nDXPj", job.id, "-o", "State,ExitCode").split()
        print(f"\n{job.name}: {', '.join(states)}; steps lost {job.lost()}")
        cluster.command("scancel", job.id, code=None)


def preempt_all(cluster: Cluster) -> None:
    """Submits a job that takes both nodes from all others for a moment."""
    words = ["--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--output=/dev/null"]
    cluster.command("sbatch", *words, "--wrap=sleep 1")
