"""Sweeps on a real SLURM cluster: trials as jobs, and arrays of sweep.py with one study."""

import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tasks.search.jobs import FORGOTTEN, look
from tests.conftest import ROOT
from tests.postgres import Postgres, postgres
from tests.processes import command as run_command
from tests.processes import completed, finish, kill, run, start
from tests.slurm_cluster import Cluster, cluster
from tests.test_experiments import REDUCED
from tests.test_slurm import preempt_all, wait_until
from tests.test_sweep import RATES, STAND_IN, command, study, table
from tests.test_sweeps_together import assert_each_once, trials_of, wait_until_both_work

pytestmark = pytest.mark.slow
__all__ = ["cluster", "postgres"]

JOBS = ["sbatch", "--ntasks=1", "--cpus-per-task=1"]


@pytest.fixture
def environment(cluster: Cluster, tmp_path: Path) -> dict[str, str]:
    """Has jobs run the stand-in, 20 steps in 4 seconds."""
    python = tmp_path / "stand_in"
    python.write_text(f'#!/bin/sh\nexec {" ".join(STAND_IN)} python "$@"\n')
    python.chmod(0o755)
    return cluster.environment | {"PYTHON": str(python), "STEP_SECONDS": "0.2"}


def jobs(cluster: Cluster) -> dict[str, list[str]]:
    """Returns trial -> the jobs that were submitted for it, by sacct."""
    names = cluster.command("sacct", "-nXP", "--starttime=now-1hours", "-o", "JobID,JobName").split()
    found: dict[str, list[str]] = {}
    for line in names:
        job, _, name = line.partition("|")
        if name.startswith("rates-trial-"):
            found.setdefault(name[len("rates-") :].rpartition("-")[0], []).append(job)
    return found


def test_killed_sweep_picks_its_jobs_up_again(cluster: Cluster, tmp_path: Path, environment) -> None:
    before = jobs(cluster)
    words = command(tmp_path, launch=JOBS, jobs=4)
    killed = start(words, **environment)
    wait_until(lambda: len(list(tmp_path.glob("rates/trial-*/metrics.csv"))) >= 3)
    kill(killed)
    time.sleep(6)  # some of its jobs end meanwhile
    done = completed(words, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on as job" in done.stdout

    assert [trial.state for trial in study(tmp_path).trials] == [TrialState.COMPLETE] * len(RATES)
    assert study(tmp_path).best_params == {"optim.base_lr": 0.003}
    submitted = jobs(cluster)
    assert {name: len(numbers) - len(before.get(name, [])) for name, numbers in submitted.items()} == {
        f"trial-{number:04d}": 1 for number in range(len(RATES))
    }


def test_ends_of_a_job_fail_prune_or_continue_its_trial(cluster: Cluster, tmp_path: Path, environment) -> None:
    """scancel is a failed trial, a requeued one goes on under its id, a pruned one is cancelled."""
    space = {"optim.base_lr": [0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 2.0, 0.7]}
    words = command(tmp_path, launch=JOBS, jobs=7, space=space, prune_by="knn/top1", prune_after=2)
    process = start(words, **environment)
    folder = tmp_path / "rates"

    def job(number: int) -> str:
        return study(tmp_path).trials[number].user_attrs["job"]["id"]

    wait_until(lambda: len(list(folder.glob("trial-*/metrics.csv"))) >= 6)
    cancelled, requeued = job(0), job(1)
    cluster.command("scancel", cancelled)
    cluster.command("scontrol", "requeue", requeued)
    said = finish(process)

    states = [row["state"] for row in table(tmp_path)]
    assert states == ["fail", *["complete"] * 5, "fail", "pruned"], said
    reasons = [row["reason"] for row in table(tmp_path)]
    assert reasons[0] == f"job {cancelled} was cancelled (scancel)"
    assert reasons[6].endswith("error: optim.base_lr=2.0 is too high")
    assert job(1) == requeued and f"trial-0001: job {requeued} was requeued, restart 1" in said
    assert cluster.states(job(7)) == ["CANCELLED"]
    steps = (folder / "trial-0001" / "metrics.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in steps] == list(range(1, 21))


def test_sweep_told_to_stop_leaves_its_jobs_and_refused_options_end_it(
    cluster: Cluster, tmp_path: Path, environment
) -> None:
    words = command(tmp_path, launch=JOBS, jobs=8)
    process = start(words, **environment)
    wait_until(lambda: len(list(tmp_path.glob("rates/trial-*/metrics.csv"))) >= 2)
    process.terminate()
    assert "jobs go on" in finish(process, 143)
    finish(start(words, **environment))
    assert [row["state"] for row in table(tmp_path)] == ["complete"] * len(RATES)

    words = command(tmp_path / "other", launch=[*JOBS, "--partition=nowhere"], jobs=1)
    said = finish(start(words, **environment), 2)
    assert "error: sbatch refuses trial-0000" in said and "invalid partition" in said
    assert [trial.state for trial in study(tmp_path / "other").trials] == [TrialState.RUNNING]  # for the next start


def test_jobs_that_nothing_requeues_are_submitted_again_while_they_get_further(
    cluster: Cluster, tmp_path: Path, environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, space = jobs(cluster), {"optim.base_lr": RATES[:2]}
    launch = [*JOBS, "--partition=cancelled", "--no-requeue"]
    process = start(command(tmp_path, launch=launch, space=space), **environment)
    wait_until(lambda: len(list(tmp_path.glob("rates/trial-*/checkpoints/step-00000005.ckpt"))) == 2)
    preempt_all(cluster)
    said = finish(process)
    assert [row["state"] for row in table(tmp_path)] == ["complete"] * 2, said
    assert said.count("is not requeued: it starts again") == 2
    submitted = jobs(cluster)
    assert [len(submitted[name]) - len(before.get(name, [])) for name in ("trial-0000", "trial-0001")] == [2, 2]

    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    assert look("99999999")["state"] == FORGOTTEN


def test_array_of_sweeps_shares_the_trials_and_its_tasks_are_requeued(
    cluster: Cluster, tmp_path: Path, postgres: Postgres
) -> None:
    storage = postgres.database()
    words = command(tmp_path, launch=STAND_IN, storage=storage, jobs=1)[2:]
    options = ["--array=1-2", "--cpus-per-task=1", f"--output={tmp_path}/%a.out", f"--chdir={ROOT}", "--parsable"]
    script = str(ROOT / "docs" / "examples" / "sweep.sbatch")
    array = cluster.command("sbatch", *options, script, *words, STEP_SECONDS="0.2", OMP_NUM_THREADS="1").strip()
    wait_until(lambda: len(list(tmp_path.glob("rates/trial-*/metrics.csv"))) >= 3, lambda: said(tmp_path))
    cluster.command("scancel", "--batch", "--signal=USR1", f"{array}_2")
    wait_until(lambda: cluster.show(f"{array}_2")["Restarts"] == "1", lambda: said(tmp_path))
    cluster.command("scontrol", "requeue", f"{array}_1")
    for task in (1, 2):
        wait_until(lambda task=task: cluster.show(f"{array}_{task}")["JobState"] == "COMPLETED", lambda: said(tmp_path))
    assert_each_once(tmp_path, storage)
    assert said(tmp_path).count(f"job {array}_2 requeued: warned of its end by SIGUSR1") == 1
    assert said(tmp_path).count(f"job {array}_1 requeued by SLURM") == 1


def test_multirun_is_submitted_as_one_array(cluster: Cluster, tmp_path: Path, built_in: Path) -> None:
    words = run_command(tmp_path, built_in, "max_steps=2", "launcher=slurm", "trainer.devices=1", "name=rates")
    words += ["optim.base_lr=0.001,0.002", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
    words[words.index("train.py")] = str(ROOT / "train.py")
    run([*words, "-m"], folder=tmp_path, **cluster.environment)

    sweep = tmp_path / "sweeps" / "rates"
    assert all((sweep / f"optim.base_lr={rate}" / "summary.json").exists() for rate in ("0.001", "0.002"))
    assert len({path.name.partition("_")[0] for path in sweep.glob(".submitit/[0-9]*_*")}) == 1


def said(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.out")))


@pytest.mark.timeout(1200)
def test_two_sweeps_with_jobs_one_killed_have_the_scores_of_an_uninterrupted_one(
    cluster: Cluster, tmp_path: Path, built_in: Path, postgres: Postgres
) -> None:
    """Real runs and evaluations."""
    small = [word for word in REDUCED if not word.startswith("max_steps")]
    settings = [*small, "model.image_size=32", "max_steps=4", "log_every=1", f"data.root={built_in}"]
    changes = {"settings": settings, "objective": "linear/top1", "direction": "maximize", "jobs": 2}
    changes |= {"space": {"optim.base_lr": RATES[::2]}}
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    began = time.monotonic()
    run(command(whole, **changes, launch=JOBS), **cluster.environment)
    print(f"uninterrupted: {time.monotonic() - began:.0f} s")

    storage, began, before = postgres.database(), time.monotonic(), jobs(cluster)
    words = command(shared, **changes, storage=storage, launch=JOBS)
    killed, other = start(words, **cluster.environment), start(words, **cluster.environment)
    wait_until_both_work(storage, [killed, other])
    wait_until(lambda: bool(list(shared.glob("rates/trial-*/metrics.csv"))))
    kill(killed)
    output = finish(other)
    print(output, f"two, one killed: {time.monotonic() - began:.0f} s")  # -s prints it
    for trial, undisturbed in zip(trials_of(storage), study(whole).trials, strict=True):
        assert (trial.params, trial.value) == (undisturbed.params, undisturbed.value)
    submitted = {name: len(numbers) - len(before.get(name, [])) for name, numbers in jobs(cluster).items()}
    assert max(submitted.values()) <= 1, f"{submitted}\n{output}"
