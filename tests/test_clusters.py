"""Launchers and what they say of the ranks; dead ranks under torchrun; who requeues a job of SLURM."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from torch.distributed.run import get_args_parser

from data.errors import DataError
from mae.distributed.launch import Topology, cluster_environment, refuse_other_devices
from mae.distributed.requeue import preempt_mode, requeue, why_ended
from mae.errors import ConfigError
from tasks.errors import readable_errors
from tests.conftest import ROOT
from tests.processes import (
    assert_same_run,
    command,
    finish,
    ranks_of,
    run,
    start,
    wait_for_checkpoint,
)
from tests.test_experiments import compose

LENGTH = ("max_steps=60", "checkpoint.every_steps=5", "val_every=null", "data.workers=1", "precision=32-true")


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    """Two ranks from the first step to the last."""
    runs = tmp_path_factory.mktemp("uninterrupted_run")
    run(command(runs, built_in, *LENGTH, "name=whole", ranks=2))
    return runs / "whole"


def assert_resumed_run(folder: Path, uninterrupted_run: Path, starts: int) -> None:
    assert_same_run(folder, uninterrupted_run)
    assert len(json.loads((folder / "environment.json").read_text())["starts"]) == starts


@pytest.mark.slow
def test_torchrun_restart_after_a_dead_rank_equals_the_uninterrupted_run(
    tmp_path: Path, built_in: Path, uninterrupted_run: Path
) -> None:
    words = command(tmp_path, built_in, *LENGTH, "name=bereft", "data.workers=0", ranks=2)
    words.insert(words.index("--standalone"), "--max-restarts=1")
    process = start(words, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for_checkpoint(process, tmp_path / "bereft", step=10)
    _, second = ranks_of(process)
    os.kill(second, signal.SIGKILL)
    finish(process)
    assert_resumed_run(tmp_path / "bereft", uninterrupted_run, starts=2)


def test_submitit_starts_one_task_per_gpu() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = ["launcher=slurm", "trainer.devices=8", "hydra.launcher.nodes=4"]
        launcher = hydra_compose("train", overrides=words, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith(".SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (4, 8, 8)


@pytest.mark.slow
def test_ranks_with_different_run_folders_end_with_an_error(tmp_path: Path, built_in: Path) -> None:
    words = command(Path("PLACE"), built_in, "name=split", "max_steps=4", "data.workers=0", ranks=2)
    at = words.index("train.py")
    shell = " ".join([sys.executable, *words[at:]]).replace("runs=PLACE", f"runs={tmp_path}/$RANK")
    # `env`, so that torchrun itself starts the shell of each rank: forked ranks are Python programs.
    words = ["env", *words[:at], "--no-python", "bash", "-c", f"exec {shell} max_steps=$0"]
    run([*words, "4"])  # written by rank 0 alone: rank 1 has no folder
    assert not (tmp_path / "1").exists()
    assert "found different checkpoints" in run([*words, "8"], code=1)


def test_kubernetes_example_is_accepted_by_torchrun_and_train() -> None:
    _, job = yaml.safe_load_all((ROOT / "docs" / "examples" / "job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:3] == ["tini", "--", "torchrun"]
    words = container["command"][3:]
    arguments = get_args_parser().parse_args(words)
    assert arguments.training_script == "train.py"
    assert int(arguments.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert arguments.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert compose(*arguments.training_script_args).name == "imagenet_large"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_kubernetes_example_runs_as_the_user_of_the_image_with_a_writable_home() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    _, job = yaml.safe_load_all((ROOT / "docs" / "examples" / "job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    user = pod["securityContext"]
    assert user["runAsNonRoot"] and f"\nUSER {user['runAsUser']}:{user['runAsGroup']}\n" in dockerfile
    places = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] and {"/mae/runs", "/tmp", "/home/mae"} <= places
    assert "HOME=/home/mae " in dockerfile


def test_driver_that_the_image_asks_for_is_that_of_torch_s_cuda() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    base = re.search(r"^ARG BASE=nvidia/cuda:(\d+)\.", dockerfile, re.MULTILINE)
    assert base is not None
    if torch.version.cuda is None:
        pytest.skip("needs a torch with CUDA")
    assert torch.version.cuda.split(".")[0] == base[1] == "13"  # whose releases all take drivers from 580 on
    for file in ("Dockerfile", "docs/clusters.md", "docs/examples/job.yaml"):
        assert "580 or newer" in (ROOT / file).read_text(), file


def test_image_takes_the_code_alone_from_the_working_folder() -> None:
    first, *names = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert first == "*"  # images, runs, environments and secrets of the working folder stay here
    taken = {name.removeprefix("!") for name in names if name.startswith("!")}
    programs = {path.name for path in ROOT.glob("*.py")}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert programs | folders | {"conf"} <= taken
    assert not taken & {"datasets", "runs", "sweeps", ".venv", ".git"}


SHOWN = {"JobState": "RUNNING", "Reason": "None", "Restarts": "1", "PreemptTime": "None"}
PREEMPTED = SHOWN | {"PreemptTime": "2026-11-26T18:22:45"}
ENDING = SHOWN | {"JobState": "COMPLETING"}


@pytest.mark.parametrize(
    ("signum", "job", "mode", "comes_back", "said"),
    [
        (signal.SIGUSR1, SHOWN, "", True, "warned of its end by SIGUSR1"),
        (signal.SIGTERM, PREEMPTED, "REQUEUE", True, "job 7 requeued: pre-empted"),
        (signal.SIGTERM, PREEMPTED, "", True, "job 7 requeued: pre-empted"),
        (signal.SIGUSR1, PREEMPTED, "CANCEL", False, "PreemptMode=CANCEL"),
        (signal.SIGTERM, PREEMPTED, "CANCEL,GANG", False, "submit it again"),
        (signal.SIGTERM, ENDING | {"Restarts": "2"}, "", False, "job 7 requeued by SLURM"),
        (signal.SIGUSR1, ENDING | {"Restarts": "2"}, "", False, "job 7 requeued by SLURM"),
        (signal.SIGTERM, ENDING | {"Restarts": "2", "Reason": "job_requeued_in_held_state"}, "", False, "release 7"),
        (signal.SIGTERM, ENDING | {"Reason": "TimeLimit"}, "", True, "time limit was reached"),
        (signal.SIGTERM, ENDING, "", False, "cancelled"),
        (signal.SIGUSR1, ENDING, "", False, "cancelled"),
        (signal.SIGTERM, SHOWN, "", False, "not requeued: SIGTERM was sent by scancel --signal"),
        (signal.SIGHUP, SHOWN, "", False, "not requeued: SIGHUP was sent by"),
    ],
)
def test_slurm_job_is_requeued_by_the_run_where_nobody_else_does(
    monkeypatch, signum: int, job: dict[str, str], mode: str, comes_back: bool, said: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    asked, sentence = why_ended(signum, job, mode, told=True)
    assert asked == comes_back and said in sentence
    # One of several ranks, outside of the training loop, cannot tell scancel from the crash of another rank.
    asked, sentence = why_ended(signum, job, mode, told=False)
    unknown = signum == signal.SIGTERM and job == SHOWN
    assert (asked is None) == unknown and ("another rank has crashed" if unknown else said) in sentence


ALONE = {"SLURM_JOB_ID": "7"}
ARRAY = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
SUBMITIT = ALONE | {"SUBMITIT_EXECUTOR": "slurm"}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A command that notes the requeues it is asked for, and says of each job that it runs."""
    program, asked = tmp_path / "scontrol", tmp_path / "asked"
    program.write_text(
        f'#!/bin/sh\n[ "$1" != requeue ] || echo "$2" >> {asked}\necho JobState=RUNNING Restarts=0 PreemptTime=None\n'
    )
    program.chmod(0o755)
    asked.touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = signal.getsignal(signal.SIGTERM)
    yield asked
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("environment", "signum", "rank", "asked"),
    [
        (ALONE, signal.SIGUSR1, 0, ["7"]),
        (ARRAY, signal.SIGUSR1, 0, ["7_2"]),
        (ALONE, signal.SIGUSR1, 1, []),
        (ALONE, signal.SIGINT, 0, []),
        (SUBMITIT, signal.SIGUSR1, 0, []),
        ({}, signal.SIGUSR1, 0, []),
    ],
)
def test_only_rank_0_asks_for_a_requeue(scontrol: Path, monkeypatch, environment, signum, rank, asked) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", str(rank))
    assert requeue(signum, agreed=True)
    assert scontrol.read_text().split() == asked


@pytest.mark.parametrize(
    ("kind", "mode"), [("partition_prio", "CANCEL"), ("qos", "REQUEUE")], ids=["by partition", "by QOS"]
)
def test_preempt_mode_is_that_of_the_partition_or_of_the_qos(tmp_path: Path, monkeypatch, kind: str, mode: str) -> None:
    config = f"echo 'PreemptMode             = REQUEUE'; echo 'PreemptType             = preempt/{kind}'"
    for name, script in (
        ("scontrol", f'case "$2" in config) {config};; partition) echo "   PreemptMode=CANCEL";; esac'),
        ("sacctmgr", "echo cluster"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert preempt_mode(PREEMPTED | {"Partition": "a", "QOS": "normal"}) == mode


def test_refused_requeue_prints_the_reason(scontrol: Path, monkeypatch, capfd) -> None:
    program = scontrol.parent / "scontrol"
    refusal = "[ $1 != requeue ] || { echo 'Requested operation is presently disabled' >&2; exit 1; }\n"
    program.write_text(program.read_text().replace("\n", f"\n{refusal}", 1))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    requeue(signal.SIGUSR1, agreed=True)
    assert "job 7 could not be requeued (Requested operation is presently disabled)" in capfd.readouterr().out


SHELL_OF_SALLOC = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_JOB_NAME": "mae"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8"}, "write srun before the command"),
        ({"SLURM_NTASKS": "4", **SHELL_OF_SALLOC}, "write srun before the command"),
        ({"SLURM_NNODES": "2"}, "SLURM_NNODES=2, but only one process .* write srun before the command"),
    ],
)
def test_incomplete_slurm_launch_raises_config_error(monkeypatch, environment: dict[str, str], said: str) -> None:
    for name, value in {"SLURM_PROCID": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        Topology.from_environment()


ELASTIC = {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
UNEVEN = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"SLURM_PROCID": "0", **UNEVEN}, "3, 1 ranks on 2 machines"), (ELASTIC, "3 ranks on 2 machines")],
)
def test_machines_with_unequal_numbers_of_ranks_are_refused(monkeypatch, environment, said: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        Topology.from_environment()


@pytest.mark.parametrize(
    ("rank", "waited", "said"), [(0, [], "error: no room\n"), (1, [10], "error on rank 1: no room\n")]
)
def test_error_is_said_by_rank_0_or_later_by_the_rank_that_met_it(monkeypatch, capsys, rank, waited, said) -> None:
    """Later than rank 0 would have ended the others."""
    slept: list[float] = []
    monkeypatch.setattr("mae.distributed.rank_zero.time.sleep", slept.append)
    monkeypatch.setenv("SLURM_PROCID", str(rank))
    with pytest.raises(SystemExit, match="2"), readable_errors():
        raise DataError("no room")
    assert (slept, capsys.readouterr().err) == (waited, said)


ONE_TASK = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_NODELIST": "localhost"}
RANKS = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "1"}
# srun --nodes=2 --ntasks=4 in a job of another number of tasks per node, whose first node has another step
STEP = {
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODELIST": "n[1-3]",
    "SLURM_STEP_NODELIST": "n[2-3]",
    "SLURM_JOB_NAME": "interactive",
}


@pytest.mark.parametrize(
    ("environment", "topology"),
    [
        (ONE_TASK | {"SLURM_JOB_NAME": "mae"}, None),  # salloc
        (ONE_TASK | {"SLURM_JOB_NAME": "mae", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),  # sbatch without srun
        (ONE_TASK | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, None),  # srun
        (ONE_TASK | {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "interactive"}, None),
        (ONE_TASK | RANKS | STEP, Topology(3, 4, devices=2, nodes=2, launcher="srun")),
    ],
    ids=["salloc", "sbatch", "srun of one task", "interactive", "srun in an interactive job"],
)
def test_slurm_decides_the_ranks_only_where_srun_has_started_several(monkeypatch, environment, topology) -> None:
    """Elsewhere trainer.devices counts, and Lightning looks for no variables of srun."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS_PER_NODE", "SLURM_NODELIST"):
        monkeypatch.setenv(name, "")  # to be removed afterwards
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Topology.from_environment() == topology
    plugin = cluster_environment(topology or Topology())
    assert (plugin.global_rank(), plugin.world_size()) == ((3, 4) if topology else (0, 1))
    if topology is not None:
        assert str(topology) == "2 nodes x 2 ranks, srun"
        plugin.validate_settings(num_devices=2, num_nodes=2)
        assert (plugin.main_address, plugin.main_port) == ("n2", 15000 + 77 + 97)
        refuse_other_devices(2, topology)
        refuse_other_devices(1, topology)
        for devices in (3, 8):
            said = rf"trainer\.devices={devices}, .* srun .*, which has started 2 on this machine"
            with pytest.raises(ConfigError, match=said):
                refuse_other_devices(devices, Topology(3, 4, devices=2, nodes=2, launcher="srun"))
