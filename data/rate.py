"""Loading speed of a data set: what one core reads, crops and decodes in a second."""

import time

import numpy as np

from data.datamodule import ShardDataModule
from data.order.samplers import MicroBatch, spread
from data.storage.protocols import is_remote

ROWS = 4  # samples that are loaded between two looks at the clock
MOST = 4096  # samples


def loading_rate(data: ShardDataModule, seconds: float = 1.0) -> float | None:
    """Measures images per second of one core, on evenly spread training samples, for about so many seconds.

    Returns None for streams and remote shards, whose speed is that of the network.
    """
    index, views = data.train_index, data.config.views_per_image
    if data.config.mode == "stream" or any(map(is_remote, index.shards)):
        return None
    dataset = data.dataset(index, data.seed)
    samples = np.random.default_rng(0).permutation(spread(len(index), MOST))
    loaded, begun = 0, 0.0
    for number, start in enumerate(range(0, len(samples), ROWS)):
        if number == 1:  # The first samples load code and open files.
            begun = time.perf_counter()
        chosen = np.repeat(samples[start : start + ROWS], views)
        dataset[MicroBatch(0, np.arange(len(chosen)), chosen)]
        loaded += len(chosen) if number else 0
        if number and time.perf_counter() - begun > seconds:
            break
    return loaded / (time.perf_counter() - begun) if loaded else None
