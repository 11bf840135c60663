"""Who launched this process: ranks come from torchrun or SLURM, never from Lightning starting itself again."""

import os
import sys
from dataclasses import dataclass

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment


@dataclass(frozen=True)
class Topology:
    """This process among the ranks of the run."""

    rank: int
    ranks: int
    devices: int  # ranks on this node
    nodes: int


def launched() -> Topology | None:
    """The topology that torchrun or srun gave this process; None when nobody launched ranks."""
    if TorchElasticEnvironment.detect():
        ranks, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return Topology(rank=int(os.environ["RANK"]), ranks=ranks, devices=local, nodes=ranks // local)
    if SLURMEnvironment.detect():
        ranks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
        return Topology(rank=int(os.environ["SLURM_PROCID"]), ranks=ranks, devices=ranks // nodes, nodes=nodes)
    return None


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
