"""Statistics of the samples of an index: counts, formats, sizes, colours, faults and duplicates."""

import contextlib
import itertools
import os
import sys
from collections import Counter
from typing import Any

import numpy as np

from data.index.index import ShardIndex
from data.inspect.survey import CHUNK, Survey, chunks, examine
from data.order.samplers import spread
from data.parallel import bar, run

MAX_READ, MAX_DECODED = 5000, 500  # samples without deep=True


def inspect(index: ShardIndex, *, deep: bool = False, jobs: int = 1) -> dict[str, Any]:
    """Returns all statistics as plain numbers, ready for JSON. deep: reads and decodes every sample."""
    samples = np.arange(len(index)) if deep else spread(len(index), MAX_READ)
    decoded = samples if deep else spread(len(index), MAX_DECODED)
    if not deep:
        samples = np.union1d(samples, decoded)
    survey = Survey()
    jobs = max(1, min(jobs, len(samples) // CHUNK))
    with (
        bar("decoding" if deep else "reading", len(samples)) as shown,
        contextlib.closing(run(examine, chunks(index, samples, decoded), jobs, shown.advance)) as answers,
    ):
        for finding in itertools.chain.from_iterable(answers):
            survey.add(finding)
    colours = survey.colours()
    sizes = {"smallest": survey.smallest, "largest": survey.largest}
    return {
        "shards": len(index.shards),
        "samples": len(index),
        "bytes": sum(os.path.getsize(shard) for shard in index.shards),
        **_count_labels(index),
        "fingerprint": index.fingerprint,
        "deep": deep,
        "read": survey.read,
        "decoded": survey.decoded,
        "formats": dict(survey.forms.most_common()),
        "modes": dict(survey.modes.most_common()),
        "shorter_sides": _histogram(survey.sides),
        "median_shorter_side": survey.median_side() if survey.sides else None,
        **{name: [header.height, header.width] if header else None for name, header in sizes.items()},
        "mean": colours[0] if colours else None,
        "std": colours[1] if colours else None,
        "corrupt": [{**_place(index, sample), "reason": reason} for sample, reason in sorted(survey.faults)],
        "duplicates": [[_place(index, sample) for sample in group] for group in survey.duplicates()],
    }


def _count_labels(index: ShardIndex) -> dict[str, Any]:
    """Returns the number of samples of each label, and of those without, and the bytes of all images."""
    labels: Counter[int] = Counter()
    size = 0
    for shard in range(len(index.shards)):
        table = index.table(shard)
        labels.update(dict(zip(*(part.tolist() for part in np.unique(table[:, 3], return_counts=True)), strict=True)))
        size += int(table[:, 1].sum())
    unlabelled = labels.pop(-1, 0)
    return {"labels": dict(sorted(labels.items())), "unlabelled": unlabelled, "image_bytes": size}


def _place(index: ShardIndex, sample: int) -> dict[str, str]:
    return {"shard": index.shards[index.shard_of(sample)], "key": index.key(sample)}


def _histogram(sides: dict[int, int]) -> dict[str, int]:
    """Returns the numbers of images by their shorter side, without empty intervals at the ends."""
    first, *_, last = edges = [32, 64, 128, 224, 256, 384, 512, 768, 1024, 1536, 2048]
    names = [f"below {first}", *(f"{a} to {b - 1}" for a, b in itertools.pairwise(edges)), f"from {last}"]
    bounds, weights = [0, *edges, sys.maxsize], list(sides.values())
    counts = np.histogram(list(sides), bounds, weights=weights)[0].astype(int).tolist()
    filled = [number for number, count in enumerate(counts) if count]
    return {names[i]: counts[i] for i in range(filled[0], filled[-1] + 1)} if filled else {}
