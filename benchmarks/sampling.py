"""Choosing images by a table beside taking all, in turn: python -m benchmarks.sampling [--path SHARDS]

1 seek        to random positions of new epochs of 11 million samples in 11,000 shards, with a real table (352 MB)
2 throughput  processor time of the loader for each image of --path (default: the built-in digits), without workers

Half of the losses are above 1, the others spread evenly: every shard gives some of its images.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from data.config import DataConfig, SamplingRule
from data.datamodule import ShardDataModule
from data.index.index import ShardIndex
from data.index.sample_table import SampleTable, new_rows, write_rows
from data.order.choice import ONE, Choice
from data.order.order import Order
from data.pack import builtin

SEEKS, BATCH = 50, 256
RULE = SamplingRule(probability="loss")


class Shards:
    """What a table asks of an index."""

    def __init__(self, shards: int, samples: int):
        self.shards = [f"fake-{number:06d}.tar" for number in range(shards)]
        self.sizes = np.full(shards, samples)
        self.ends = np.cumsum(self.sizes).tolist()
        self.digests = np.random.default_rng(0).integers(0, 2**64, shards, np.uint64)


def write_table(path: Path, index: ShardIndex, samples: int) -> None:
    rows = new_rows(index, np.arange(samples))
    rows["loss"], rows["size"] = np.random.default_rng(1).random(samples) * 2, 256
    write_rows(path, rows)


def measure_seeks(shards: int, samples: int, folder: Path) -> None:
    """Prints how long opening takes, and a seek in both orders."""
    index = cast(ShardIndex, Shards(shards, samples))
    total = shards * samples
    write_table(folder / "large.npy", index, total)
    start = time.perf_counter()
    table = SampleTable(folder / "large.npy", index)
    choice = Choice(index.sizes, lambda shard: table.probabilities(shard, RULE, ONE), seed=0)
    seconds = time.perf_counter() - start
    print(f"table of {total:,} samples opened in {seconds:.2f} s, {choice.n:,} in an epoch")
    orders = {"all": Order(index.sizes, seed=0), "chosen": Order(index.sizes, seed=0, choice=choice)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in orders}
    positions = np.random.default_rng(0).integers(0, choice.n - BATCH, SEEKS)
    for epoch, position in enumerate(positions.tolist()):
        for name, order in orders.items():
            start = time.perf_counter(), time.process_time()
            order.samples(epoch, position, position + BATCH)
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    for name, found in times.items():
        (median, busy), worst = map(statistics.median, zip(*found, strict=True)), max(found)[0] * 1e3
        print(
            f"seek to a position of a new epoch, {name}: median {median * 1e3:.1f} ms ({busy * 1e3:.1f} of processor "
            f"time), worst {worst:.1f} ms"
        )


def measure_throughput(path: str, images: int, rounds: int, folder: Path) -> None:
    """Prints the processor time of an image in both orders, and the ratio of interleaved pairs."""

    def module(**changes: Any) -> ShardDataModule:
        config = DataConfig.model_validate({"path": path, "workers": 0, **changes})
        return ShardDataModule(config, image_size=(224, 224), channels=3, seed=0, global_batch=BATCH, micro_batch=BATCH)

    everything = module()
    write_table(folder / "table.npy", everything.train_index, len(everything.train_index))
    chosen = module(sampling=str(folder / "table.npy"), rule=RULE)
    pairs = [[_processor_seconds(data, round_, images) for data in (everything, chosen)] for round_ in range(rounds)]
    ratios = [without / by_table for without, by_table in pairs]
    each = [statistics.median(column) * 1e6 for column in zip(*pairs, strict=True)]
    print(f"loading {images:,} images: {each[0]:,.0f} µs of processor time each of all, {each[1]:,.0f} of the chosen")
    ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {rounds} interleaved pairs)"
    print(f"throughput of the chosen over that of all: {ratio}")


def _processor_seconds(data: ShardDataModule, epoch: int, images: int) -> float:
    """Returns the processor time for each of the first images of an epoch."""
    step: Callable[[], int] = lambda: epoch * data.steps_per_epoch  # noqa: E731
    start, loaded = time.process_time(), 0
    while loaded < images:
        for batch in data.train_loader(step):
            loaded += len(batch["positions"])
            if loaded >= images:
                break
    return (time.process_time() - start) / loaded


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="shards to load from")
    parser.add_argument("--shards", type=int, default=11_000)
    parser.add_argument("--samples", type=int, default=1_000, help="in each shard")
    parser.add_argument("--images", type=int, default=1_024, help="loaded in each round")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(words)
    torch.set_num_threads(1)  # as the loader's workers do
    with tempfile.TemporaryDirectory() as folder:
        if given.path is None:
            builtin.ensure("digits", folder)
        measure_seeks(given.shards, given.samples, Path(folder))
        path = given.path or f"{folder}/built_in/digits"
        measure_throughput(path, given.images, given.rounds, Path(folder))


if __name__ == "__main__":
    main()
