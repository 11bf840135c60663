"""data.mode=stream: training images that cannot be indexed, such as the output of a command, through webdataset.

The batches look like those of data/loader/dataset.py; what their order does not promise is said by `CAVEAT`.
"""

import hashlib
import sys
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any, NoReturn

import numpy as np
import torch
from braceexpand import braceexpand
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.compat import WebDataset
from webdataset.gopen import gopen_pipe, gopen_schemes
from webdataset.shardlists import split_by_worker

from data.errors import DataError, say
from data.images.crops import DRAWS
from data.images.decode import LOST_BITS, has_16_bits
from data.index.index import ShardIndex
from data.index.passed_over import PassedOver
from data.index.samples import find_image, parse_label
from data.index.splits import Paths, find_shards, to_list
from data.loader.dataset import Batch, ShardDataset
from data.loader.loader import init_worker
from data.order.hashing import uniforms
from data.order.samplers import MicroBatches
from data.storage.credentials import hide, reveal
from data.storage.protocols import HTTP, PROTOCOLS, file_system

CAVEAT = (
    "data.mode=stream: a resumed run sees other images, an epoch may repeat some and leave out others, and the order "
    "depends on the number of ranks and workers."
)
SHUFFLE_BUFFER = 1000  # samples from which the next one is drawn
MAX_WITHOUT = 10_000  # samples without an image, after which there will be none


class StreamShards(ShardIndex):
    """Stands in for the index of shards that have none: their names, and the samples of an epoch as set."""

    def __init__(self, paths: Paths, samples: int, image: str | None = None, maps: Collection[str] = ()):
        commands = [path for path in to_list(paths) if path.startswith("pipe:")]
        files = [path for path in to_list(paths) if not path.startswith("pipe:")]
        self.shards = [command for path in commands for command in braceexpand(path)]
        self.shards += find_shards(files, "train") if files else []
        self.image, self.maps, self.passed_over = image, maps, PassedOver()
        self.sizes = np.array([samples])
        self.ends = [samples]
        self.fingerprint = hashlib.sha256("\n".join(["stream", *map(reveal, self.shards)]).encode()).hexdigest()
        self.classes: int | None = None  # labels have to be below; None: none are wanted
        say(CAVEAT)

    def without_downloads(self) -> ShardIndex:
        return self

    def _record(self, sample: int) -> NoReturn:
        raise DataError(
            "single samples cannot be read in data.mode=stream. Set data.val_path to shards that can be indexed, or "
            "data.mode=index with data.path."
        )


class StreamLoader(DataLoader[Batch]):
    """torch's DataLoader over StreamBatches, which it tells the present step whenever an iteration starts."""

    def __init__(self, dataset: ShardDataset, micro_batches: MicroBatches, workers: int):
        self.present_step = micro_batches.step
        super().__init__(
            StreamBatches(dataset, micro_batches),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=init_worker,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self):
        assert isinstance(self.dataset, StreamBatches)
        self.dataset.step = self.present_step()
        return super().__iter__()


class StreamBatches(IterableDataset[Batch]):
    """The micro-batches of one rank, from step `step` to the end of its epoch."""

    def __init__(self, dataset: ShardDataset, micro_batches: MicroBatches):
        self.dataset, self.rank, self.ranks = dataset, micro_batches.rank, micro_batches.ranks
        self.steps_per_epoch, self.accumulate = micro_batches.steps_per_epoch, micro_batches.accumulate
        self.global_batch, self.rows, self.step = micro_batches.global_batch, micro_batches.rows, 0

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, step = divmod(self.step, self.steps_per_epoch)
        index = self.dataset.index
        assert isinstance(index, StreamShards)
        shards, few = index.shards, len(index.shards) < self.ranks * workers
        samples = _samples(shards if few else shards[self.rank :: self.ranks], index.image, index.maps, resampled=few)
        # The loader takes a batch from each worker in turn.
        for number in range(step * self.accumulate + worker, self.steps_per_epoch * self.accumulate, workers):
            step, part = divmod(number, self.accumulate)
            first, last = self.rows[part : part + 2]
            yield _batch(self.dataset, list(islice(samples, last - first)), epoch, step * self.global_batch + first)


def first_samples(dataset: ShardDataset, count: int) -> Batch:
    """Returns the first samples of the shards: always the same ones."""
    index = dataset.index
    assert isinstance(index, StreamShards)
    return _batch(dataset, list(islice(_samples(index.shards, index.image, index.maps, shuffled=False), count)), 0, 0)


def _samples(
    shards: list[str], image: str | None, maps: Collection[str] = (), *, resampled: bool = False, shuffled: bool = True
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields webdataset's samples, and their images, without end.

    resampled  each worker draws from all shards, too few to be split
    """
    gopen_schemes.update(dict.fromkeys(PROTOCOLS, _open))  # webdataset would call programs that need not be installed.
    gopen_schemes["pipe"] = _open_pipe
    samples: Any = WebDataset(
        shards,
        resampled=resampled,
        shardshuffle=100 if shuffled and not resampled else False,
        nodesplitter=None,  # The caller has split them by rank.
        workersplitter=None if resampled else split_by_worker,
        handler=_refuse,
    )
    if shuffled:
        samples = samples.shuffle(SHUFFLE_BUFFER)
    found, without = False, 0  # whether there was an image; samples without one
    for sample in samples.repeat():
        try:
            data = find_image({name: member for name, member in sample.items() if name not in maps}, image)
        except DataError as error:
            raise DataError(f"{_name(sample)}: {error}") from None
        if data is not None:
            found = True
            yield sample, data
            continue
        if not without:
            print(f"passed over: {_name(sample)} has no {image or 'image'}; others are not named", file=sys.stderr)
        without += 1
        if without == MAX_WITHOUT and not found:
            raise DataError(
                f"none of {without:,} samples has an image{f' that ends in .{image}' if image else ''}; the last is "
                f"{_name(sample)}. Check data.path{' and data.image' if image else ''}."
            )


def _name(sample: dict[str, Any]) -> str:
    return f"{sample['__url__']}, sample {sample['__key__']}"


def _open(url: str, *_):
    system = file_system(url)
    if PROTOCOLS[url.partition("://")[0]] is HTTP:
        return system.open(reveal(url), "rb", block_size=0)  # As one stream, which every server can send.
    return system.open(reveal(url), "rb")


def _open_pipe(command: str, *arguments: Any, **named: Any):
    return gopen_pipe(reveal(command), *arguments, **named)


def _refuse(error: Exception) -> NoReturn:
    """Handles webdataset's errors: raises DataError that says what happened where."""
    where = error.args[-1] if error.args else None
    if not isinstance(where, str) or len(error.args) < 3:
        raise error  # webdataset then appends the open file and its name to the arguments, and calls this again.
    if isinstance(error, DataError):
        raise DataError(error.args[0]) from None
    reason = hide(str(error.args[0]).partition(" @ <")[0])
    raise DataError(f"{where} cannot be streamed: {reason}. Check the command or URL, and what it sends.") from None


def _batch(dataset: ShardDataset, samples: list[tuple[dict[str, Any], bytes]], epoch: int, start: int) -> Batch:
    """Decodes the samples that stand at the positions from `start` on."""
    positions = np.arange(start, start + len(samples))
    drawn = [None] * len(samples) if dataset.seed is None else uniforms(dataset.seed, epoch, positions, DRAWS).tolist()
    images, boxes = dataset.empty_images(len(samples)), []
    labels = [_label(dataset.index, sample) for sample, _ in samples]
    for row, ((sample, data), u) in enumerate(zip(samples, drawn, strict=True)):
        try:
            boxes += dataset.decode_views(images[row : row + 1], data, u and [u])
            if epoch == start == row == 0 and dataset.spec.bits == 8 and has_16_bits(data):
                print(f"{_name(sample)}, {LOST_BITS}", file=sys.stderr)
        except DataError as error:
            raise DataError(f"{_name(sample)}: {error}. Pack the images again.") from None
    return {
        "images": images,
        "labels": torch.tensor(labels),
        "positions": torch.from_numpy(positions),
        "samples": torch.full((len(samples),), -1),  # They have no numbers.
        "boxes": torch.tensor(boxes, dtype=torch.int32),
        "keys": [sample["__key__"] for sample, _ in samples],
    }


def _label(index: ShardIndex, sample: dict[str, Any]) -> int:
    """Returns the class of a sample, -1 if there is none. Raises DataError if one is wanted."""
    text = sample.get("cls", b"")
    label, classes = parse_label(text), index.classes if isinstance(index, StreamShards) else None
    if classes is not None and not 0 <= label < classes:
        said = f"holds {text[:20].decode('utf-8', 'backslashreplace')!r}" if text else "is missing"
        raise DataError(f"{_name(sample)}: its .cls {said}, and task.classes={classes} wants a number below {classes}.")
    return label
