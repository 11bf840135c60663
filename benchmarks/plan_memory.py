"""Memory that plan=true forecasts against that of real steps on a CPU: python -m benchmarks.plan_memory

python -m benchmarks.plan_memory segment: the tasks alone whose names hold that word.

Each case runs in a process of its own and makes two steps in Lightning's order; the first creates AdamW's moments.

foreseen        everything but the weights
measured        peak resident set (VmHWM) above that before the first step, with model and libraries in place; glibc is
                told to return every larger block at once (MALLOC_MMAP_THRESHOLD_)
glibc as it is  the same without that, where glibc keeps some of the freed memory
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mae.models.config import MAEConfig
from mae.plan.dry_step import Workload, autocast, dry_step
from mae.plan.training_cost import pretraining, sam_training, segmentation
from mae.sam.config import SegmentConfig
from mae.sam.encoder import SIZES
from mae.train.optim import OptimConfig, build_optimizer


def sessions(masks: int, clicks: int) -> Workload:
    """Returns the workload of task=segment with a narrow encoder at 128 x 128 and SAM's own decoder."""
    fields = {"name": "segment", "image_size": 128, "masks_per_image": masks, "clicks": clicks, "global_blocks": (1, 3)}
    config = MAEConfig.model_validate({"image_size": 128, "width": 192, "depth": 4, "num_heads": 3})
    return segmentation(config, SegmentConfig.model_validate(fields))


MIB = 2**20
PRECISION = "bf16-mixed"
CPU = torch.device("cpu")
SESSIONS = ((8, 0), (64, 0), (16, 4), (32, 8))  # masks, clicks
WORKLOADS = {
    "ViT-B pre-training": pretraining(MAEConfig.model_validate({}), CPU),
    "SAM-B at 512": sam_training(SIZES["sam_base"].model_copy(update={"image_size": (512, 512)})),
    "SAM-B at 1024": sam_training(SIZES["sam_base"]),
} | {f"segment, {masks} masks, {clicks} clicks": sessions(masks, clicks) for masks, clicks in SESSIONS}
CASES = [
    *(("ViT-B pre-training", images, recompute) for images in (16, 32) for recompute in (False, True)),
    *((name, 1, recompute) for name in ("SAM-B at 512", "SAM-B at 1024") for recompute in (False, True)),
    *((name, 1, recompute) for name in WORKLOADS if name.startswith("segment") for recompute in (False, True)),
]
RETURN_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    if wanted.startswith("["):
        name, images, recompute = json.loads(wanted)
        print(measure(WORKLOADS[name], images, recompute))
        return
    table = Table(title="MiB beside the weights, two bf16 steps")
    for column in ("task", "images", "recompute", "foreseen", "measured", "ratio", "glibc as it is", "ratio"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, images, recompute in track([case for case in CASES if wanted in case[0]], "steps", transient=True):
        foreseen = foresee(WORKLOADS[name], images, recompute)
        row = [name, str(images), "blocks" if recompute else "nothing", f"{foreseen / MIB:,.0f}"]
        for environment in (RETURN_BLOCKS, {}):
            measured = measure_in_process(name, images, recompute, environment)
            row += [f"{measured / MIB:,.0f}", f"{foreseen / measured:.3f}"]
        table.add_row(*row)
    Console().print(table)


def foresee(workload: Workload, images: int, recompute: bool) -> int:
    """Returns the forecast in bytes."""
    few = min(images, 4)
    cost = dry_step(workload, few, PRECISION, recompute=recompute).at(images / few)
    return cost.peak - cost.weights


def measure_in_process(name: str, images: int, recompute: bool, environment: dict[str, str]) -> int:
    """Runs `measure` in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.plan_memory", json.dumps([name, images, recompute])]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def measure(workload: Workload, images: int, recompute: bool) -> int:
    """Makes two steps and returns the bytes they added to the resident set at its peak."""
    fields = {"image_size": 32, "width": 32, "depth": 1, "num_heads": 2}
    tiny = pretraining(MAEConfig.model_validate(fields), CPU)
    make_step(tiny, *build(tiny, False), 1)  # loads libraries on first use
    model, optimizer = build(workload, recompute)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    for _ in range(2):
        make_step(workload, model, optimizer, images)
    return resident("VmHWM") - before


def build(workload: Workload, recompute: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = workload.build(recompute)
    return model, build_optimizer(model.named_parameters(), OptimConfig.model_validate({}), lr=1e-4)


def make_step(workload: Workload, model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: int) -> None:
    with autocast(PRECISION):
        loss = workload.loss(model, images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def resident(kind: str) -> int:
    """Returns VmRSS or VmHWM of this process in bytes."""
    return 1024 * int(re.findall(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


if __name__ == "__main__":
    main()
