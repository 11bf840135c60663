"""Ranks that neither torchrun nor srun has started: taken over where they know their place, refused by name elsewhere.

Loaded if a variable looks like one of a launcher.
"""

import os
from typing import NamedTuple, NoReturn

from mae.errors import ConfigError


class Variables(NamedTuple):
    """Names of the variables by which a launcher tells each process its place."""

    launcher: str
    rank: str
    ranks: str
    local_rank: str
    local_ranks: str


OPEN_MPI = Variables("mpirun", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
HYDRA = Variables("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH, Intel MPI
PALS = Variables("mpiexec", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
TORCH = Variables("RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
PODS = "pods of Kubernetes"

# What says that several processes were started, and the variables beside it: to be unset in a shell that has them left.
SIZES = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_", "PMIX_"),
    "PMI_SIZE": ("PMI_", *HYDRA[3:]),
    "JSM_NAMESPACE_SIZE": ("JSM_", "PMIX_"),
    "HOROVOD_SIZE": ("HOROVOD_",),
    "FLUX_JOB_SIZE": ("FLUX_", "PMI_"),
    "WORLD_SIZE": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_"),
}


class Place(NamedTuple):
    """This process among the ranks of a launcher that has started `devices` on each machine."""

    launcher: str
    rank: int
    ranks: int
    devices: int


def _has(names: Variables) -> bool:
    return all(os.environ.get(name) for name in names[1:]) and os.environ[names.ranks] != "1"


def _mpi() -> Variables | None:
    """Returns the variables of the MPI that has started this process as one of several; None if none has."""
    if _has(OPEN_MPI):
        return OPEN_MPI
    # srun --mpi=pmi2 sets the same; under mpiexec the step of srun holds its daemons.
    of_srun = os.environ.get("PMI_SIZE") == os.environ.get("SLURM_STEP_NUM_TASKS")
    return next((names for names in (HYDRA, PALS) if _has(names) and not of_srun), None)


def find_mpi_place() -> Place | None:
    """Returns this process's place among the ranks of MPI, asked before srun's; None if it is none of several.

    Raises ConfigError if ranks do not lie machine by machine, or nobody says where rank 0 is.
    """
    names = _mpi()
    return _place(names) if names else None


def find_place() -> Place | None:
    """Returns this process's place among ranks that neither torchrun, srun nor MPI has started; None if it is alone.

    Raises ConfigError if the environment speaks of several processes, and does not say enough of them.
    """
    environment = os.environ
    kubernetes = "KUBERNETES_SERVICE_HOST" in environment or any(name.startswith("PET_") for name in environment)
    several = "RANK" in environment and environment.get("WORLD_SIZE", "1") not in ("", "1")
    if kubernetes and several and "LOCAL_RANK" not in environment:
        return _pod()
    if environment.get("PET_NNODES", "1") not in ("1", "1:1") and "RANK" not in environment:
        raise ConfigError(
            f"PET_NNODES={environment['PET_NNODES']} is for torchrun, and this process was started without it: each "
            "pod would train alone. Have the pod's command be torchrun train.py …, or unset PET_NNODES"
        )
    if _has(TORCH):
        return _place(TORCH)
    for size, families in SIZES.items():
        if environment.get(size, "1") not in ("", "1") and (size != "WORLD_SIZE" or several):
            _refuse([name for name in (TORCH.rank, size) if name in environment], families)
    if "WORLD_SIZE" not in environment and environment.get("RANK", "0") not in ("", "0"):
        _refuse(["RANK"], SIZES["WORLD_SIZE"])  # it would do all silently
    return None


def _pod() -> Place:
    """Returns the place of a pod with one process, as a PyTorchJob makes it without torchrun."""
    each = os.environ.get("PET_NPROC_PER_NODE", "1")
    if each.isdigit() and each != "1":
        raise ConfigError(
            f"PET_NPROC_PER_NODE={each}: the PyTorchJob wants {each} ranks in each pod, which torchrun has to start. "
            "Have the pod's command be torchrun train.py …: it reads these variables"
        )
    rank, ranks = _number("RANK"), _number("WORLD_SIZE")
    _require_address(PODS, ranks, ranks)
    return Place(PODS, rank, ranks, 1)


def _place(names: Variables) -> Place:
    rank, ranks, local_rank, devices = map(_number, names[1:])
    if ranks % devices or rank % devices != local_rank:
        raise ConfigError(
            f"{names.launcher} has started rank {rank} of {ranks} as number {local_rank} of {devices} on its machine: "
            "have it start as many on one machine as on another, one machine after the other (mpirun --map-by slot)"
        )
    _require_address(names.launcher, ranks, ranks // devices)
    return Place(names.launcher, rank, ranks, devices)


def _require_address(launcher: str, ranks: int, nodes: int) -> None:
    if nodes > 1 and not os.environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"{launcher}: {ranks} ranks on {nodes} machines, and nobody says where rank 0 is. Set MASTER_ADDR to that "
            "machine for all of them (mpirun -x MASTER_ADDR=HOST), or have it start torchrun, once on each machine"
        )


def _number(name: str) -> int:
    if not os.environ[name].isdigit():
        raise ConfigError(f"{name}={os.environ[name]} is no number: `unset {name}`, or have the launcher set it right")
    return int(os.environ[name])


def _refuse(shown: list[str], families: tuple[str, ...]) -> NoReturn:
    environment = os.environ
    found = " ".join(f"{name}={environment[name]}" for name in shown)
    prefixes = tuple(family for family in families if family.endswith("_"))
    left = [name for name in sorted(environment) if name in families or name.startswith(prefixes)]
    raise ConfigError(
        f"{found}: another launcher has started several processes, each of which would work alone, or variables are "
        "left over in this shell. For several have it start torchrun, once on each machine; for one `unset "
        f"{' '.join(left)}`"
    )
