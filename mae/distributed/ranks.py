"""Process group and collectives for small Python objects, outside of a training loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mae.distributed.launch import Topology, cluster_environment

TIMEOUT = timedelta(hours=2)  # a rank may have to read far more than another


@contextmanager
def join_process_group(topology: Topology) -> Iterator[None]:
    """Joins the ranks of the launcher in one gloo process group, for small objects only."""
    if topology.ranks == 1:
        yield
        return
    environment = cluster_environment(topology)
    address = f"tcp://{environment.main_address}:{environment.main_port}"
    if topology.launcher == "torchrun":
        address = "env://"  # torchrun may hold the store itself
    dist.init_process_group("gloo", address, TIMEOUT, world_size=topology.ranks, rank=topology.rank)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather_to_rank_zero(part: Any) -> list[Any]:
    """Returns the parts of all ranks, in their order, on rank 0 and an empty list elsewhere. A collective."""
    if not dist.is_initialized():
        return [part]
    parts: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(part, parts or None)
    return parts


def broadcast_from_rank_zero(value: Any) -> Any:
    """Returns rank 0's value on every rank. A collective."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
