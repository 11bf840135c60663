"""Division of a source into the parts train, val and test: --val, --test, --val-per-class, --group-by.

1 group  of an image: its folder, or what a column of the list says; without --group-by each image is its own
2 place  of a group in [0, 1): a hash of its name, or of the key of an image alone
3 part   val below --val, test from 1 - --test on, else train

So an image never changes its part when others are added, on any machine and with any seed. --val-per-class takes the
lowest places of each class instead, which new images may be among.
"""

import hashlib
import posixpath
from collections import Counter
from unicodedata import normalize

import numpy as np

from data.errors import DataError
from data.index.classes import some
from data.pack.plan import PackPlan
from data.pack.sample import Sample, Samples

SPLITS = ("train", "val", "test")
FOLDER = "folder"  # of --group-by: the folder of an image


def divide(samples: Samples, plan: PackPlan) -> tuple[np.ndarray, str]:
    """Returns the number in SPLITS of the part of each sample, uint8 [samples], and a note on the classes.

    Raises DataError if a part would have no image, or a class too few.
    """
    places, labels = np.empty(len(samples)), np.full(len(samples), -1)
    for number, sample in enumerate(samples):
        places[number] = place(group_of(sample, plan.group_by))
        labels[number] = _label(sample, read_files=bool(plan.val_per_class))
    splits = np.zeros(len(samples), np.uint8)
    splits[places >= 1 - (plan.test or 0)] = SPLITS.index("test")
    if plan.val_per_class:
        splits[_lowest_of_each_class(places, labels, splits, plan)] = SPLITS.index("val")
    else:
        splits[places < (plan.val or 0)] = SPLITS.index("val")
    _refuse_empty(splits, places, plan)
    return splits, _remark(splits, labels, plan)


def wanted(plan: PackPlan) -> list[str]:
    """Returns the splits that the options of a plan ask for, [] if the source stays whole."""
    asked = (True, plan.val or plan.val_per_class, plan.test)
    return [split for split, value in zip(SPLITS, asked, strict=True) if value] if any(asked[1:]) else []


def group_of(sample: Sample, group_by: str | None) -> str:
    """Returns what an image shares with those that have to be in the same part: its key if nothing."""
    if group_by is None:
        return sample.key
    return sample.group if sample.group is not None else posixpath.dirname(sample.key)


def place(group: str) -> float:
    """Returns a hash in [0, 1) of a name, the same whether its accents are composed (Linux) or not (macOS)."""
    name = normalize("NFC", group).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=6, person=b"split").digest(), "little") / 2**48


def _label(sample: Sample, read_files: bool) -> int:
    if sample.label is not None or not read_files:
        return -1 if sample.label is None else sample.label
    texts = [read() for extension, read in sample.others if extension.lower() == "cls"]
    return int(texts[0]) if texts and texts[0].strip().isdigit() else -1


def _lowest_of_each_class(places: np.ndarray, labels: np.ndarray, splits: np.ndarray, plan: PackPlan) -> np.ndarray:
    """Returns the numbers of the images for val. Raises DataError if one has no label, or a class has too few."""
    count = plan.val_per_class or 0
    if missing := int((labels < 0).sum()):
        raise DataError(
            f"--val-per-class {count} needs the class of each image, and {missing:,} of {len(labels):,} have none. "
            "Use --val with a share, such as --val 0.05."
        )
    chosen = []
    for label in np.unique(labels).tolist():
        mine = np.flatnonzero((labels == label) & (splits == 0))
        if len(mine) <= count:
            name = plan.classes[label] if label < len(plan.classes) else str(label)
            raise DataError(
                f"--val-per-class {count} would leave no image of the class {name} for training: it has {len(mine)}. "
                f"Use at most {max(len(mine) - 1, 0)}, or --val with a share."
            )
        chosen.append(mine[np.argsort(places[mine], kind="stable")[:count]])
    return np.concatenate(chosen)


def _refuse_empty(splits: np.ndarray, places: np.ndarray, plan: PackPlan) -> None:
    counts = np.bincount(splits, minlength=len(SPLITS))
    for split in wanted(plan):
        if not counts[SPLITS.index(split)]:
            groups = f" in {len(np.unique(places)):,} groups (--group-by {plan.group_by})" if plan.group_by else ""
            raise DataError(
                f"the part {split} would have none of the {len(splits):,} images{groups}: a hash decides for each, and "
                "so few may all fall on one side. Use another share"
                + (", another --group-by, " if plan.group_by else ", ")
                + "or pack each part from a folder of its own."
            )


def _remark(splits: np.ndarray, labels: np.ndarray, plan: PackPlan) -> str:
    """Says which classes have images in val or test and none in train, "" if there is none."""
    held_out = np.setdiff1d(labels[splits > 0], labels[splits == 0])
    unseen = [plan.classes[label] if label < len(plan.classes) else str(label) for label in held_out if label >= 0]
    if not unseen:
        return ""
    why = ", since groups stay whole" if plan.group_by else ""
    return f"{len(unseen)} of {len(np.unique(labels[labels >= 0]))} classes have no image in train{why}: {some(unseen)}"


def count_splits(splits: np.ndarray, plan: PackPlan) -> dict[str, int]:
    """Returns the number of images of each part that is wanted."""
    counts = Counter(splits.tolist())
    return {split: counts[SPLITS.index(split)] for split in wanted(plan)}
