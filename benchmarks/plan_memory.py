"""The memory that a plan foresees against that of real steps on a CPU: python -m benchmarks.plan_memory

Every case runs in a process of its own, which makes two steps in Lightning's order, the first of which creates the
moments of AdamW. Measured is the highest resident memory (VmHWM) above that before the first step, with the model and
all libraries in place; foreseen is everything but the weights. Measured twice: with glibc told to give every larger
piece back at once (MALLOC_MMAP_THRESHOLD_), and as it is, when it keeps some of the freed memory for itself.
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
from mae.plan.dry_step import autocast, dry_step
from mae.plan.training_cost import TrainingCost, pretraining, sam_training
from mae.sam.encoder import SIZES
from mae.train.optim import OptimConfig, adamw

MIB = 2**20
PRECISION = "bf16-mixed"
CPU = torch.device("cpu")
TASKS = {
    "ViT-B pre-training": pretraining(MAEConfig.model_validate({}), CPU),
    "SAM-B at 512": sam_training(SIZES["sam_base"].model_copy(update={"image_size": (512, 512)})),
    "SAM-B at 1024": sam_training(SIZES["sam_base"]),
}
CASES = [
    *(("ViT-B pre-training", images, again) for images in (16, 32) for again in (False, True)),
    *((name, 1, again) for name in ("SAM-B at 512", "SAM-B at 1024") for again in (False, True)),
]
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    if len(sys.argv) > 1:
        name, images, again = json.loads(sys.argv[1])
        print(measure(TASKS[name], images, again))
        return
    table = Table(title="MiB beside the weights, two bf16 steps")
    for column in ("task", "images", "recompute", "foreseen", "measured", "ratio", "glibc as it is", "ratio"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, images, again in track(CASES, "steps", transient=True):
        foreseen = foresee(TASKS[name], images, again)
        row = [name, str(images), "blocks" if again else "nothing", f"{foreseen / MIB:,.0f}"]
        for environment in (GIVE_BACK, {}):
            measured = in_own_process(name, images, again, environment)
            row += [f"{measured / MIB:,.0f}", f"{foreseen / measured:.3f}"]
        table.add_row(*row)
    Console().print(table)


def foresee(task: TrainingCost, images: int, again: bool) -> int:
    few = min(images, 4)
    step = dry_step(lambda: task.build(again), lambda model: task.loss(model, few), PRECISION).at(images / few)
    return step.peak - step.weights


def in_own_process(name: str, images: int, again: bool, environment: dict[str, str]) -> int:
    words = [sys.executable, "-m", "benchmarks.plan_memory", json.dumps([name, images, again])]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def measure(task: TrainingCost, images: int, again: bool) -> int:
    fields = {"image_size": 32, "width": 32, "depth": 1, "num_heads": 2}
    tiny = pretraining(MAEConfig.model_validate(fields), CPU)
    step(tiny, *prepared(tiny, False), 1)  # libraries that are loaded on first use
    model, optimizer = prepared(task, again)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    for _ in range(2):
        step(task, model, optimizer, images)
    return resident("VmHWM") - before


def prepared(task: TrainingCost, again: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = task.build(again)
    return model, adamw(model.named_parameters(), OptimConfig.model_validate({}), lr=1e-4)


def step(task: TrainingCost, model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: int) -> None:
    with autocast(PRECISION):
        loss = task.loss(model, images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def resident(kind: str) -> int:
    return 1024 * int(re.findall(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


if __name__ == "__main__":
    main()
