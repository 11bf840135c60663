"""Launching: ranks come from torchrun or SLURM; Lightning never starts processes itself."""

import os
import sys
from dataclasses import dataclass
from typing import NoReturn

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from mae.distributed.rank_zero import warn
from mae.distributed.slurm import describe_step, started_tasks
from mae.distributed.stop import hangup_ignored
from mae.errors import ConfigError


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

        Raises ConfigError if SLURM has room for several ranks and did not start this process as one of them, if another
        launcher has started several, or if the machines have different numbers of ranks.
        """
        if TorchElasticEnvironment.detect():
            warn_of_shared_store()
            launcher = "torchrun"
            rank, ranks, devices, nodes = (
                int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
            )
        elif (ranks := sum(tasks := started_tasks())) > 1:
            launcher = "srun, started by submitit" if "SUBMITIT_EXECUTOR" in os.environ else "srun"
            rank, nodes, devices = int(os.environ["SLURM_PROCID"]), len(tasks), tasks[0]
            if len(set(tasks)) > 1:
                raise ConfigError(
                    f"srun has started {', '.join(map(str, tasks))} ranks on {nodes} machines: have it start as many "
                    f"on one as on another, by --ntasks-per-node"
                )
        else:
            refuse_other_launchers()
            return None
        if devices * nodes != ranks:
            raise ConfigError(f"{ranks} ranks on {nodes} machines: start as many ranks on one machine as on another")
        return cls(rank, ranks, devices, nodes, launcher)


def refuse_other_launchers() -> None:
    """Raises ConfigError if this process is one of several that neither torchrun nor srun has started.

    Each would work alone, on one device. Kubeflow and others set WORLD_SIZE and RANK, MPI its own variables.
    """
    names = ["WORLD_SIZE"] if "RANK" in os.environ else []
    for name in [*names, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]:
        if os.environ.get(name, "1") not in ("", "1"):
            raise ConfigError(
                f"{name}={os.environ[name]}: another launcher has started several processes, each of which would work "
                "alone. Have it start torchrun, once on each machine, or unset the variable"
            )


def warn_of_shared_store() -> None:
    """Warns that torchrun keeps one store through its restarts: new ranks may find the addresses of dead ones in it."""
    restarts, shared = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("MAX_RESTARTS", "USE_AGENT_STORE"))
    if restarts not in (None, "0") and shared == "True":
        warn(
            f"torchrun --max-restarts={restarts}: ranks that are started again may try to reach dead ones and fail or "
            "hang. Start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )


def cluster_environment() -> list[SLURMEnvironment | LightningEnvironment]:
    """Returns Lightning's SLURM plugin, which shall not requeue: `requeue` or submitit does.

    For one process in a SLURM job it is that of a single process: Lightning would look for variables of srun.
    """
    if TorchElasticEnvironment.detect():
        return []
    if sum(started_tasks()) > 1:
        return [slurm_environment()]
    return [LightningEnvironment()] if "SLURM_JOB_ID" in os.environ else []


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
    """Raises ConfigError if another number of devices is wanted on this machine than torchrun or srun has started.

    1, the default, stands for as many as they have started.
    """
    if isinstance(devices, int) and devices not in (1, topology.devices):
        launcher = "torchrun (--nproc-per-node)" if TorchElasticEnvironment.detect() else "srun (--ntasks-per-node)"
        raise ConfigError(
            f"trainer.devices={devices}, but the number of ranks is for {launcher} to choose, which has started "
            f"{topology.devices} on this machine: have it start {devices}, or leave trainer.devices out"
        )


def relaunch_under_torchrun(devices: int) -> None:
    """Replaces this process by torchrun with the same program and arguments, one rank per device of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
    # Without this torchrun dies of SIGUSR1 and leaves its ranks running. It would end of SIGHUP under nohup too.
    signals = "SIGTERM,SIGINT,SIGQUIT,SIGUSR1" if hangup_ignored() else "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    command += ["--signals-to-handle", signals]
    print(f"trainer.devices={devices}: starting {devices} ranks with torchrun", flush=True)
    os.execv(sys.executable, [*command, *sys.argv])
