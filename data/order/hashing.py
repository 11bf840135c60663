"""Counter-based random numbers (SplitMix64): a pure function of (seed, purpose, epoch, position).

There is no generator state to save. numpy may change its generators from one version to the next, but not the
arithmetic of integers.
"""

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: the increment of SplitMix64
# Purposes; each has its own stream of numbers.
SHARDS, SAMPLES, AUGMENT, PACK, MIX, REPLACE, CHOICE = 1, 2, 3, 4, 5, 6, 7


def mix(x: np.ndarray) -> np.ndarray:
    """Applies the output function of SplitMix64 (Steele, Lea, Flood 2014), a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*words: int) -> np.ndarray:
    """Hashes a sequence of integers to uint64 [1]."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = mix(state ^ np.array([(word + GOLDEN) & MASK], np.uint64)) + np.uint64(GOLDEN)
    return state


def hashes(stream: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Returns the numbers at `indices` of the SplitMix64 sequences that start at `stream`; the two broadcast."""
    return mix(stream + (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))


def permutation(stream: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Sorts `indices` by their hashes. Equal hashes, for one pair in 2^64, keep their order."""
    return indices[np.argsort(hashes(stream, indices), kind="stable")]


def uniforms(seed: int, epoch: int, positions: np.ndarray, n: int) -> np.ndarray:
    """Draws the uniform numbers for the augmentation of the images at these positions of an epoch.

    positions  [B]     int64
    returns    [B, n]  float64 in [0, 1); a larger n only appends columns
    """
    streams = hashes(key(seed, AUGMENT, epoch), np.asarray(positions))
    return (hashes(streams[:, None], np.arange(n)) >> np.uint64(11)) * 2.0**-53
