"""Who launched this process: ranks come from torchrun or SLURM, never from Lightning starting itself again."""

import os
import sys
from dataclasses import dataclass
from typing import NoReturn

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from mae.distributed.rank_zero import warn
from mae.distributed.slurm import refuse_unlaunched_ranks


@dataclass(frozen=True)
class Topology:
    """This process among the ranks of the run."""

    rank: int
    ranks: int
    devices: int  # ranks on this node
    nodes: int


def launched() -> Topology | None:
    """The topology that torchrun or srun gave this process; None when nobody launched ranks.

    Raises ConfigError when SLURM has room for several ranks and did not start this process as one of them.
    """
    if TorchElasticEnvironment.detect():
        warn_of_shared_store()
        ranks, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return Topology(rank=int(os.environ["RANK"]), ranks=ranks, devices=local, nodes=ranks // local)
    if SLURMEnvironment.detect():
        refuse_unlaunched_ranks()
        ranks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
        return Topology(rank=int(os.environ["SLURM_PROCID"]), ranks=ranks, devices=ranks // nodes, nodes=nodes)
    return None


def warn_of_shared_store() -> None:
    """torchrun keeps one store through its restarts, in which new ranks may find the addresses of dead ones."""
    restarts, shared = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("MAX_RESTARTS", "USE_AGENT_STORE"))
    if restarts not in (None, "0") and shared == "True":
        warn(
            f"torchrun --max-restarts={restarts}: ranks that are started again may try to reach dead ones and fail or "
            "hang. Start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )


def cluster_environment() -> list[SLURMEnvironment]:
    """Lightning's plugin for SLURM, which shall never requeue by itself: mae/distributed/slurm.py or submitit does."""
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]


def leave_together(exit_code: int) -> NoReturn:
    """Ends the process once every rank has come here: as soon as one has left, torchrun and srun end the others."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.exit(exit_code)


def wanted_devices(devices: int | str) -> int:
    """`trainer.devices` as a number: "auto" is every GPU, or one CPU process."""
    return max(1, torch.cuda.device_count()) if devices == "auto" else int(devices)


def relaunch_under_torchrun(devices: int) -> None:
    """Replaces this process by torchrun with the same program and arguments, one rank per device of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
    # By itself torchrun dies of SIGUSR1 and leaves its ranks running.
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    print(f"trainer.devices={devices}: starting {devices} ranks with torchrun", flush=True)
    os.execv(sys.executable, [*command, *sys.argv])
