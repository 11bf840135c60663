"""Runs on a real SLURM cluster: whatever ends a job, it comes back, once, and ends as an uninterrupted run does.

Two ranks on two nodes by the documented batch script. Jobs that end at the same time share a test. The CUDA error is
one that slurm_run raises.
"""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.processes import SMALL, assert_same_run, command, finish, losses, start, wait_for_checkpoint
from tests.slurm_cluster import Cluster, cluster
from tests.slurm_jobs import (
    DOCUMENTED,
    LENGTH,
    Job,
    assert_states,
    preempt_all,
    submit,
    uninterrupted_run,
    wait_until,
)

pytestmark = pytest.mark.slow
__all__ = ["cluster", "submit", "uninterrupted_run"]


def test_each_row_of_the_documented_table_is_compared() -> None:
    assert set(re.findall(r'DOCUMENTED\["([^"]+)"\]', Path(__file__).read_text())) == DOCUMENTED.keys()


def assert_came_back(job: Job, uninterrupted_run: Path, sentence: str, *states: str) -> None:
    """Waits for the end of a job that was ended once, said so once, and finished as if nothing had been."""
    job.wait_for("COMPLETED")
    assert job.said.count(sentence) == 1, job.said
    job.assert_states(*states, "COMPLETED")
    assert_same_run(job.folder, uninterrupted_run)


def test_preempted_jobs_are_requeued_once_and_resume(submit, cluster: Cluster, uninterrupted_run: Path) -> None:
    at_once, grace = submit("at_once"), submit("grace", options="--partition=grace")
    cancelled = submit("cancelled", options="--partition=cancelled")
    for job in (at_once, grace, cancelled):
        job.wait_for_step()
    preempt_all(cluster)

    cancelled.wait_for("FAILED")
    assert f"job {cancelled.id} pre-empted with PreemptMode=CANCEL, after which nothing requeues it" in cancelled.said
    assert_came_back(
        grace, uninterrupted_run, f"job {grace.id} requeued: pre-empted", DOCUMENTED["pre-emption with a grace time"]
    )
    assert_came_back(
        at_once,
        uninterrupted_run,
        f"job {at_once.id} requeued by SLURM",
        DOCUMENTED["pre-emption without a grace time"],
    )
    cancelled.assert_states(DOCUMENTED["pre-emption with a grace time, PreemptMode=CANCEL"])


def test_jobs_ended_by_people_come_back_when_they_were_requeued(
    submit, cluster: Cluster, uninterrupted_run: Path
) -> None:
    unwanted, requeued, held, stopped = (submit(name) for name in ("unwanted", "requeued", "held", "stopped"))
    for job in (unwanted, requeued, held, stopped):
        job.wait_for_step()
    cluster.command("scancel", unwanted.id)
    cluster.command("scontrol", "requeue", requeued.id)
    cluster.command("scontrol", "requeuehold", held.id)
    cluster.command("scancel", "--signal=TERM", stopped.id)

    stopped.wait_for("FAILED")
    assert f"job {stopped.id} not requeued: SIGTERM was sent by scancel --signal" in stopped.said
    unwanted.wait_for("CANCELLED")
    assert f"job {unwanted.id} cancelled: submit it again" in unwanted.said
    unwanted.assert_states(DOCUMENTED["scancel"])
    stopped.assert_states(DOCUMENTED["scancel --signal=TERM"])
    held.wait_for("PENDING")
    assert cluster.show(held.id)["Reason"] == "job_requeued_in_held_state"
    cluster.command("scontrol", "release", held.id)
    assert_came_back(
        held, uninterrupted_run, f"job {held.id} requeued by SLURM and held", DOCUMENTED["scontrol requeuehold"]
    )
    assert_came_back(
        requeued, uninterrupted_run, f"job {requeued.id} requeued by SLURM\n", DOCUMENTED["scontrol requeue"]
    )


def test_jobs_that_end_by_themselves_are_requeued_unless_they_make_no_progress(
    submit, cluster: Cluster, uninterrupted_run: Path, tmp_path: Path
) -> None:
    """At their time limit, with and without a warning, and by crashes."""
    slow = json.dumps({"pause": 0.5})
    warned = submit("warned", options="--time=1 --signal=USR1@20", RUN_FAILS=slow)
    unwarned = submit("unwarned", options="--time=1 --signal=USR1@0", RUN_FAILS=slow)
    cuda = submit("cuda", RUN_FAILS=json.dumps({"error": "cuda", "when": str(tmp_path / "broken")}))
    (tmp_path / "broken").touch()
    always = submit("always", RUN_FAILS=json.dumps({"step": 20, "error": "exception"}), CRASHES_ALLOWED="1")
    hunger = {"step": 12, "error": "memory" if cluster.confines_memory else "killed", "when": str(tmp_path / "hunger")}
    cold = f"{cluster.folder}/cold"
    hungry = submit("hungry", options="--mem=2000M", PYTHON=cold, RUN_FAILS=json.dumps(hunger))
    (tmp_path / "hunger").touch()
    killed, silent = submit("killed"), submit("silent", "hang.step=5")
    killed.wait_for_step()
    os.kill(killed.tasks()[1], signal.SIGKILL)
    silent.wait_for_step()
    os.kill(silent.tasks()[1], signal.SIGRTMIN)  # which SIGSTOPs the rank

    for job in (warned, unwarned):  # before the limit is reached again
        wait_until(lambda job=job: cluster.show(job.id)["Restarts"] == "1", lambda job=job: job.said[-3000:])
        cluster.command("scontrol", "update", f"job={job.id}", "TimeLimit=10")
    state = DOCUMENTED["time limit, with --signal=USR1@…"]
    assert_came_back(warned, uninterrupted_run, f"job {warned.id} requeued: warned of its end by SIGUSR1", state)
    state = DOCUMENTED["time limit, without --signal"]
    assert_came_back(unwarned, uninterrupted_run, f"job {unwarned.id} requeued: its time limit was reached", state)

    state = DOCUMENTED["a rank killed (SIGKILL)"]
    assert_came_back(killed, uninterrupted_run, f"job {killed.id} is requeued: exit code", state)
    assert_came_back(cuda, uninterrupted_run, f"job {cuda.id} is requeued: exit code", DOCUMENTED["CUDA error"])
    assert "CUDA error: an illegal memory access" in cuda.said
    assert_came_back(
        silent,
        uninterrupted_run,
        f"job {silent.id} is requeued: exit code 137, crash 1 of 3",
        DOCUMENTED["a rank stopped (SIGSTOP), or hanging"],
    )
    assert silent.said.count("error: the run hangs: it waits for rank 1, ") == 1
    assert [path.name[-9:-4] for path in (silent.folder / "hangs").iterdir()] == ["00000"]  # the stopped one has none
    assert_came_back(
        hungry, uninterrupted_run, f"job {hungry.id} is requeued: exit", DOCUMENTED["more host memory than --mem"]
    )
    assert ("Out Of Memory" in hungry.said) == cluster.confines_memory
    wait_until(lambda: cluster.show(always.id).get("Reason") == "job_requeued_in_held_state", lambda: always.said)
    held = "2 crashes without a later checkpoint than step 20, the last with exit code 1"
    assert f"Comment={held}" in cluster.command("scontrol", "show", "job", always.id)
    always.assert_states(*[DOCUMENTED["Python exception at the same step again"]] * 3, "PENDING")
    assert always.said.count(f"job {always.id} is requeued") == 2 and held in always.said


def test_jobs_told_to_stop_while_they_start_come_back_as_those_in_training(
    submit, cluster: Cluster, uninterrupted_run: Path
) -> None:
    """Before the first step, when ranks cannot agree: warned, pre-empted with a grace time, requeued by a person."""
    begins = json.dumps({"begin": 300})
    warned, requeued = (submit(name, RUN_FAILS=begins) for name in ("warned", "requeued"))
    grace = submit("grace", options="--partition=grace", RUN_FAILS=begins)
    for job in (warned, requeued, grace):
        wait_until(lambda job=job: job.said.count(" begins") == 2, lambda job=job: job.said[-3000:])
    cluster.command("scancel", "--signal=USR1", warned.id)
    cluster.command("scontrol", "requeue", requeued.id)
    for job in (warned, requeued):
        wait_until(lambda job=job: cluster.show(job.id)["Restarts"] == "1", lambda job=job: job.said[-3000:])
    preempt_all(cluster)
    for job, sentence, state in (
        (warned, "requeued: warned of its end by SIGUSR1", DOCUMENTED["time limit, with --signal=USR1@…"]),
        (requeued, "requeued by SLURM\n", DOCUMENTED["scontrol requeue"]),
        (grace, "requeued: pre-empted", DOCUMENTED["pre-emption with a grace time"]),
    ):
        assert_came_back(job, uninterrupted_run, f"job {job.id} {sentence}", state)
        assert job.said.count("before its first step: nothing is lost") == 1


def test_jobs_that_cannot_go_on_stay_away(submit, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(disk)], check=True)
    try:
        full = submit("full", f"runs={disk}", RUN_FAILS=json.dumps({"pause": 0.2}))
        poisoned = submit("poisoned", RUN_FAILS=json.dumps({"step": 20, "error": "nan"}))
        wrong = submit("wrong", "optim.base_lr=fast")
        wait_for_checkpoint(None, disk / "full", 10)
        with open(disk / "filler", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        for job, sentence, state in (
            (full, "No space left on device", DOCUMENTED["full disk"]),
            (poisoned, "of 10 steps in a row", DOCUMENTED["ten steps in a row not finite"]),
            (wrong, "base_lr='fast'", DOCUMENTED["wrong setting"]),
        ):
            job.wait_for("FAILED")
            assert sentence in job.said and "requeued" not in job.said
            job.assert_states(state)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_one_task_of_an_array_is_requeued_alone(submit, cluster: Cluster, uninterrupted_run: Path) -> None:
    """Also with real start-up, the names of the nodes, and W&B: one folder and run, written by rank 0 alone."""
    settings = ("name=array-${oc.env:SLURM_ARRAY_TASK_ID}", "logger=wandb", "pictures_every=1000")
    quiet = {"WANDB_MODE": "offline", "WANDB_API_KEY": "", "WANDB_SILENT": "true", "PYTHON": f"{cluster.folder}/cold"}
    array = submit("array", *settings, options="--array=1-2", **quiet)
    folders = [array.folder.parent / f"array-{task}" for task in (1, 2)]
    for folder in folders:
        wait_for_checkpoint(None, folder, 10)
    cluster.command("scancel", "--signal=USR1", f"{array.id}_2")
    for task in (1, 2):
        wait_until(lambda task=task: cluster.show(f"{array.id}_{task}")["JobState"] == "COMPLETED", lambda: array.said)
    for folder, starts in zip(folders, (1, 2), strict=True):
        assert_same_run(folder, uninterrupted_run)
        assert len(json.loads((folder / "environment.json").read_text())["starts"]) == starts
        tracked = [path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")]
        assert tracked == [(folder / "wandb_id.txt").read_text()] * starts
    assert array.said.count("requeued: warned of its end") == 1
    state = DOCUMENTED["one task of an array warned by SIGUSR1"]
    assert_states(cluster, f"{array.id}_2", state, "COMPLETED")


STARTS = (  # options of sbatch, command in the script, what is said
    ("--nodes=2 --ntasks=2", "srun", "2 nodes x 1 ranks, srun"),
    ("--nodes=2 --ntasks-per-node=2", "srun --nodes=2 --ntasks=2", "2 nodes x 1 ranks, srun"),
    ("--nodes=2 --ntasks-per-node=2", "srun --nodes=1 --ntasks=2 --nodelist=n2", "1 node x 2 ranks, srun"),
    ("--nodes=2 --ntasks=4", "srun", "srun has started 3, 1 ranks on 2 machines"),
    ("--nodes=1 --ntasks=2", "", "SLURM_NTASKS=2, but only one process was started: write srun before"),
)


def test_ranks_are_those_of_the_step(cluster: Cluster, tmp_path: Path, built_in: Path) -> None:
    jobs = []
    for number, (options, srun, _) in enumerate(STARTS):
        settings = [*SMALL, *LENGTH, "max_steps=2", f"runs={tmp_path}", f"data.root={built_in}", f"name=step{number}"]
        wrapped = f"--wrap={srun} $PYTHON train.py {' '.join(settings)}"
        words = [*options.split(), "--parsable", f"--output={tmp_path}/{number}.out", wrapped]
        jobs.append(cluster.command("sbatch", *words, COLUMNS="300").strip())

    for number, (job, (*_, sentence)) in enumerate(zip(jobs, STARTS, strict=True)):
        started = " x " in sentence
        wait_until(lambda job=job: cluster.show(job)["JobState"] in ("COMPLETED", "FAILED"))
        said = (tmp_path / f"{number}.out").read_text()
        assert sentence in said and ("step 2/2" in said) == started, said


def test_srun_in_salloc_starts_the_ranks_whatever_the_job_is_called(
    cluster: Cluster, tmp_path: Path, built_in: Path
) -> None:
    settings = [*SMALL, *LENGTH, "max_steps=2", f"runs={tmp_path}", f"data.root={built_in}"]
    for name in ("interactive", "mae"):
        words = ["salloc", f"--job-name={name}", "--nodes=2", "--ntasks=2", "srun", f"{cluster.folder}/warm"]
        said = cluster.command(*words, "train.py", *settings, f"name={name}", COLUMNS="300")
        assert "2 nodes x 1 ranks, srun" in said and "step 2/2" in said


def test_submitit_job_is_requeued_once_and_resumes(
    cluster: Cluster, tmp_path: Path, built_in: Path, uninterrupted_run: Path
) -> None:
    """launcher=slurm: SIGUSR2 is submitit's; our checkpoint comes first."""
    words = command(tmp_path, built_in, *LENGTH, "name=submitted", "launcher=slurm", "trainer.devices=2")
    hydra = {"gpus_per_node": "null", "cpus_per_task": "1", "timeout_min": "60"}
    words += [f"hydra.launcher.{name}={value}" for name, value in hydra.items()] + [f"hydra.sweep.dir={tmp_path}/sweep"]
    words.insert(words.index("train.py") + 1, "-m")
    process = start(words, **cluster.environment)
    wait_for_checkpoint(process, tmp_path / "submitted", step=10)
    job = cluster.command("squeue", "-ho", "%A").split()[0]
    cluster.command("scancel", "--signal=USR2", job)
    finish(process)

    assert_states(cluster, job, DOCUMENTED["submitit's SIGUSR2"], "COMPLETED")
    assert_same_run(tmp_path / "submitted", uninterrupted_run)
    said = "".join(path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*_0_log.out"))
    assert "1 node x 2 ranks, srun, started by submitit" in said


def test_job_for_a_range_of_nodes_comes_back_on_fewer_and_on_more(
    submit, cluster: Cluster, uninterrupted_run: Path
) -> None:
    job = submit("elastic", options="--nodes=1-2", RUN_FAILS=json.dumps({"pause": 0.05}))
    job.wait_for_step()
    cluster.command("scontrol", "update", "node=n2", "state=drain", "reason=away")
    try:
        cluster.command("scontrol", "requeue", job.id)
        wait_until(lambda: "1 process, train.py alone" in job.said or job.state() == "COMPLETED", lambda: job.said)
        job.wait_for_step(40)
    finally:
        cluster.command("scontrol", "update", "node=n2", "state=resume")
    wait_until(lambda: cluster.command("sinfo", "-hn", "n2", "-p", "low", "-o", "%t").strip() == "idle")
    cluster.command("scontrol", "requeue", job.id)
    job.wait_for("COMPLETED")

    starts = json.loads((job.folder / "environment.json").read_text())["starts"]
    assert [begun["ranks"] for begun in starts] == [2, 1, 2]
    assert job.lost() == [0, 0]
    for key, loss in losses(uninterrupted_run).items():
        assert float(losses(job.folder)[key]) == pytest.approx(float(loss), abs=1e-5), key


def test_job_of_a_dead_node_is_requeued_by_slurm(submit, cluster: Cluster, uninterrupted_run: Path) -> None:
    job = submit("bereft")
    job.wait_for_step()
    cluster.break_node("n2", job.tasks()[1])
    job.wait_for("PENDING")
    cluster.mend_node("n2")
    job.wait_for("COMPLETED")
    job.assert_states(DOCUMENTED["node failure"], "COMPLETED")
    assert_same_run(job.folder, uninterrupted_run)
