"""Which tars a path means, and which of them are for training, validation and test."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from data.errors import DataError

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
NAMES: dict[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
COMPRESSED = (".tar.gz", ".tgz")


def find_shards(paths: Paths, split: str | None = None) -> list[str]:
    """The tars of one split that a path or a list of paths means.

    paths  a folder, a tar, a glob, a name with {000000..000009}, or a list of these
    split  "train", "val", "test"; of a folder that has such parts only this part is taken, a folder without
           parts is taken whole; None is the whole of whatever is given

    DataError: nothing there, no such part, or the tars of two splits together.
    """
    shards = list_shards(paths, split)
    for shard, times in Counter(shards).items():
        if times > 1:
            raise DataError(f"the shard {shard} is listed {times} times: its samples would be repeated. List it once.")
    named: dict[str, str] = {}
    for shard, name in _splits_of(shards).items():
        if name:
            named.setdefault(name, shard)
    if len(named) > 1:
        (first, one), (second, other) = list(named.items())[:2]
        raise DataError(
            f"{_shown(paths)} mixes the splits {first} and {second} ({one}, {other}). "
            "Give the folder that holds both (each use takes its own part), or a glob that matches only one of them."
        )
    return shards


def list_shards(paths: Paths, split: str | None = None) -> list[str]:
    """As `find_shards`, but whatever the splits of the tars are."""
    return [shard for path in _listed(paths) for shard in _expand(path, split)]


def has_split(paths: Paths, split: str) -> bool:
    """Whether a folder among the paths has a part of this name."""
    return any(split in parts(Path(path)) for path in _listed(paths) if os.path.isdir(path))


def parts(folder: Path) -> dict[str, list[str]]:
    """The tars of each split of a folder, by its sub-folders, its manifest or the names of its tars; {} without any."""
    inside: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        children = sorted(entry.name for entry in entries if entry.name.lower() in NAMES and entry.is_dir())
    for child in children:
        if tars := _tars(folder / child):
            inside.setdefault(NAMES[child.lower()], []).extend(tars)
    if inside and (loose := _tars(folder)):
        raise DataError(
            f"{folder} has both the sub-folder {next(iter(inside))} and shards of its own ({loose[0]}), so that it is "
            "unclear where the latter belong. Move them into a sub-folder, or list the shards that you mean."
        )
    return inside or _manifest_parts(folder) or _named_parts(folder)


def _listed(paths: Paths) -> list[str]:
    return [os.fspath(paths)] if isinstance(paths, str | os.PathLike) else [os.fspath(path) for path in paths]


def _shown(paths: Paths) -> str:
    listed = _listed(paths)
    return listed[0] if len(listed) == 1 else f"the list of {len(listed)} paths from {listed[0]} on"


def _expand(path: str, split: str | None) -> list[str]:
    if "://" in path or path.startswith("pipe:"):
        raise DataError(f"{path} is not a local path; remote shards cannot be read yet. Copy them to a local folder.")
    if os.path.isdir(path):
        return _from_folder(Path(path), split)
    if os.path.exists(path):
        return [_plain(path)]
    names = list(braceexpand(path)) if "{" in path else [path]
    found = [file for name in names for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    if not found:
        raise DataError(f"no file matches {path}. Check the pattern; in a shell, put it in quotes.")
    for name in found:
        if not os.path.exists(name):
            raise DataError(f"{name} does not exist. Check the path, and that the folder it is in is mounted.")
    if all(os.path.isdir(name) for name in found):
        return [shard for name in found for shard in _from_folder(Path(name), split)]
    # A glob such as NAME* matches indexes and manifests as well.
    shards = [name for name in found if name.endswith((".tar", *COMPRESSED))] if glob.has_magic(path) else found
    if not shards:
        raise DataError(f"none of the {len(found)} files that match {path} is a shard (*.tar). Check the pattern.")
    return [_plain(name) for name in shards if not (name.endswith(COMPRESSED) and _unpacked(name) in shards)]


def _plain(path: str) -> str:
    if path.endswith(COMPRESSED):
        raise DataError(
            f"{path} is gzip-compressed, so that single images cannot be read from it. "
            f"Unpack it once with `python -m data.index --unpack OUT {path}` and use the folder OUT."
        )
    return path


def _from_folder(folder: Path, split: str | None) -> list[str]:
    found = parts(folder)
    if found and split is None:
        return [shard for shards in found.values() for shard in shards]
    if found and split not in found:
        raise DataError(
            f"{folder} has no {split} part, only {' and '.join(found)}. "
            "Name the folder or the shards to be used in its place."
        )
    shards = found[split] if found and split else _tars(folder)
    if not shards:
        raise DataError(f"{folder} holds no shard (*.tar). Pack images with `python -m data.pack IMAGES {folder}`.")
    return shards


def _tars(folder: Path) -> list[str]:
    """The tars directly in a folder. DataError: there are compressed ones that are not there unpacked as well."""
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name for entry in entries if entry.name.endswith((".tar", *COMPRESSED)) and entry.is_file()
        )
    tars = [name for name in names if name.endswith(".tar")]
    known = set(tars)
    packed = [name for name in names if name.endswith(COMPRESSED) and _unpacked(name) not in known]
    if packed:
        raise DataError(
            f"{folder} holds {len(packed)} gzip-compressed shards such as {packed[0]}, from which single images "
            f"cannot be read. Unpack them once with `python -m data.index --unpack OUT {folder}` and use OUT."
        )
    return [str(folder / name) for name in tars]


def _unpacked(name: str) -> str:
    return re.sub(r"\.(tar\.gz|tgz)$", ".tar", name)


def _manifest_parts(folder: Path) -> dict[str, list[str]]:
    """The tars by `"splits": {NAME: {"shards": [{"file": …}, …]}}` of manifest.json; a list of names will do too."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{folder / 'manifest.json'} is not JSON ({error}). Restore it or remove it.") from None
    splits = manifest.get("splits") if isinstance(manifest, dict) else None
    found: dict[str, list[str]] = {}
    for name, entry in splits.items() if isinstance(splits, dict) else ():
        shards = entry.get("shards", []) if isinstance(entry, dict) else entry
        files = [shard.get("file") if isinstance(shard, dict) else shard for shard in shards]
        files = [str(folder / _unpacked(file)) for file in files if isinstance(file, str)]
        if files:
            found.setdefault(NAMES.get(str(name).lower(), str(name)), []).extend(files)
    if not found:
        return {}
    _tars(folder)  # Says how to unpack compressed shards before they are missed.
    for shards in found.values():
        for shard in shards:
            if not os.path.exists(shard):
                raise DataError(f"{shard}, which manifest.json lists, is missing. Copy it or edit the manifest.")
    return found


def _named_parts(folder: Path) -> dict[str, list[str]]:
    """The tars by the split in their names. Shards that all name the same split, or none, are no parts."""
    found: dict[str, list[str]] = {}
    for shard in _tars(folder):
        found.setdefault(_name_of(shard) or "", []).append(shard)
    if len(found) < 2:
        return {}
    if "" in found:
        raise DataError(
            f"{folder} holds shards that name a split and others that do not ({found[''][0]}), so that it is unclear "
            "where the latter belong. Use sub-folders train/ and val/, or list the shards that you mean."
        )
    return found


def _name_of(shard: str) -> str | None:
    """The split that stands in the base name of a tar, set off by - _ or a dot."""
    words = [word for word in re.split(r"[-_.]", os.path.basename(shard).lower()) if word in NAMES]
    return NAMES[words[-1]] if words else None


def _splits_of(shards: list[str]) -> dict[str, str | None]:
    """The split that each tar belongs to by its manifest, its name, or the folder that it is in."""
    found: dict[str, str | None] = {}
    listed: dict[str, str] = {}
    for folder in {os.path.dirname(shard) for shard in shards}:
        for name, tars in _manifest_parts(Path(folder)).items():
            listed.update(dict.fromkeys(tars, name))
    for shard in shards:
        folder = os.path.basename(os.path.dirname(os.path.abspath(shard))).lower()
        found[shard] = listed.get(shard) or _name_of(shard) or NAMES.get(folder)
    return found
