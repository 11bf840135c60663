"""Runs on clusters: dead ranks, time limits, requeues. SLURM's commands are stand-ins, processes and signals real."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from torch.distributed.run import get_args_parser

from data.errors import DataError
from mae.distributed.launch import Topology, cluster_environment, refuse_other_devices
from mae.distributed.slurm import requeue
from mae.errors import ConfigError
from tasks.train import fit
from tests import slurm
from tests.conftest import ROOT
from tests.processes import (
    SMALL,
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


def test_slurm_job_signalled_before_its_limit_is_requeued_once_and_resumes(
    tmp_path: Path, built_in: Path, uninterrupted_run: Path
) -> None:
    """Runs the documented batch script, SIGUSR1 to every process: one folder and W&B run, written by rank 0 alone."""
    cluster = tmp_path / "slurm"
    settings = (*SMALL, *LENGTH, f"runs={tmp_path}", f"data.root={built_in}", "name=job", "logger=wandb")
    options = ("--ntasks-per-node=2", f"--output={tmp_path}/out.txt", "--cpus-per-task=1")
    environment = slurm.install(cluster) | {"HOME": str(tmp_path), "WANDB_API_KEY": "", "WANDB_SILENT": "true"}
    submitted = start(["sbatch", *options, "docs/examples/train.sbatch", *settings], **environment)
    assert "Submitted batch job" in finish(submitted)
    wait_for_checkpoint(None, tmp_path / "job", step=10)
    slurm.signal_step(cluster, signal.SIGUSR1)
    output = tmp_path / "out.txt"
    assert slurm.exit_code(cluster) == 0, output.read_text()
    assert slurm.requeues(cluster) == [slurm.JOB]
    assert output.read_text().count(f"job {slurm.JOB} requeued") == 1
    assert_resumed_run(tmp_path / "job", uninterrupted_run, starts=2)
    tracked = [path.name.rpartition("-")[2] for path in (tmp_path / "job" / "wandb").glob("offline-run-*")]
    assert tracked == [(tmp_path / "job" / "wandb_id.txt").read_text()] * 2
    assert len(list((tmp_path / "job" / "reconstructions").iterdir())) == 1


def test_submitit_starts_one_task_per_gpu() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = ["launcher=slurm", "trainer.devices=8", "hydra.launcher.nodes=4"]
        launcher = hydra_compose("train", overrides=words, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith(".SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (4, 8, 8)


@pytest.mark.slow
def test_submitit_job_is_requeued_once_and_resumes(tmp_path: Path, built_in: Path, uninterrupted_run: Path) -> None:
    """launcher=slurm: SIGUSR2 is submitit's; our checkpoint comes first."""
    cluster = tmp_path / "slurm"
    words = command(tmp_path, built_in, *LENGTH, "name=submitted", "launcher=slurm", "trainer.devices=2")
    words += [
        "hydra.launcher.gpus_per_node=null",
        "hydra.launcher.cpus_per_task=1",
        f"hydra.sweep.dir={tmp_path}/sweep",
    ]
    words.insert(words.index("train.py") + 1, "-m")
    process = start(words, **slurm.install(cluster))
    wait_for_checkpoint(process, tmp_path / "submitted", step=10)
    slurm.signal_step(cluster, signal.SIGUSR2)
    finish(process)
    assert slurm.requeues(cluster) == [slurm.JOB]
    assert_resumed_run(tmp_path / "submitted", uninterrupted_run, starts=2)


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
    (container,) = job["spec"]["template"]["spec"]["containers"]
    _, *words = container["command"]
    arguments = get_args_parser().parse_args(words)
    assert arguments.training_script == "train.py"
    assert int(arguments.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert arguments.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert compose(*arguments.training_script_args).name == "imagenet_large"


ALONE = {"SLURM_JOB_ID": "7"}
ARRAY = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
SUBMITIT = ALONE | {"SUBMITIT_EXECUTOR": "slurm"}


@pytest.mark.parametrize(
    ("environment", "signum", "rank", "asked"),
    [
        (ALONE, signal.SIGUSR1, 0, ["7"]),
        (ARRAY, signal.SIGUSR1, 0, ["7_2"]),
        (ALONE, signal.SIGUSR1, 1, []),
        (ALONE, signal.SIGTERM, 0, []),
        (ALONE, signal.SIGINT, 0, []),
        (SUBMITIT, signal.SIGUSR1, 0, []),
        ({}, signal.SIGUSR1, 0, []),
    ],
)
def test_only_rank_0_requeues_and_only_on_the_warning_signal(
    tmp_path: Path, monkeypatch, environment, signum, rank, asked
) -> None:
    folder = tmp_path / "slurm"
    for name, value in (slurm.install(folder) | environment).items():
        monkeypatch.setenv(name, value)
    (folder / "tasks").write_text("")
    before = signal.getsignal(signal.SIGTERM)
    try:
        requeue(signum, rank)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert slurm.requeues(folder) == asked


def test_refused_requeue_prints_the_reason(tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = signal.getsignal(signal.SIGTERM)
    try:
        requeue(signal.SIGUSR1, 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "job 7 could not be requeued (Requested operation is presently disabled" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8"}, "write srun before the command"),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, "set --ntasks-per-node"),
    ],
)
def test_incomplete_slurm_launch_raises_config_error(monkeypatch, environment: dict[str, str], said: str) -> None:
    for name, value in {"SLURM_PROCID": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        Topology.from_environment()


ELASTIC = {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
UNEVEN = {"SLURM_NTASKS": "3", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE=2: another launcher"),  # Kubeflow
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: another launcher"),
        ({"PMI_SIZE": "2", "RANK": "0", "WORLD_SIZE": "1"}, "PMI_SIZE=2: another launcher"),
        ({"SLURM_PROCID": "0", **UNEVEN}, "3 ranks on 2 machines"),
        (ELASTIC, "3 ranks on 2 machines"),
        ({"WORLD_SIZE": "8"}, None),  # that a script sets for torchrun
        ({"RANK": "0", "WORLD_SIZE": "1", "PMI_SIZE": "1"}, None),
    ],
)
def test_ranks_of_other_launchers_and_uneven_ones_are_refused(monkeypatch, environment, said: str | None) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if said is None:
        assert Topology.from_environment() is None
    else:
        with pytest.raises(ConfigError, match=said):
            Topology.from_environment()


def test_error_that_one_rank_alone_meets_is_printed_by_it(tmp_path: Path, capfd) -> None:
    class Failing:
        def fit(self, *_: object, **__: object) -> None:
            raise DataError("node3 has no room")

    config = SimpleNamespace(run=tmp_path, logger={})
    for rank in (0, 1):
        task: Any = SimpleNamespace(config=config, data=None, topology=Topology(rank=rank, ranks=2))
        with pytest.raises(DataError):
            fit(Failing(), None, task, None)  # type: ignore[arg-type]
        assert ("error on rank 1: node3 has no room" in capfd.readouterr().err) == (rank == 1)


ONE_TASK = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_NODELIST": "localhost"}
RANKS = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "topology"),
    [
        (ONE_TASK | {"SLURM_JOB_NAME": "mae"}, None),  # salloc
        (ONE_TASK | {"SLURM_JOB_NAME": "mae", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),  # sbatch without srun
        (ONE_TASK | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, None),  # srun
        (ONE_TASK | {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "interactive"}, None),
        (
            ONE_TASK
            | RANKS
            | {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "interactive"},
            Topology(rank=3, ranks=4, devices=2, nodes=2),
        ),
    ],
    ids=["salloc", "sbatch", "srun of one task", "interactive", "srun in an interactive job"],
)
def test_slurm_decides_the_ranks_only_where_srun_has_started_several(monkeypatch, environment, topology) -> None:
    """Elsewhere trainer.devices counts, and Lightning looks for no variables of srun."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Topology.from_environment() == topology
    (plugin,) = cluster_environment()
    assert (plugin.global_rank(), plugin.world_size()) == ((3, 4) if topology else (0, 1))
    if topology is not None:
        refuse_other_devices(2, topology)
        refuse_other_devices(1, topology)
        for devices in (3, 8):
            said = rf"trainer\.devices={devices}, .* srun .*, which has started 2 on this machine"
            with pytest.raises(ConfigError, match=said):
                refuse_other_devices(devices, Topology(rank=3, ranks=4, devices=2, nodes=2))
