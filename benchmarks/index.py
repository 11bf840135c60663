"""Index of 11 million samples in 11,000 shards, opening it and seeking in its order: python benchmarks/index.py

The shards are sparse files of the right size with real indexes, in a temporary folder (about 800 MB).
"""

import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from data.index import index_file
from data.index.index import ShardIndex
from data.order.order import Order

SHARDS, SAMPLES, SEEKS = 11_000, 1_000, 50
MEMBER_BYTES = 100_352  # of a sample in the sparse tar


def write_shard(folder: Path, number: int, records: list[index_file.Record], text: bytes) -> str:
    """Writes a sparse tar and its indexes, which are real."""
    tar = folder / f"fake-{number:06d}.tar"
    with open(tar, "wb") as file:
        file.truncate(SAMPLES * MEMBER_BYTES)
    state = tar.stat()
    notes = {"tables": {"jpg": [0, SAMPLES, None, None]}}
    binary = index_file.encode(state.st_size, state.st_mtime_ns, bytes(8), records, [], notes)
    tar.with_suffix(".idx").write_bytes(text)
    Path(f"{tar.with_suffix('.idx')}.bin").write_bytes(binary)
    return str(tar)


def main() -> None:
    text, starts = f"v1.2 {SAMPLES}\n", []
    for sample in range(SAMPLES):
        starts.append(len(text))
        text += f"jpg {sample * MEMBER_BYTES + 512} {MEMBER_BYTES - 1024} {sample:08d}.jpg\n"
    records = [(sample * MEMBER_BYTES + 512, MEMBER_BYTES - 1024, starts[sample], -1) for sample in range(SAMPLES)]
    with tempfile.TemporaryDirectory() as folder:
        tars = [write_shard(Path(folder), number, records, text.encode()) for number in range(SHARDS)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        index = ShardIndex([file for tar in tars if (file := index_file.load(tar))])
        print(f"{len(index):,} samples in {len(index.shards):,} shards opened in {time.perf_counter() - start:.2f} s")
        rng = np.random.default_rng(0)
        for sample in rng.integers(0, len(index), 20_000):
            index.locate(int(sample))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"memory added, 20,000 random look-ups included: {(after - before) / 1024:.0f} MB")
        order, times = Order(index.sizes, seed=0), []
        for epoch, position in enumerate(rng.integers(0, len(index) - 256, SEEKS)):
            start = time.perf_counter()
            order.samples(epoch, int(position), int(position) + 256)
            times.append(time.perf_counter() - start)
        median, worst = statistics.median(times) * 1e3, max(times) * 1e3
        print(f"seek to a position of a new epoch: median {median:.1f} ms, worst {worst:.1f} ms")


if __name__ == "__main__":
    main()
