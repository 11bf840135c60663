"""Counts, formats, sizes, colours, faults and duplicates of the samples of an index, as plain numbers."""

import contextlib
import itertools
import os
import sys
from typing import Any

import numpy as np

from data.index.index import ShardIndex
from data.inspect.survey import CHUNK, Survey, classes_of, look, looks
from data.order.samplers import spread
from data.parallel import bar, run

HEADERS, DECODED = 5000, 500
EDGES = (32, 64, 128, 224, 256, 384, 512, 768, 1024, 1536, 2048)


def inspect(index: ShardIndex, *, deep: bool = False, jobs: int = 1) -> dict[str, Any]:
    """All that is found out about the samples of an index, as plain numbers."""
    samples = np.arange(len(index)) if deep else spread(len(index), HEADERS)
    decoded = samples if deep else spread(len(index), DECODED)
    if not deep:
        samples = np.union1d(samples, decoded)
    survey = Survey()
    jobs = max(1, min(jobs, len(samples) // CHUNK))
    with (
        bar("decoding" if deep else "reading", len(samples)) as shown,
        contextlib.closing(run(look, looks(index, samples, decoded), jobs, shown.advance)) as answers,
    ):
        for answer in answers:
            for seen in answer:
                survey.add(seen)
    return _found(index, survey, deep)


def _found(index: ShardIndex, survey: Survey, deep: bool) -> dict[str, Any]:
    colours = survey.colours()
    sizes = {"smallest": survey.least, "largest": survey.most}
    faults = sorted(survey.faults)
    return {
        "shards": len(index.shards),
        "samples": len(index),
        "bytes": sum(os.path.getsize(shard) for shard in index.shards),
        **classes_of(index),
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
        "corrupt": [{**_place(index, sample), "reason": reason} for sample, reason in faults],
        "duplicates": [[_place(index, sample) for sample in group] for group in survey.duplicates()],
    }


def _place(index: ShardIndex, sample: int) -> dict[str, str]:
    return {"shard": index.shards[index.locate(sample)[0]], "key": index.key(sample)}


def _histogram(sides: dict[int, int]) -> dict[str, int]:
    """Numbers of images by their shorter side, without the empty ends."""
    bounds = [0, *EDGES, sys.maxsize]
    names = [f"below {EDGES[0]}", *(f"{a} to {b - 1}" for a, b in itertools.pairwise(EDGES)), f"from {EDGES[-1]}"]
    counts = np.histogram(list(sides), bounds, weights=list(sides.values()))[0].astype(int).tolist()
    filled = [number for number, count in enumerate(counts) if count]
    return {names[i]: counts[i] for i in range(filled[0], filled[-1] + 1)} if filled else {}
