"""Ranks outside of a training loop: how they meet, and how rank 0 gets what each of them has."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from mae.distributed.launch import Topology

PATIENCE = timedelta(hours=2)  # a rank may have to read far more than another


@contextmanager
def joined(topology: Topology) -> Iterator[None]:
    """The ranks of torchrun or SLURM in one group of gloo, whatever their devices: only what is small travels."""
    if topology.ranks == 1:
        yield
        return
    environment = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment()
    meeting = f"tcp://{environment.main_address}:{environment.main_port}"
    if TorchElasticEnvironment.detect():
        meeting = "env://"  # torchrun may hold the store itself
    dist.init_process_group("gloo", meeting, PATIENCE, world_size=topology.ranks, rank=topology.rank)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gathered(part: Any) -> list[Any]:
    """The parts of all ranks in their order at rank 0, an empty list elsewhere; every rank has to call it."""
    if not dist.is_initialized():
        return [part]
    parts: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(part, parts or None)
    return parts


def of_rank_zero(value: Any) -> Any:
    """What rank 0 says, for every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
