"""Names of classes: manifest.json beside shards lists them, and label k means the k-th name.

1 read     the list of each folder in which shards lie
2 compare  lists agree if no label has two names: they are equal, or one is the beginning of the other
3 remark   on what no list can tell: labels of one part that the other lacks
"""

from collections.abc import Iterable
from shlex import quote
from typing import Any, cast
from unicodedata import normalize

import numpy as np

from data.errors import DataError
from data.index.index import ShardIndex
from data.storage.listing import Folder
from data.storage.protocols import is_remote, split_path

MAX_NAMED = 5  # classes in an error


def class_names(shards: Iterable[str]) -> list[str]:
    """Returns the names of the classes of shards: the longest list of their folders, [] if no folder has one.

    Raises DataError if two folders number their classes differently, or a manifest.json has them in an unknown form.
    """
    lists = class_lists(shards)
    longest = max(lists, key=lambda folder: len(lists[folder]), default="")
    for folder, names in lists.items():
        if different := differing_label(lists[longest], names):
            label, *both = different
            raise DataError(
                f"{longest} and {folder} number their classes differently: label {label} is {both[0]!r} in the one and "
                f"{both[1]!r} in the other. {_way_to_agree(longest, lists[longest], folder, names)}"
            )
    return lists.get(longest, [])


def read_classes(shards: Iterable[str]) -> tuple[list[str], str]:
    """Returns what `class_names` does, and ""; or [], and the sentence that it would raise."""
    try:
        return class_names(shards), ""
    except DataError as error:
        return [], str(error)


def remarks_on_labels(train: ShardIndex, val: ShardIndex | None = None) -> list[str]:
    """Returns a sentence for each thing about the labels of the parts that may not be meant."""
    shards = [shard for index in (train, val) if index is not None for shard in index.shards]
    names, seen = class_names(shards), np.unique(train.labels)
    seen = seen[seen >= 0]
    if not len(seen):
        return []
    classes = np.arange(max(len(names), seen[-1] + 1))

    def describe(labels: np.ndarray) -> str:
        return some([names[label] if label < len(names) else str(label) for label in labels.tolist()])

    remarks = []
    if len(absent := np.setdiff1d(classes, seen)):
        remarks.append(f"no training image is of {len(absent):,} of the {len(classes):,} classes: {describe(absent)}")
    if val is None:
        return remarks
    labels = val.labels
    validated = np.unique(labels[labels >= 0])
    if len(unseen := np.setdiff1d(validated, seen)):
        count = int(np.isin(labels, unseen).sum())
        remarks.append(
            f"{count:,} of {len(labels):,} validation images are of classes without a training image, and count as "
            f"wrong: {describe(unseen)}"
        )
    unnamed = sorted({_folder(shard) for shard in shards} - class_lists(shards).keys())
    # Whoever numbers the classes of a part that lacks some gives them the first numbers.
    if unnamed and 0 < len(validated) < len(seen) and validated[-1] == len(validated) - 1:
        remarks.append(
            f"the validation images have the labels 0 … {validated[-1]} and the training images 0 … {seen[-1]}, and no "
            f"manifest.json in {some(unnamed)} names the classes: if they were numbered without the missing ones, "
            "their labels mean other classes"
        )
    return remarks


def class_lists(shards: Iterable[str]) -> dict[str, list[str]]:
    """Returns folder -> names of its classes, for each folder of shards whose manifest names any."""
    folders = dict.fromkeys(_folder(shard) for shard in shards if not shard.startswith("pipe:"))
    lists = {folder: names_in(Folder(folder)) for folder in folders}
    return {folder: names for folder, names in lists.items() if names}


def _folder(shard: str) -> str:
    return split_path(shard)[0] or "."


def names_in(folder: Folder, manifest: dict[str, Any] | None = None) -> list[str]:
    """Returns the names of the classes by label in the manifest of a folder, or in this part of it; [] if it has none.

    `classes` is a list of names, {name: label} or {label: name}. Raises DataError if it is something else.
    """
    found: Any = ((folder.manifest() or {}) if manifest is None else manifest).get("classes")
    if found is None or isinstance(found, int):  # their number says nothing about them
        return []
    if isinstance(found, dict):
        swapped = all(isinstance(label, int) for label in found.values())
        by_label = {str(label): name for name, label in found.items()} if swapped else found
        found = cast(Any, [by_label.get(str(label)) for label in range(len(found))])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(
            f"{folder.file('manifest.json')} has `classes` in a form that is not known. Make it the list of their "
            "names in the order of the labels, or remove it."
        )
    return [same_name(name) for name in found]


def differing_label(first: list[str], second: list[str]) -> tuple[int, str, str] | None:
    """Returns the first label that has two names, and these; None if the lists agree."""
    pairs = enumerate(zip(first, second, strict=False))
    return next(((label, one, other) for label, (one, other) in pairs if one != other), None)


def same_name(name: str) -> str:
    """Returns a name in the one form that all computers agree on and can print: some write ö as two characters."""
    return normalize("NFC", name).encode("utf-8", "backslashreplace").decode()


def _way_to_agree(one: str, first: list[str], other: str, second: list[str]) -> str:
    """Returns what lacks in which folder, and the command that gives both the same numbers."""
    missing = [name for name in first if name not in second]
    extra = [name for name in second if name not in first]
    if missing and extra:
        return (
            f"{other} lacks {some(missing)}, and {one} lacks {some(extra)}. Write the names of all classes into a "
            f"text file, one per line, and pack both anew (`python -m data.pack {quote(one)} NEW --classes FILE`), or "
            "read only one of them."
        )
    if extra:
        one, other, missing = other, one, extra
    lacks = f"{other} lacks {some(missing)}. " if missing else "They have the same names in another order. "
    new = "NEW" if is_remote(other) else f"{other}-renumbered"
    return (
        f"{lacks}Pack {other} with the numbers of {one}: `python -m data.pack {quote(other)} {quote(new)} "
        f"--classes {quote(one)}`, and name {new} in its place (data.path, data.val_path)."
    )


def some(names: list[str]) -> str:
    """Returns the first few names, and how many more there are."""
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
