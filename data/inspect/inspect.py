"""Statistics of the samples of an index: counts, formats, sizes, colours, constant images, faults, duplicates."""

import itertools
import sys
from typing import Any

import numpy as np

from data.index.classes import read_classes
from data.index.index import ShardIndex
from data.index.passed_over import PassedOver
from data.inspect.survey import CHUNK, Survey, chunks, examine
from data.order.samplers import spread
from data.parallel import run
from data.storage.listing import Folder
from data.storage.protocols import split_path

MAX_READ, MAX_DECODED = 5000, 500  # samples without deep=True


def inspect(index: ShardIndex, *, deep: bool = False, jobs: int = 1) -> dict[str, Any]:
    """Returns all statistics as plain numbers, ready for JSON. deep: reads and decodes every sample."""
    samples = np.arange(len(index)) if deep else spread(len(index), MAX_READ)
    decoded = samples if deep else spread(len(index), MAX_DECODED)
    if not deep:
        samples = np.union1d(samples, decoded)
    survey = Survey()
    jobs = max(1, min(jobs, len(samples) // CHUNK))
    what = "decoding" if deep else "reading"
    with run(examine, chunks(index, samples, decoded), jobs, what, len(samples)) as (answers, _):
        for finding in itertools.chain.from_iterable(answers):
            survey.add(finding)
    colours = survey.colours()
    labels = dict(zip(*(part.tolist() for part in np.unique(index.labels, return_counts=True)), strict=True))
    unlabelled = labels.pop(-1, 0)
    names, differing = read_classes(index.shards)
    sizes = {"smallest": survey.smallest, "largest": survey.largest}
    return {
        "shards": len(index.shards),
        "samples": len(index),
        "bytes": int(index.bytes.sum()),
        "labels": labels,
        "unlabelled": unlabelled,
        "classes": names,
        "classes_differ": differing,
        "passed_over": index.passed_over.to_json(),
        "not_packed": _not_packed(index).to_json(),
        "image_bytes": sum(int(index.table(shard)[:, 1].sum()) for shard in range(len(index.shards))),
        "fingerprint": index.fingerprint,
        "deep": deep,
        "read": survey.read,
        "decoded": survey.decoded,
        "formats": dict(survey.forms.most_common()),
        "modes": dict(survey.modes.most_common()),
        "shorter_sides": _histogram(survey.sides),
        "median_shorter_side": _median(survey.sides) if survey.sides else None,
        **{name: [header.height, header.width] if header else None for name, header in sizes.items()},
        "mean": colours[0] if colours else None,
        "std": colours[1] if colours else None,
        "ranges": {str(bits): list(found) for bits, found in sorted(survey.ranges.items())},
        "constant": [_place(index, sample) for sample in sorted(survey.constant)],
        "corrupt": [{**_place(index, sample), "reason": reason} for sample, reason in sorted(survey.faults)],
        "duplicates": [[_place(index, sample) for sample in group] for group in survey.duplicates()],
    }


def _not_packed(index: ShardIndex) -> PassedOver:
    """Returns what `data.pack` has passed over or could not read, by the manifests beside the shards."""
    passed_over = PassedOver()
    for folder in dict.fromkeys(split_path(shard)[0] or "." for shard in index.shards):
        manifest = Folder(folder).manifest() or {}
        passed_over.update(PassedOver.from_json(manifest.get("passed_over")))
        passed_over.add("unreadable images", *(entry["file"] for entry in manifest.get("bad", ())))
    return passed_over


def _place(index: ShardIndex, sample: int) -> dict[str, str]:
    return {"shard": index.shards[index.shard_of(sample)], "key": index.key(sample)}


def _median(sides: dict[int, int]) -> int:
    return int(np.quantile(list(sides), 0.5, weights=list(sides.values()), method="inverted_cdf"))


def _histogram(sides: dict[int, int]) -> dict[str, int]:
    """Returns the numbers of images by their shorter side, without empty intervals at the ends."""
    first, *_, last = edges = [32, 64, 128, 224, 256, 384, 512, 768, 1024, 1536, 2048]
    names = [f"below {first}", *(f"{a} to {b - 1}" for a, b in itertools.pairwise(edges)), f"from {last}"]
    bounds, weights = [0, *edges, sys.maxsize], list(sides.values())
    counts = np.histogram(list(sides), bounds, weights=weights)[0].astype(int).tolist()
    filled = [number for number, count in enumerate(counts) if count]
    return {names[i]: counts[i] for i in range(filled[0], filled[-1] + 1)} if filled else {}
