"""What devices can do: published peaks and memory of GPUs, and a measured peak for everything else."""

import os
import resource
import time
from statistics import median
from typing import NamedTuple

import torch

from mae.errors import ConfigError
from mae.train.precision import resolve_precision

MEASURED_SIZE = {"cpu": 1024, "cuda": 8192}
MEASURED_PRODUCTS = 8


class Device(NamedTuple):
    """One kind of GPU, from its data sheet.

    half    TFLOP/s of dense 16-bit products that are summed in float32, a multiply-add counted as two
    single  TFLOP/s of float32 outside the tensor cores, which is torch's default
    memory  GiB
    bf16    multiplies bfloat16 natively; older ones float16 only
    """

    half: float
    single: float
    memory: int
    bf16: bool = True


# Names as in the setting plan.gpu; the first part has to be a word of what the driver calls the device, the second too
# where there is one. An entry stands before the more general one.
DEVICES = {
    "t4": Device(65, 8.1, 15, bf16=False),
    "v100-16": Device(125, 15.7, 16, bf16=False),
    "v100-32": Device(125, 15.7, 32, bf16=False),
    "a10g": Device(70, 31.5, 22),
    "a100-40": Device(312, 19.5, 40),
    "a100-80": Device(312, 19.5, 80),
    "l4": Device(121, 30.3, 22),
    "l40s": Device(362, 91.6, 45),
    "h100-pcie": Device(756, 51.2, 80),
    "h100": Device(989, 66.9, 80),
    "h200": Device(989, 66.9, 140),
    "b200": Device(2250, 80, 180),
    "mi300x": Device(1307, 163.4, 192),
    "rtx3090": Device(71, 35.6, 24),
    "rtx4090": Device(165, 82.6, 24),
    "rtx5090": Device(210, 104.8, 32),
}


def known_device(name: str) -> Device:
    """The device of the table with this name; raises ConfigError with all names for another."""
    if name not in DEVICES:
        raise ConfigError(f"plan.gpu={name} is not in the table of devices: choose one of {', '.join(DEVICES)}, or cpu")
    return DEVICES[name]


class Hardware(NamedTuple):
    """One device as a plan counts with it: FLOP/s in the precision of the run, bytes of memory.

    kind      cuda or cpu
    measured  the FLOP/s are those of a matrix product here, not of a data sheet
    """

    name: str
    kind: str
    flops: float
    memory: int
    measured: bool


def hardware(gpu: str | None, precision: str) -> Hardware:
    """The GPU of that name, "cpu", or for None the device at hand; precision is Lightning's name of it."""
    if gpu not in (None, "cpu"):
        known = known_device(gpu)
        return Hardware(gpu, "cuda", _of(known, precision), known.memory * 2**30, measured=False)
    if gpu is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    else:
        device = torch.device("cpu")
        name, memory = "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peak = peak_flops(device, precision)
    return Hardware(name, device.type, peak or measured_flops(device, precision), memory, measured=peak is None)


def planned_precision(setting: str, gpu: str | None) -> str:
    """Lightning's name of the precision that `setting` will mean on the device of `hardware(gpu, ...)`."""
    if setting != "auto" or gpu in (None, "cpu"):
        return resolve_precision(setting)
    return "bf16-mixed" if known_device(gpu).bf16 else "32-true"


def recognise(driver_name: str) -> Device | None:
    """The device of the table that a driver's name means, such as "NVIDIA A100-SXM4-80GB"; None for an unknown one."""
    words = driver_name.lower().replace("rtx ", "rtx").replace("-", " ").split()
    for name, device in DEVICES.items():
        chip, _, variant = name.partition("-")
        if chip in words and (not variant or variant in words or f"{variant}gb" in words):
            return device
    return None


def peak_flops(device: torch.device, precision: str = "bf16-mixed") -> float | None:
    """Published FLOP/s of a device in a precision (Lightning's name); None where there is no data sheet: measure it."""
    if device.type != "cuda":
        return None
    known = recognise(torch.cuda.get_device_name(device))
    return known and _of(known, precision)


def measured_flops(device: torch.device, precision: str = "bf16-mixed") -> float:
    """FLOP/s of a large matrix product in a precision (Lightning's name): the median of a few."""
    dtype = {"32-true": torch.float32, "16-mixed": torch.float16}.get(precision, torch.bfloat16)
    size = MEASURED_SIZE[device.type]
    # A generator of its own: nobody's random numbers change by measuring.
    matrix = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    torch.mm(matrix, matrix)
    seconds = []
    for _ in range(MEASURED_PRODUCTS):
        _wait(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / median(seconds)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what tensors have taken at most, on a CPU the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _of(known: Device, precision: str) -> float:
    return (known.single if precision == "32-true" else known.half) * 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
