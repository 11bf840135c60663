"""Sample table: what is known of each sample of some shards, as `data.sampling` reads it. A .npy of ROW.

`eval.py probe=losses` writes size, entropy and loss, `python -m data.inspect --duplicates --table` size and group.

1 open  map the file into memory, and find the rows of each shard in it
2 rule  rows of a shard → probabilities of its samples, for data/order/choice.py
"""

import itertools
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from data.atomic import replace_file
from data.errors import DataError
from data.index.index import ShardIndex

# Digest of the shard (ShardIndex.digests) and number of the sample in it; pixels of the upright image's shorter side, 0
# if it could not be read; colour entropy in bits (data/images/entropy.py) and loss, NaN if unknown; row of the largest
# of its near-duplicates, which may be itself.
ROW = np.dtype(
    [("shard", "<u8"), ("sample", "<u4"), ("size", "<u4"), ("entropy", "<f4"), ("loss", "<f4"), ("group", "<i8")]
)
NOT_LOOKED_AT, UNREADABLE = -1, -2  # in the place of a group
HOW = "Write one with `python eval.py checkpoint=RUN probe=losses`"


class Rule(Protocol):
    """Which samples are chosen, and how often; see SamplingRule in data/config.py."""

    @property
    def min_size(self) -> int | None: ...
    @property
    def min_entropy(self) -> float | None: ...
    @property
    def probability(self) -> str | None: ...
    @property
    def unique(self) -> bool: ...


class SampleTable:
    """The rows of the shards of an index in a table, which may have more, in any order.

    path  of the .npy
    rows  all of them, mapped into memory

    Raises DataError if the file is no such table, or lacks a shard of the index.
    """

    def __init__(self, path: str | Path, index: ShardIndex):
        self.path, self.index = path, index
        self.rows = read_rows(path)
        begins = np.flatnonzero(self.rows["sample"] == 0)
        ranges = itertools.pairwise([*begins.tolist(), len(self.rows)])
        places = dict(zip(self.rows["shard"][begins].tolist(), ranges, strict=True))
        found = [places.get(digest, (0, 0)) for digest in index.digests.tolist()]
        self.starts = [start for start, _ in found]
        wrong = [shard for shard, (start, stop) in enumerate(found) if stop - start != index.sizes[shard]]
        wrong = wrong or [shard for shard in self._shards if not self._is_whole(shard)]
        if wrong:
            others = f" and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
            raise DataError(
                f"{path} does not match the shards: it has no rows for {index.shards[wrong[0]]} of "
                f"{index.sizes[wrong[0]]:,} samples as it is now{others}. Give only the shards that it was written of. "
                f"{HOW} for others."
            )

    @property
    def _shards(self) -> range:
        return range(len(self.starts))

    def of(self, shard: int) -> np.ndarray:
        """Returns the rows of a shard, [samples] of ROW, in the order of its samples."""
        return self.rows[self.starts[shard] : self.starts[shard] + int(self.index.sizes[shard])]

    def probabilities(self, shard: int, rule: Rule, one: int) -> np.ndarray:
        """Returns with which probability each sample of a shard is shown in an epoch, [samples] int64 in 0 … one.

        one  stands for the probability 1; a power of 2, so that the product with a loss is exact
        """
        rows = self.of(shard)
        kept = np.ones(len(rows), bool)
        if rule.min_size is not None:
            kept &= rows["size"] >= rule.min_size
        if rule.min_entropy is not None:
            kept &= rows["entropy"] >= rule.min_entropy
        if rule.unique:
            kept &= rows["group"] == np.arange(self.starts[shard], self.starts[shard] + len(rows))
        if rule.probability is None:
            return np.where(kept, one, 0)
        losses = np.nan_to_num(rows["loss"].astype(np.float64), nan=0.0).clip(0, 1)
        return np.where(kept, (losses * one).astype(np.int64), 0)

    def refuse_unknown(self, rule: Rule) -> None:
        """Raises DataError if a rule asks for what the table does not hold of an image that can be read."""
        losses = "run `python eval.py checkpoint=RUN probe=losses` on these shards"
        groups = f"run `python -m data.inspect SHARDS --duplicates --table {self.path}`"
        asked = [
            ("min_entropy", rule.min_entropy, "entropies", losses, lambda rows: ~np.isfinite(rows["entropy"])),
            ("probability", rule.probability, "losses", losses, lambda rows: ~np.isfinite(rows["loss"])),
            ("unique", rule.unique, "near-duplicates", groups, lambda rows: rows["group"] == NOT_LOOKED_AT),
        ]
        for name, value, what, way, is_unknown in asked:
            if value and any((is_unknown(rows) & (rows["size"] > 0)).any() for rows in map(self.of, self._shards)):
                raise DataError(
                    f"data.rule.{name}={str(value).lower()}, but {self.path} does not know the {what} of all images: "
                    f"{way}, or leave the rule out."
                )

    def _is_whole(self, shard: int) -> bool:
        rows = self.of(shard)
        in_order = (rows["sample"] == np.arange(len(rows))).all()
        return bool(in_order and (rows["shard"] == self.index.digests[shard]).all())


def read_rows(path: str | Path) -> np.ndarray:
    """Maps the rows of a table into memory, read only. Raises DataError if the file is none."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"data.sampling={path} cannot be read: {error.strerror or error}. {HOW}.") from None
    except (ValueError, EOFError):
        raise DataError(f"data.sampling={path} is no table of samples. {HOW}.") from None
    if not isinstance(rows, np.ndarray) or rows.dtype != ROW or rows.ndim != 1:
        raise DataError(f"data.sampling={path} is no table of samples: its columns are others. {HOW}.")
    return np.asarray(rows)  # still mapped; a subclass of arrays would slow down every use


def new_rows(index: ShardIndex, samples: np.ndarray) -> np.ndarray:
    """Returns rows for these sample numbers, [n] of ROW, of which nothing is known yet."""
    ends = np.array(index.ends)
    shards = np.searchsorted(ends, samples, side="right")
    rows = np.zeros(len(samples), ROW)
    rows["shard"], rows["sample"] = index.digests[shards], samples - (ends - index.sizes)[shards]
    rows["entropy"] = rows["loss"] = np.nan
    rows["group"] = NOT_LOOKED_AT
    return rows


def write_rows(path: str | Path, rows: np.ndarray) -> None:
    """Writes a table; whole or not at all. Makes its folder."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with replace_file(path) as file:
        np.save(file, rows)


def keep_groups(old: np.ndarray, new: np.ndarray) -> None:
    """Takes over the groups of near-duplicates into a table of the same samples that replaces an old one."""
    if all(np.array_equal(old[name], new[name]) for name in ("shard", "sample")):
        new["group"] = old["group"]
