"""What the rows of `benchmarks.gpu` share: the machine they run on, a row's figures, and how a call is timed."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

WARM_UP_ROUNDS = 3  # for compilation and the choice of kernels


@dataclass(frozen=True)
class Bench:
    """Where and how long everything is measured.

    peak    FLOP/s of a large matrix product in bfloat16, measured
    small   sizes that any machine can run
    photos  folder of JPEGs for the loader, or None: made pictures
    """

    device: torch.device
    peak: float
    rounds: int
    small: bool
    photos: Path | None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


class Figures(NamedTuple):
    """Figures of a row.

    rate    in `unit`
    mfu     share of the measured peak, by the operations of the model; None: not meant
    memory  peak in bytes, of tensors of this contender alone; None: not measured
    """

    rate: float
    unit: str = "images/s"
    mfu: float | None = None
    memory: int | None = None


Row = tuple[str, Callable[[], Figures]]
Group = Callable[[Bench], Iterator[Row]]


class Unavailable(RuntimeError):
    """A row that this machine cannot run by its nature."""


def allocated(bench: Bench) -> int:
    """Returns the bytes of all tensors on the GPU and starts to watch their peak; 0 on a CPU."""
    if not bench.on_gpu:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_since(bench: Bench, before: int) -> int | None:
    """Returns the peak memory that was added to what `allocated` returned; None on a CPU."""
    return torch.cuda.max_memory_allocated() - before if bench.on_gpu else None


def median_seconds(run: Callable[[int], object], bench: Bench) -> float:
    """Returns the median time of a call, which gets the number of the round, after WARM_UP_ROUNDS calls."""
    seconds = []
    for number in range(WARM_UP_ROUNDS + bench.rounds):
        started = time.perf_counter()
        run(number)
        if bench.on_gpu:
            torch.cuda.synchronize()
        if number >= WARM_UP_ROUNDS:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
