"""Speed of the published sizes on a GPU: python -m benchmarks.gpu [--out results.md]

pre-training    ViT-B/16, ViT-L/16 and ViT-H/14 at 224, bf16, compiled blocks, fused AdamW, beside transformers' ViTMAE;
                MFU counts the operations of the paper
update          one of AdamW and one of Muon for the same models
encoder         forward pass of the SAM-style ViT-H at 1024, bf16
loader          images per second from photographs of 500×375, one worker per core

A row that fails says why, and the others are measured. `--small` runs everything at small sizes on any device, to see
that it works.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import Steps, contenders
from benchmarks.stream import DATASETS, images_per_second, make_images, ours
from data.pack.image_folder import find_images
from data.pack.pack import pack
from mae.models.execution import BlocksConfig, prepare_blocks
from mae.models.flops import pretraining_flops
from mae.plan.devices import measure_flops
from mae.sam.encoder import SIZES, SamConfig, SamEncoder
from mae.sam.flops import sam_flops
from mae.train.muon import update_flops
from mae.train.optim import OptimConfig, build_optimizer

# Settings as transformers names them, and images per micro-batch.
PRETRAINING: dict[str, tuple[dict[str, Any], int]] = {
    "ViT-B/16": ({}, 256),
    "ViT-L/16": (
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        256,
    ),
    "ViT-H/14": (
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
        | {"patch_size": 14},
        128,
    ),
}
SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "ViT of width 64": (
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
        | {"image_size": 64, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
        | {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 128},
        4,
    ),
}
FAILED = "failed: "
WARM_UP_ROUNDS = 3  # for compilation and the choice of kernels
SMALL_SAM = SamConfig(image_size=(64, 64), width=32, depth=2, num_heads=2, window=2, global_blocks=(1,))


def time_pretraining(
    name: str, size: dict[str, Any], batch: int, device: torch.device, peak: float, rounds: int
) -> tuple[str, ...]:
    """Returns the row of one size."""
    steps = Steps(batch, device, size, peers=("transformers",))
    model, _ = steps.models["ours"]
    prepare_blocks(model.whole_blocks, BlocksConfig(compile=device.type == "cuda"))  # pyright: ignore[reportArgumentType]
    seconds: dict[str, list[float]] = {contender: [] for contender in steps.models}
    for number in range(WARM_UP_ROUNDS + rounds):
        for contender in steps.models:
            took = steps.time_step(contender, number, bf16=True)
            if number >= WARM_UP_ROUNDS:
                seconds[contender].append(took)
    best = statistics.median(seconds["ours"])
    ratio = statistics.median(a / b for a, b in zip(seconds["transformers"], seconds["ours"], strict=True))
    mfu = pretraining_flops(steps.config) * batch / best / peak
    return f"{name}, {batch} images", f"{batch / best:,.0f}", f"{mfu:.0%}", f"{ratio:.2f}"


def time_update(name: str, size: dict[str, Any], device: torch.device, rounds: int) -> tuple[str, ...]:
    """Returns the row of the updates of one size."""
    model, _ = contenders(size, device, ())[1]["ours"]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    milliseconds = {}
    for optimizer in ("adamw", "muon"):
        settings = OptimConfig.model_validate({"name": optimizer})
        step = build_optimizer(model.named_parameters(), settings, 1e-4).step
        milliseconds[optimizer] = 1000 * median_seconds(step, device, rounds)
    flops = update_flops(model.named_parameters())
    rate = flops / milliseconds["muon"] * 1000 / 1e12
    return name, *(f"{value:.2f} ms" for value in milliseconds.values()), f"{flops / 1e12:.2f}, {rate:,.0f}"


def time_encoder(config: SamConfig, device: torch.device, peak: float, rounds: int) -> tuple[str, ...]:
    """Returns the row of the encoder as `mae.load_sam` gives it, with compiled blocks on a GPU."""
    torch.manual_seed(0)
    model = SamEncoder(config).to(device, torch.bfloat16).eval()
    if device.type == "cuda":
        model.compile_blocks()
    images = torch.randn(1, 3, *config.image_size, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        seconds = median_seconds(lambda: model(images), device, rounds)
    mfu = sam_flops(config, pad=True) / seconds / peak
    return (
        f"SAM-style encoder, width {config.width}, {config.image_size[0]} px",
        f"{1 / seconds:,.1f}",
        f"{mfu:.0%}",
        "-",
    )


def time_loader(photos: Path, copies: int, seconds: float) -> tuple[str, ...]:
    """Returns the row of the loader, on `copies` crops of the photographs."""
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        make_images(photos, out, (500, 375), copies)
        samples, classes, _ = find_images(out / "images")
        pack(samples, out / "shards", name="x", classes=classes, shard_size=copies // 4)
        rate = images_per_second(ours(out, workers), seconds)
    return f"stream of 500x375 photographs, {workers} workers", f"{rate:,.0f}", "-", "-"


def median_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Returns the median time of a call after WARM_UP_ROUNDS calls."""
    seconds = []
    for number in range(WARM_UP_ROUNDS + rounds):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UP_ROUNDS:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def head(*columns: str) -> list[str]:
    """Prints and returns the head of a table."""
    lines = ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    say("\n".join(lines))
    return lines


def measured(name: str, measure: Callable[[], tuple[str, ...]]) -> list[str]:
    """Prints and returns the row that `measure` finds, or why it found none: the others are measured all the same."""
    try:
        row = measure()
    except (RuntimeError, ImportError, OSError) as error:  # out of memory, compilation, a package, a file
        row = name, f"{FAILED}{type(error).__name__}: {str(error).splitlines()[0]}", "-", "-"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(line := "| " + " | ".join(row) + " |")
    return [line]


def say(text: str) -> None:
    print(text, flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--photos", type=Path, default=DATASETS / "large_photos")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    if not arguments.small and not torch.cuda.is_available():
        sys.exit("no CUDA device: the published sizes want one. --small shows that everything runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = measure_flops(device)
    sizes, sam = (SMALL, SMALL_SAM) if arguments.small else (PRETRAINING, SIZES["sam_huge"])
    rounds = arguments.rounds
    lines = [f"{name}, torch {torch.__version__}, bf16; measured ceiling {peak / 1e12:,.1f} TFLOP/s"]
    say(lines[0])
    lines += head("", "images/s", "MFU", "time of transformers / ours")
    for size, (settings, batch) in sizes.items():
        lines += measured(size, lambda: time_pretraining(size, settings, batch, device, peak, rounds))  # noqa: B023
    lines += measured("SAM-style encoder", lambda: time_encoder(sam, device, peak, rounds))
    if arguments.photos.is_dir():
        copies, seconds = (128, 1) if arguments.small else (2400, 20)
        lines += measured("loader", lambda: time_loader(arguments.photos, copies, seconds))
    lines += head("update", "AdamW", "Muon", "TFLOP of Muon, TFLOP/s")
    for size, (settings, _) in sizes.items():
        lines += measured(size, lambda: time_update(size, settings, device, rounds))  # noqa: B023
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")
    if failed := sum(FAILED in line for line in lines):
        sys.exit(f"{failed} rows failed")


if __name__ == "__main__":
    main()
