"""Quality of shuffling within windows of shards: python benchmarks/shuffle.py

A data set of ImageNet's size, shuffled as by `data.pack` or, as the worst case, class by class. For windows of 1, 4,
16, 64 and all shards: label entropy of a batch of 256, and median distance in the packed order between neighbours in
the epoch, both relative to a fully random order.
"""

import numpy as np

from data.order.hashing import PACK, key, permutation
from data.order.order import Order

SAMPLES, CLASSES, SHARD, BATCH, BATCHES = 1_281_167, 1000, 1000, 256, 200


def entropy(labels: np.ndarray) -> float:
    """Returns the label entropy in bits, mean over batches [n, BATCH]."""
    counts = np.stack([np.bincount(batch, minlength=CLASSES) for batch in labels]) / labels.shape[1]
    return float(-(counts * np.log2(counts, where=counts > 0, out=np.zeros_like(counts))).sum(1).mean())


def main() -> None:
    by_class = np.arange(SAMPLES) * CLASSES // SAMPLES
    packed = {"shuffled": by_class[permutation(key(0, PACK), np.arange(SAMPLES))], "by class": by_class}
    sizes = np.diff(np.append(np.arange(0, SAMPLES, SHARD), SAMPLES))
    steps = np.linspace(0, SAMPLES // BATCH - 1, BATCHES).astype(int)
    noise = np.random.default_rng(0)
    random = entropy(noise.choice(by_class, (BATCHES, BATCH)))
    far = np.median(np.abs(np.diff(noise.permutation(SAMPLES))))
    for window in (1, 4, 16, 64, len(sizes)):
        order = Order(sizes, seed=0, window=window)
        samples = np.stack([order.samples(0, step * BATCH, (step + 1) * BATCH) for step in steps])
        distance = np.median(np.abs(np.diff(samples, axis=1))) / far
        found = ", ".join(f"{name} {entropy(labels[samples]) / random:.3f}" for name, labels in packed.items())
        print(f"window {window:4}: entropy of a batch, {found}; distance of neighbours {distance:.4f}")


if __name__ == "__main__":
    main()
