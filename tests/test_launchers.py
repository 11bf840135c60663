"""Every environment that starts ranks is recognised, or refused by name with the way out.

Variables are those that the launchers themselves have set: mpirun of Open MPI 4.1, mpiexec of MPICH 4.0, the PyTorchJob
of Kubeflow's training operator.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mae.distributed.launch import Topology, cluster_environment, refuse_other_devices
from mae.distributed.rank_zero import is_rank_zero
from mae.errors import ConfigError
from tests.conftest import ROOT
from tests.processes import assert_same_run, command, finish, run, start
from tests.slurm_cluster import free_ports

OURS = re.compile("RANK|WORLD_SIZE|MASTER_|OMPI_|PMI|MPI_|PET_|KUBERNETES_|SLURM_|TORCHELASTIC_|HOROVOD_|JSM_|FLUX_")


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away what would make this process look like a rank, afterwards too."""
    for name in {*filter(OURS.search, os.environ), "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"}:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # which the plugin of another rank changes


def variables(words: str) -> dict[str, str]:
    """Returns `NAME=value …` as a dictionary."""
    return {name: value for name, _, value in (word.partition("=") for word in words.split())}


def open_mpi(rank: int, ranks: int, local_rank: int, devices: int) -> str:
    return (
        f"OMPI_COMM_WORLD_RANK={rank} OMPI_COMM_WORLD_SIZE={ranks} OMPI_COMM_WORLD_LOCAL_RANK={local_rank} "
        f"OMPI_COMM_WORLD_LOCAL_SIZE={devices} PMIX_NAMESPACE=19660801 PMIX_RANK={rank} "
    )


MPICH = "PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2 "
PALS = "PMI_RANK=3 PMI_SIZE=4 PMI_LOCAL_RANK=1 PMI_LOCAL_SIZE=2 "
TORCHJOB = "RANK=1 WORLD_SIZE=2 MASTER_ADDR=job-master-0 MASTER_PORT=23456 "
PET = "PET_NNODES=2 PET_NODE_RANK=1 PET_NPROC_PER_NODE=auto PET_MASTER_ADDR=job-master-0 PET_MASTER_PORT=23456 "
DAEMONS = (
    "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_NTASKS=8 SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_NODEID=1 "
    "SLURM_STEP_TASKS_PER_NODE=1(x2) "
)


@pytest.mark.parametrize(
    ("environment", "said", "address"),
    [
        (open_mpi(1, 2, 1, 2), "1 node x 2 ranks, mpirun", "127.0.0.1"),
        (open_mpi(3, 4, 1, 2) + "MASTER_ADDR=n0", "2 nodes x 2 ranks, mpirun", "n0"),
        # In a job of SLURM mpirun starts its daemons by srun, whose variables its ranks inherit.
        (open_mpi(3, 4, 1, 2) + DAEMONS + "SLURM_STEP_NUM_TASKS=2 MASTER_ADDR=n0", "2 nodes x 2 ranks, mpirun", "n0"),
        (MPICH, "1 node x 2 ranks, mpiexec", "127.0.0.1"),
        (PALS + "MASTER_ADDR=n0", "2 nodes x 2 ranks, mpiexec", "n0"),
        (TORCHJOB + "KUBERNETES_SERVICE_HOST=10.0.0.1", "2 nodes x 1 ranks, pods of Kubernetes", "job-master-0"),
        (TORCHJOB + PET, "2 nodes x 1 ranks, pods of Kubernetes", "job-master-0"),
        (TORCHJOB + "LOCAL_RANK=1 LOCAL_WORLD_SIZE=2", "1 node x 2 ranks, RANK and WORLD_SIZE", "job-master-0"),
        # srun --mpi=pmi2
        (
            f"PMI_RANK=1 PMI_SIZE=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=n[1-2] SLURM_NNODES=2 {DAEMONS}",
            "2 nodes x 1 ranks, srun",
            "n1",
        ),
    ],
)
def test_ranks_of_a_known_launcher_are_recognised(monkeypatch, environment: str, said: str, address: str) -> None:
    for name, value in variables(environment).items():
        monkeypatch.setenv(name, value)
    topology = Topology.from_environment()
    assert topology is not None and str(topology) == said and topology.rank == topology.ranks - 1
    assert not is_rank_zero()
    plugin = cluster_environment(topology)
    assert plugin.creates_processes_externally and plugin.main_address == address and 1024 < plugin.main_port < 65536
    assert (plugin.local_rank(), plugin.node_rank()) == (topology.rank % topology.devices, topology.nodes - 1)
    assert Topology.from_environment() == topology  # of eval.py, which asks again


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        # left over in a shell, or a launcher's that says too little
        ("RANK=1 WORLD_SIZE=2", "RANK=1 WORLD_SIZE=2: another launcher .* `unset RANK WORLD_SIZE`"),
        (TORCHJOB, "`unset MASTER_ADDR MASTER_PORT RANK WORLD_SIZE`"),
        (TORCHJOB + "LOCAL_RANK=1", "`unset LOCAL_RANK MASTER_ADDR MASTER_PORT RANK WORLD_SIZE`"),
        ("RANK=3", "RANK=3: .* `unset RANK`"),
        ("OMPI_COMM_WORLD_SIZE=4", "OMPI_COMM_WORLD_SIZE=4: another launcher .* `unset OMPI_COMM_WORLD_SIZE`"),
        ("PMI_SIZE=2 PMI_RANK=1 RANK=0 WORLD_SIZE=1", "PMI_SIZE=2: .* `unset PMI_RANK PMI_SIZE`"),
        ("HOROVOD_SIZE=2 HOROVOD_RANK=1", "HOROVOD_SIZE=2: .*start torchrun, once on each machine"),
        # ranks that cannot find one another
        (open_mpi(3, 4, 1, 2), "mpirun: 4 ranks on 2 machines, .* MASTER_ADDR"),
        (open_mpi(2, 4, 1, 2) + "MASTER_ADDR=n0", "rank 2 of 4 as number 1 of 2 .* --map-by slot"),
        (open_mpi(3, 4, 2, 3), "rank 3 of 4 as number 2 of 3 on its machine"),
        ("RANK=1 WORLD_SIZE=2 KUBERNETES_SERVICE_HOST=10.0.0.1", "pods of Kubernetes: 2 ranks on 2 machines"),
        ("RANK=one WORLD_SIZE=2 PET_NNODES=2", "RANK=one is no number"),
        # pods that need torchrun
        (TORCHJOB + "PET_NNODES=2 PET_NPROC_PER_NODE=8", "wants 8 ranks in each pod, .* torchrun train.py"),
        ("PET_NNODES=1:4 PET_RDZV_BACKEND=c10d", "PET_NNODES=1:4 is for torchrun, .* torchrun train.py"),
    ],
)
def test_ranks_that_would_work_alone_are_refused_with_the_way_out(monkeypatch, environment: str, said: str) -> None:
    for name, value in variables(environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        Topology.from_environment()


@pytest.mark.parametrize(
    "environment",
    [
        "WORLD_SIZE=8",  # that a script sets for torchrun
        "RANK=0 WORLD_SIZE=1 PMI_SIZE=1",
        "RANK= WORLD_SIZE=",
        "KUBERNETES_SERVICE_HOST=10.0.0.1",
        TORCHJOB.replace("2", "1").replace("RANK=1", "RANK=0") + "PET_NNODES=1",
        open_mpi(0, 1, 0, 1),
    ],
)
def test_one_process_of_a_launcher_is_alone(monkeypatch, environment: str) -> None:
    for name, value in variables(environment).items():
        monkeypatch.setenv(name, value)
    assert Topology.from_environment() is None and is_rank_zero()


def test_torchrun_in_a_pod_or_under_mpirun_decides_the_ranks(monkeypatch) -> None:
    elastic = "TORCHELASTIC_RUN_ID=a RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 GROUP_WORLD_SIZE=1 "
    for name, value in variables(open_mpi(0, 1, 0, 1) + PET + elastic + open_mpi(0, 2, 0, 2)).items():
        monkeypatch.setenv(name, value)
    assert str(Topology.from_environment()) == "1 node x 2 ranks, torchrun" and not is_rank_zero()


def test_more_devices_in_a_pod_need_torchrun() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.devices=8, .* pods of Kubernetes .*: have each start torchrun"):
        refuse_other_devices(8, Topology(1, 2, 1, 2, "pods of Kubernetes"))


@pytest.mark.slow
def test_ranks_of_mpirun_and_of_pods_train_as_those_of_torchrun(tmp_path: Path, built_in: Path) -> None:
    def words(name: str, ranks: int = 1) -> list[str]:
        return command(tmp_path, built_in, f"name={name}", "max_steps=6", "val_every=3", "data.workers=0", ranks=ranks)

    run(words("torchrun", ranks=2))

    pods = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    pods["MASTER_PORT"] = str(*free_ports(1))
    second = start(words("pods"), RANK="1", **pods)
    said = run(words("pods"), RANK="0", **pods)
    assert "2 nodes x 1 ranks, pods of Kubernetes" in said and "step" not in finish(second)
    assert_same_run(tmp_path / "pods", tmp_path / "torchrun")

    if shutil.which("mpirun") is None:
        pytest.skip("needs apt-get install openmpi-bin")
    mpirun = ["mpirun", "--oversubscribe", "--allow-run-as-root", "-n", "2", sys.executable, "-SE"]
    said = run([*mpirun, str(ROOT / "tests" / "slurm_task.py"), *words("mpirun")[1:]])
    assert said.count("1 node x 2 ranks, mpirun") == said.count("eval.py checkpoint=") == 1
    assert_same_run(tmp_path / "mpirun", tmp_path / "torchrun")
    said = run([*mpirun, str(ROOT / "tests" / "slurm_task.py"), *words("mpirun")[1:], "trainer.devices=8"], code=2)
    assert said.count("for mpirun (-N) to choose") == 1
