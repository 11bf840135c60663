"""Launching: ranks come from torchrun, SLURM or another launcher; Lightning never starts processes itself."""

import os
import sys
from dataclasses import dataclass
from typing import NoReturn
from zlib import crc32

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from mae.distributed.rank_zero import warn
from mae.distributed.slurm import describe_step, started_tasks
from mae.distributed.stop import hangup_ignored
from mae.errors import ConfigError

OPTIONS = {"torchrun": "--nproc-per-node", "srun": "--ntasks-per-node", "mpirun": "-N", "mpiexec": "-ppn"}


@dataclass(frozen=True)
class Topology:
    """This process among the ranks of the run; alone by default."""

    rank: int = 0
    ranks: int = 1
    devices: int = 1  # ranks on this node
    nodes: int = 1
    launcher: str = "train.py alone"

    def __str__(self) -> str:
        if self.ranks == 1:
            return f"1 process, {self.launcher}"
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{nodes} x {self.devices} ranks, {self.launcher}"

    @classmethod
    def from_environment(cls) -> "Topology | None":
        """Returns the topology in the environment variables of torchrun or srun; None if neither started several ranks.

        Raises ConfigError if SLURM has room for several ranks and did not start this process as one of them, if the
        machines have different numbers of ranks, or if another launcher does not say enough (`launchers`).
        """
        if TorchElasticEnvironment.detect():
            warn_of_shared_store()
            launcher = "torchrun"
            rank, ranks, devices, nodes = (
                int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
            )
        elif place := place_by_others(mpi=True):
            launcher, rank, ranks, devices = place
            nodes = ranks // devices
        elif (ranks := sum(tasks := started_tasks())) > 1:
            launcher = "srun, started by submitit" if "SUBMITIT_EXECUTOR" in os.environ else "srun"
            rank, nodes, devices = int(os.environ["SLURM_PROCID"]), len(tasks), tasks[0]
            if len(set(tasks)) > 1:
                raise ConfigError(
                    f"srun has started {', '.join(map(str, tasks))} ranks on {nodes} machines: have it start as many "
                    f"on one as on another, by --ntasks-per-node"
                )
        elif place := place_by_others(mpi=False):
            launcher, rank, ranks, devices = place
            nodes = ranks // devices
        else:
            return None
        if devices * nodes != ranks:
            raise ConfigError(f"{ranks} ranks on {nodes} machines: start as many ranks on one machine as on another")
        return cls(rank, ranks, devices, nodes, launcher)


def place_by_others(mpi: bool) -> tuple[str, int, int, int] | None:
    """Returns launcher, rank, number of ranks and that on this machine as MPI or others give them; None if none does.

    Raises ConfigError if they do not say enough.
    """
    if not any(name.endswith(("RANK", "_SIZE", "_NNODES")) for name in os.environ):
        return None
    from mae.distributed.launchers import find_mpi_place, find_place

    return find_mpi_place() if mpi else find_place()


def warn_of_shared_store() -> None:
    """Warns that torchrun keeps one store through its restarts: new ranks may find the addresses of dead ones in it."""
    restarts, shared = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("MAX_RESTARTS", "USE_AGENT_STORE"))
    if restarts not in (None, "0") and shared == "True":
        warn(
            f"torchrun --max-restarts={restarts}: ranks that are started again may try to reach dead ones and fail or "
            "hang. Start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )


def cluster_environment(topology: Topology) -> ClusterEnvironment:
    """Returns Lightning's plugin for the ranks that were found, so that it looks for none by itself.

    That of SLURM shall not requeue: `requeue` or submitit does.
    """
    if topology.launcher == "torchrun":
        return TorchElasticEnvironment()
    if topology.launcher.startswith("srun"):
        return slurm_environment()
    return PlacedEnvironment(topology) if topology.ranks > 1 else LightningEnvironment()


class PlacedEnvironment(LightningEnvironment):
    """Lightning's plugin for ranks that were started one by one, each at the place that was found."""

    creates_processes_externally = True  # pyright: ignore[reportAssignmentType,reportIncompatibleMethodOverride]

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.topology = topology
        self.set_global_rank(topology.rank)  # Lightning's messages are rank 0's from here on
        # A launch of mpirun has a number of its own, so that several may run on one machine.
        launch = crc32(os.environ.get("PMIX_NAMESPACE", "").encode())
        self._main_port = int(os.environ.get("MASTER_PORT") or 15000 + launch % 10000)

    def local_rank(self) -> int:
        return self.topology.rank % self.topology.devices

    def node_rank(self) -> int:
        return self.topology.rank // self.topology.devices

    def teardown(self) -> None:
        """Leaves WORLD_SIZE as it is: the next run of a multirun looks for it."""


def slurm_environment() -> SLURMEnvironment:
    """Returns Lightning's plugin for the ranks of this step of SLURM."""
    describe_step()
    return SLURMEnvironment(auto_requeue=False)


def leave_together(exit_code: int) -> NoReturn:
    """Waits for all ranks, then exits. torchrun and srun kill the other ranks as soon as one has exited."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.exit(exit_code)


def resolve_devices(devices: int | str) -> int:
    """Returns `trainer.devices` as a number: "auto" stands for every GPU, or one CPU process."""
    return max(1, torch.cuda.device_count()) if devices == "auto" else int(devices)


def refuse_other_devices(devices: int | str, topology: Topology) -> None:
    """Raises ConfigError if another number of devices is wanted on this machine than the launcher has started.

    1, the default, stands for as many as they have started.
    """
    if isinstance(devices, int) and devices not in (1, topology.devices):
        launcher = topology.launcher.partition(",")[0]
        launcher += f" ({OPTIONS[launcher]})" if launcher in OPTIONS else ""
        instead = "have each start torchrun" if topology.launcher.startswith("pods") else f"have it start {devices}"
        raise ConfigError(
            f"trainer.devices={devices}, but the number of ranks is for {launcher} to choose, which has started "
            f"{topology.devices} on this machine: {instead}, or leave trainer.devices out"
        )


def relaunch_under_torchrun(devices: int) -> None:
    """Replaces this process by torchrun with the same program and arguments, one rank per device of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
    # Without this torchrun dies of SIGUSR1 and leaves its ranks running. It would end of SIGHUP under nohup too.
    signals = "SIGTERM,SIGINT,SIGQUIT,SIGUSR1" if hangup_ignored() else "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    command += ["--signals-to-handle", signals]
    print(f"trainer.devices={devices}: starting {devices} ranks with torchrun", flush=True)
    os.execv(sys.executable, [*command, *sys.argv])
