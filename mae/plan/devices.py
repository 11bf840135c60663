"""Devices, for plans and the MFU: published peak FLOP/s and memory of GPUs, a measured peak for all others."""

import os
import resource
import time
from statistics import median
from typing import NamedTuple

import torch

from mae.errors import ConfigError
from mae.train.precision import resolve_precision

PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices multiplied to measure a peak
PRODUCTS = 8


class Device(NamedTuple):
    """One kind of GPU, from its data sheet.

    half    TFLOP/s of dense 16-bit products summed in float32, a multiply-add counted as two
    single  TFLOP/s of float32 outside the tensor cores, torch's default
    memory  GiB
    link    GB/s from one to the next in a node, in one direction: NVLink or its like, else PCI Express
    bf16    multiplies bfloat16 natively, not float16 only
    """

    half: float
    single: float
    memory: int
    link: float = 32
    bf16: bool = True

    def flops(self, precision: str) -> float:
        """Returns the peak FLOP/s in a precision (Lightning's name)."""
        return (self.single if precision == "32-true" else self.half) * 1e12


# The keys are values of plan.gpu. Both parts of a key have to be words of the driver's name of the device; special
# entries stand before general ones.
DEVICES = {
    "p100": Device(18.7, 9.3, 16, 16, bf16=False),
    "t4": Device(65, 8.1, 15, 16, bf16=False),
    "v100-16": Device(125, 15.7, 16, 150, bf16=False),
    "v100-32": Device(125, 15.7, 32, 150, bf16=False),
    "a10g": Device(70, 31.5, 22),
    "a30": Device(165, 10.3, 24),
    "a40": Device(150, 37.4, 45),
    "a6000": Device(155, 38.7, 48),
    "a100-40": Device(312, 19.5, 40, 300),
    "a100-80": Device(312, 19.5, 80, 300),
    "l4": Device(121, 30.3, 22),
    "l40s": Device(362, 91.6, 45),
    "rtx6000-ada": Device(364, 91.1, 48),
    "h100-pcie": Device(756, 51.2, 80, 64),
    "h100": Device(989, 66.9, 80, 450),
    "h200": Device(989, 66.9, 140, 450),
    "b200": Device(2250, 80, 180, 900),
    "mi300x": Device(1307, 163.4, 192, 448),
    "rtx2080-ti": Device(54, 13.4, 11, 16, bf16=False),
    "rtx3090": Device(71, 35.6, 24),
    "rtx4090": Device(165, 82.6, 24),
    "rtx5090": Device(210, 104.8, 32, 64),
}
UNKNOWN = Device(0, 0, 0)  # a card of which plan.memory and plan.tflops say the rest


def known_device(name: str, described: bool = False) -> Device:
    """Returns the GPU with this name in DEVICES, or one of which nothing is known if settings describe it.

    Raises ConfigError, which lists all names, if there is none.
    """
    if name in DEVICES:
        return DEVICES[name]
    if not described:
        raise ConfigError(
            f"plan.gpu={name} is not in the table of devices: choose one of {', '.join(DEVICES)}, or cpu, or describe "
            "it by plan.memory (GiB) and plan.tflops"
        )
    return UNKNOWN


class Hardware(NamedTuple):
    """The device of a forecast.

    kind      cuda or cpu
    flops     peak FLOP/s in the precision of the run
    memory    bytes
    measured  the peak is that of a matrix product on this machine, not of a data sheet
    link      bytes per second from one device to the next in a node
    half      peak FLOP/s of 16-mixed where the run has float32 because bfloat16 is missing; None: it has what is best
    """

    name: str
    kind: str
    flops: float
    memory: int
    measured: bool
    link: float = UNKNOWN.link * 1e9
    half: float | None = None


def find_hardware(
    gpu: str | None, precision: str, memory: float | None = None, tflops: float | None = None
) -> Hardware:
    """Returns the GPU of that name, the CPU of this machine for "cpu", or its own device for None.

    precision  Lightning's name
    memory     GiB, and TFLOP/s in that precision: of a GPU that is not in DEVICES, or in place of what stands there
    """
    found = _find_hardware(gpu, precision, memory is not None and tflops is not None)
    if memory is not None:
        found = found._replace(memory=int(memory * 2**30))
    return found if tflops is None else found._replace(flops=tflops * 1e12, measured=False, half=None)


def _find_hardware(gpu: str | None, precision: str, described: bool) -> Hardware:
    if gpu not in (None, "cpu"):
        known = known_device(gpu, described)
        half = None if known.bf16 or precision != "32-true" else known.half * 1e12
        memory, link = known.memory * 2**30, known.link * 1e9
        return Hardware(gpu, "cuda", known.flops(precision), memory, measured=False, link=link, half=half)
    if gpu is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    else:
        device = torch.device("cpu")
        name, memory = "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peak = peak_flops(device, precision)
    link = ((recognise(name) if device.type == "cuda" else None) or UNKNOWN).link * 1e9
    return Hardware(
        name, device.type, peak or measure_flops(device, precision), memory, measured=peak is None, link=link
    )


def planned_precision(setting: str, gpu: str | None, described: bool = False) -> str:
    """Returns Lightning's name of the precision that `setting` means on the device of `find_hardware(gpu, ...)`."""
    if setting != "auto" or gpu in (None, "cpu"):
        return resolve_precision(setting)
    return "bf16-mixed" if known_device(gpu, described).bf16 else "32-true"


def recognise(driver_name: str) -> Device | None:
    """Returns the entry of DEVICES for a driver's name, such as "NVIDIA A100-SXM4-80GB"; None if there is none."""
    said = driver_name.lower().replace("-", " ")
    words = {*said.split(), *said.replace("rtx ", "rtx").split()}
    for name, device in DEVICES.items():
        chip, _, variant = name.partition("-")
        if chip in words and (not variant or variant in words or f"{variant}gb" in words):
            return device
    return None


def peak_flops(device: torch.device, precision: str = "bf16-mixed") -> float | None:
    """Returns the published peak FLOP/s in a precision (Lightning's name); None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    known = recognise(torch.cuda.get_device_name(device))
    return known and known.flops(precision)


def measure_flops(device: torch.device, precision: str = "bf16-mixed") -> float:
    """Measures FLOP/s of a large matrix product in a precision (Lightning's name), the median of PRODUCTS."""
    dtype = {"32-true": torch.float32, "16-mixed": torch.float16}.get(precision, torch.bfloat16)
    side = PRODUCT_SIDE[device.type]
    # A generator of its own, so that measuring changes nobody's random numbers.
    matrix = torch.randn(side, side, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    torch.mm(matrix, matrix)
    seconds = []
    for _ in range(PRODUCTS):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / median(seconds)


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes, of tensors on a GPU, of the whole process (resident set) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
