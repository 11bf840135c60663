"""Speed on one GPU, in at most nine minutes: python -m benchmarks.gpu [--only GROUP …] [--out results]

vit_base, vit_large, vit_huge14  a pre-training step of ViT-B/16, L/16, H/14 beside transformers (and lightly)
vit_1b                           the same, 1.36 billion parameters
sam_base, sam_huge               forward passes of the SAM-style encoder at 1024 px beside timm, segment-anything and
                                 transformers, with each kernel of mae/sam/kernels.py
sam_base_step, sam_huge_step     training steps of it
update                           one update of AdamW and of Muon
fsdp                             ViT-L/16 with and without FSDP2
loader                           JPEGs alone, and feeding ViT-B/16; nvJPEG

Prints a row as soon as it is measured, and writes RESULTS.md and RESULTS.json. A row that fails or takes longer than
--seconds says why, and the others are measured. MFU is the share of the ceiling in the first line. Memory is what a row
adds to its weights. The last column is the rate divided by that of the group's first peer. `--small` runs all rows at
small sizes, on a CPU too, to see that they work: what needs a GPU says so.
"""

import argparse
import gc
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_pretraining, gpu_sam
from benchmarks.stream import DATASETS
from benchmarks.timed import Bench, Figures, Row, Unavailable
from mae.plan.devices import measure_flops

# In the order of what one wants to know first.
GROUPS = {
    name: (gpu_pretraining.GROUPS | gpu_sam.GROUPS)[name]
    for name in (
        *("vit_huge14", "sam_huge", "vit_large", "vit_base", "sam_huge_step", "fsdp", "update", "loader"),
        *("sam_base", "sam_base_step", "vit_1b"),
    )
}
PEERS = ("transformers", "timm", "segment-anything", "lightly")
HEAD = ("", "", "MFU", "peak memory", "÷ peer")


class Late(Exception):
    """A row has used up its seconds."""


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=75, help="limit of a row, with what it builds")
    parser.add_argument("--minutes", type=float, default=9, help="no row begins after them")
    parser.add_argument("--photos", type=Path, default=DATASETS / "large_photos", help="JPEGs for the loader")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, help="RESULTS.md and RESULTS.json")
    arguments = parser.parse_args(words)
    if arguments.device == "cpu" and not arguments.small:
        sys.exit("no CUDA device: the published sizes need one. --small shows that everything runs")
    end = time.monotonic() + 60 * arguments.minutes
    device = torch.device(arguments.device)
    peak = measure_flops(device)
    photos = arguments.photos if arguments.photos.is_dir() else None
    bench = Bench(device, peak, arguments.rounds, arguments.small, photos)
    name = torch.cuda.get_device_name() if bench.on_gpu else "CPU"
    title = f"{name}, torch {torch.__version__}, bf16; measured ceiling {peak / 1e12:,.1f} TFLOP/s"
    lines = [title, "", table_row(*HEAD), "|" + "---|" * len(HEAD)]
    say("\n".join(lines))
    results: list[dict[str, Any]] = []
    for group in arguments.only:
        for result in measure_group(group, bench, arguments.seconds, end):
            results.append(result)
            lines.append(table_row(*cells(result, results)))
            say(lines[-1])
            if arguments.out:  # after each row: what is measured stays if the machine goes
                arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
                arguments.out.with_suffix(".json").write_text(json.dumps({"title": title, "rows": results}, indent=1))
    failed = [result for result in results if "failed" in result]
    if failed:
        sys.exit(f"{len(failed)} of {len(results)} rows failed")


def measure_group(group: str, bench: Bench, seconds: int, end: float) -> Iterator[dict[str, Any]]:
    """Yields a dictionary for each row of a group: its figures, or why there are none."""
    rows = GROUPS[group](bench)
    while True:
        result: dict[str, Any] = {"group": group, "row": "set-up"}
        started = time.monotonic()
        if started > end:
            yield result | {"row": "all further rows", "failed": "not begun: --minutes are over"}
            return
        row: Row | None = None
        try:
            with limit(seconds):
                row = next(rows, None)
                if row is None:
                    return
                result["row"] = row[0]
                result |= row[1]()._asdict()
        except Unavailable as error:
            result["unavailable"] = str(error)
        except Exception as error:  # out of memory, compilation, a package, a file: the others run all the same
            result["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        yield result | {"seconds": round(time.monotonic() - started, 1)}
        if row is None:
            return
        del row
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raises Late in its body after some seconds."""

    def stop(*_: Any) -> None:
        raise Late(f"longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def cells(result: dict[str, Any], results: list[dict[str, Any]]) -> tuple[str, ...]:
    """Returns the cells of a row; `results` holds those before it."""
    name = f"{result['group']}: {result['row']}"
    if "rate" not in result:
        return name, result.get("unavailable") or f"failed: {result['failed']}", "-", "-", "-"
    figures = Figures(*(result[field] for field in Figures._fields))
    share = "-" if figures.mfu is None else f"{figures.mfu:.0%}"
    memory = "-" if figures.memory is None else f"{figures.memory / 2**30:.1f} GiB"
    peers = [one for one in results if one["group"] == result["group"] and one["row"].startswith(PEERS)]
    rate = next((peer["rate"] for peer in peers if "rate" in peer and peer is not result), None)
    return name, f"{figures.rate:,.1f} {figures.unit}", share, memory, f"{figures.rate / rate:.2f}" if rate else "-"


def table_row(*row: str) -> str:
    return "| " + " | ".join(row) + " |"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
