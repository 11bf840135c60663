"""Plan of a pack: everything that decides its bytes, and the folder from which an unfinished one is resumed.

OUT.partial/NAME-000000.tar …       with an index beside each; train/NAME-train-000000.tar … of a divided source
OUT.partial/.pack/plan.json         the plan
OUT.partial/.pack/NAME-000000.json  a record of each finished shard: without it the shard is not finished
OUT.partial/.pack/passed_over.json  what of the source is not packed
OUT.partial/.pack/lock, lock-I-N    held by a pack that works there, and by part I of N
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.progress import track

from data.atomic import replace_file
from data.errors import DataError
from data.index.classes import some
from data.order.hashing import PACK, key, permutation
from data.pack.sample import Sample, Samples
from data.storage.listing import Folder

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # of file systems that have none
WORK = ".pack"  # hidden folder in OUT.partial, of the plan and the records
DIVISION = ("val", "test", "val_per_class", "group_by")  # options of data/pack/divide.py
MAPS = ("label_maps", "depth_maps", "label_classes")  # of data/pack/label_maps.py
SETTINGS = ("name", "seed", "shard_size", "shorter_side", "quality", *DIVISION)  # set by options, such as --shard-size


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Shard k holds the samples k·S … (k+1)·S - 1 of a seeded permutation, except those that do not decode.

    So any process on any machine can write a shard by itself, with the same bytes. A source that is divided has shards
    of each split, cut from the permutation of its samples.
    """

    name: str
    seed: int
    shard_size: int  # S
    shorter_side: int | None  # pixels; images with a larger one are encoded anew
    quality: int | None  # of the JPEGs encoded anew
    samples: int
    classes: list[str]
    keys: str  # hash of the samples: keys, extensions, labels, side files, groups
    val: float | None = None
    test: float | None = None
    val_per_class: int | None = None
    group_by: str | None = None
    splits: dict[str, int] = dataclasses.field(default_factory=dict)  # samples of train, val, test; {}: not divided
    annotations: str | None = None  # SHA-256 of the file of --masks
    label_maps: list[str] = dataclasses.field(default_factory=list)  # of --label-maps: extension, hash
    depth_maps: list[str] = dataclasses.field(default_factory=list)  # the same of --depth-maps
    label_classes: list[str] = dataclasses.field(default_factory=list)  # names of the classes of label maps
    void: int | None = None  # number of no class in label maps

    @property
    def shards(self) -> list[str]:
        """Returns the tars: NAME-000000.tar …, or SPLIT/NAME-SPLIT-000000.tar … of each split."""
        stems = {f"{split}/{self.name}-{split}": count for split, count in self.splits.items()}
        counts = stems or {self.name: self.samples}
        return [f"{stem}-{k:06d}.tar" for stem, count in counts.items() for k in range(-(-count // self.shard_size))]

    def contents(self, split_of: np.ndarray | None) -> list[np.ndarray]:
        """Returns the numbers of the samples of each shard, in the order in which they are packed.

        split_of  [samples] number of the split of each sample; None if the source is not divided
        """
        order = permutation(key(self.seed, PACK), np.arange(self.samples))
        splits = [order] if split_of is None else [order[split_of[order] == number] for number in np.unique(split_of)]
        return [split[k : k + self.shard_size] for split in splits for k in range(0, len(split), self.shard_size)]

    @property
    def digest(self) -> str:
        fields = dataclasses.asdict(self)
        later = {*DIVISION, *MAPS, "splits", "annotations", "void"}  # than packs that may be unfinished
        known = {name: value for name, value in fields.items() if value or name not in later}
        known |= {} if self.void is None else {"void": self.void}  # which may be 0
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def partial_folder(out: Path) -> Path:
    """Returns the folder of a pack that is not complete."""
    return out.with_name(f"{out.name}.partial")


def replaced_folder(out: Path) -> Path:
    """Returns the folder of the data set that a new one is about to replace."""
    return out.with_name(f"{out.name}.replaced")


def check_out(out: Path, overwrite: bool) -> None:
    """Raises DataError if something lies at OUT that may not be replaced."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not overwrite:
            raise DataError(f"{out} exists already. Choose another place, or replace it with --overwrite.")
        _require_packed(out)
    if (old := replaced_folder(out)).exists():
        _require_packed(old)


def _require_packed(folder: Path) -> None:
    """Raises DataError if a folder holds anything that no pack has written."""
    parts = [path for path in folder.iterdir() if path.name != WORK] if folder.is_dir() else []
    if parts and all(part.is_dir() and "divided_by" in (Folder(str(part)).manifest() or {}) for part in parts):
        for part in parts:
            _require_packed(part)
        return
    manifest = Folder(str(folder)).manifest() if folder.is_dir() else None
    if manifest is None:
        raise DataError(f"{folder} is no packed data set (it has no manifest.json). Remove it yourself if it may go.")
    shards = [shard["file"].removesuffix(".tar") for shard in manifest.get("shards", ()) if isinstance(shard, dict)]
    ours = {f"{shard}{ending}" for shard in shards for ending in (".tar", ".idx", ".idx.bin")}
    if foreign := sorted({*os.listdir(folder)} - ours - {"manifest.json", "bad_files.txt", WORK}):
        raise DataError(f"{folder} holds {some(foreign)}, which no pack has written. Move that elsewhere.")


def hash_keys(samples: Samples) -> str:
    """Returns a hash of keys, extensions, labels, side files, groups. Raises DataError if two samples have one key."""
    digest = hashlib.sha256()
    short = array("Q")  # Takes 8 bytes a key; a set of the keys of SA-1B would take a gigabyte.
    quick = len(samples) < 100_000
    for sample in track(samples, "reading keys", len(samples), console=Console(stderr=True), disable=quick):
        fields = (sample.key, sample.extension, str(sample.label), *(extension for extension, _ in sample.others))
        if len({extension.lower() for extension, _ in sample.others}) < len(sample.others):
            raise DataError(
                f"{sample.origin} has two side files whose extensions differ in case or spaces alone. Rename one."
            )
        fields += (sample.group,) if sample.group is not None else ()
        digest.update("\0".join(fields).encode("utf-8", "surrogateescape") + b"\n")
        short.append(_short(sample))
    values, counts = np.unique(np.frombuffer(short, np.uint64), return_counts=True)
    if repeated := values[counts > 1].tolist():
        one, other = [sample for sample in samples if _short(sample) == repeated[0]][:2]
        raise DataError(
            f"{one.origin} and {other.origin} would both get the key {one.key}, and be read as one sample. "
            "Rename or remove one of them."
        )
    return digest.hexdigest()


def _short(sample: Sample) -> int:
    hashed = hashlib.blake2b(sample.key.encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(hashed.digest(), "little")


@contextlib.contextmanager
def hold(out: Path, part: tuple[int, int] | None = None) -> Iterator[None]:
    """Keeps other packs off OUT.partial, which it creates; parts of a pack keep off repetitions of themselves alone.

    Raises DataError if another pack works there, if the folder is none of a pack, or if it cannot be written.
    """
    folder = partial_folder(out)
    _refuse_foreign(folder)
    names = {"lock": fcntl.LOCK_SH, f"lock-{part[0]}-{part[1]}": fcntl.LOCK_EX} if part else {"lock": fcntl.LOCK_EX}
    try:
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            for name, kind in names.items():
                _lock(stack.enter_context(open(folder / WORK / name, "a+")), kind, folder)
            yield
    except OSError as error:  # It comes from writing: images that cannot be read are among the bad ones.
        raise DataError(
            f"{folder} cannot be written ({error.strerror or error}). Check the free space and the permissions, then "
            "repeat the command to resume."
        ) from None


def _lock(file: TextIO, kind: int, folder: Path) -> None:
    """Locks an open file and writes this process into it. Raises DataError if another process holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise DataError(
            f"another pack works on {folder} ({file.read() or 'several parts of one'}). Wait for it, or end it."
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    file.truncate(0)
    if kind == fcntl.LOCK_EX:
        file.write(f"process {os.getpid()} of {os.uname().nodename}")
        file.flush()


def _refuse_foreign(folder: Path) -> None:
    """Raises DataError if a folder holds files, but no plan of a pack."""
    if load_plan(folder) is None and folder.exists() and any(path != folder / WORK for path in folder.iterdir()):
        raise DataError(
            f"{folder} is in the way: it holds no plan of an unfinished pack. Remove it yourself if it may go."
        )


def begin_pack(plan: PackPlan, out: Path, *, shared: bool, overwrite: bool) -> Path:
    """Writes the plan to the folder, or returns that in which an earlier call with the same plan has begun; see `hold`.

    shared  other calls may be at work in the same folder, which is therefore never removed

    Raises DataError if the folder holds something else, or if OUT exists meanwhile.
    """
    check_out(out, overwrite)
    folder = partial_folder(out)
    found = load_plan(folder)
    if found and (reason := find_difference(found, plan)):
        if shared or not overwrite:
            way = f"remove {folder} before the parts are started" if shared else "start over with --overwrite"
            raise DataError(
                f"{folder} holds an unfinished pack with {reason}. Repeat its command to resume it; else {way}."
            )
        _empty(folder)
    with replace_file(folder / WORK / "plan.json", "w") as file:
        json.dump(dataclasses.asdict(plan), file)
    return folder


def _empty(folder: Path) -> None:
    """Removes all that a pack has written, but its locks, which are held."""
    for path in (*folder.iterdir(), *(folder / WORK).iterdir()):
        if path.is_dir() and path != folder / WORK:
            shutil.rmtree(path)
        elif path.is_file() and not path.name.startswith("lock"):
            path.unlink()


def load_plan(folder: Path) -> PackPlan | None:
    """Returns the plan of an unfinished pack, None if there is none."""
    try:
        return PackPlan(**json.loads((folder / WORK / "plan.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{folder / WORK / 'plan.json'} is no plan of a pack ({error}). Remove {folder} to start over."
        ) from None


def find_difference(found: PackPlan, wanted: PackPlan) -> str:
    """Returns the first setting in which an unfinished pack differs from the wanted one, "" if they are equal."""
    for setting in SETTINGS:
        begun, asked = getattr(found, setting), getattr(wanted, setting)
        option = f"--{setting.replace('_', '-')}"
        if begun != asked:
            return f"{f'no {option}' if begun is None else f'{option} {begun}'}, where now it is {asked}"
    if found.samples != wanted.samples:
        return f"{found.samples} samples, where the source now has {wanted.samples}"
    if found.splits != wanted.splits:
        return f"the parts {found.splits}, where now they are {wanted.splits}"
    if found.classes != wanted.classes:
        return f"{_list_classes(found)}, where now they are {_list_classes(wanted)}"
    if found.annotations != wanted.annotations:
        return "annotations (--masks) that are others than now, or not on record"
    if found.void != wanted.void or any(getattr(found, name) != getattr(wanted, name) for name in MAPS):
        return "label or depth maps (--label-maps, --label-classes, --void, --depth-maps) that are others than now"
    return "" if found == wanted else "samples of other names than the source now has"


def _list_classes(plan: PackPlan) -> str:
    return f"the {len(plan.classes)} classes {some(plan.classes)}" if plan.classes else "no classes"
