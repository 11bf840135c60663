"""Shards and splits: the tars that a path or URL means, and which are for training, validation and test."""

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence

from braceexpand import braceexpand

from data.errors import DataError
from data.index.samples import IMAGES
from data.storage.credentials import hide
from data.storage.listing import Folder, expand_glob
from data.storage.protocols import file_system, is_remote, split_path

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
NAMES: dict[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
COMPRESSED = (".tar.gz", ".tgz")
ENDINGS = tuple(f".{extension}" for extension in IMAGES)
OTHER_COMPRESSION = (".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")


def find_shards(paths: Paths, split: str | None = None) -> list[str]:
    """Returns the tars of one split.

    paths  a folder, a tar, a glob, a name with {000000..000009}, any of these behind a URL, or a list of these
    split  "train", "val" or "test" of folders that are divided into splits; other folders count as a whole.
           None: all that is given

    Raises DataError if there are none, the split is missing, or the tars belong to two splits.
    """
    shards = list_shards(paths, split)
    for shard, times in Counter(shard if is_remote(shard) else os.path.realpath(shard) for shard in shards).items():
        if times > 1:
            raise DataError(f"the shard {shard} is listed {times} times: its samples would be repeated. List it once.")
    named: dict[str, str] = {}
    for shard, name in _splits_of(shards).items():
        if name:
            named.setdefault(name, shard)
    if len(named) > 1:
        (first, one), (second, other) = list(named.items())[:2]
        raise DataError(
            f"{_describe(paths)} mixes the splits {first} and {second} ({one}, {other}). "
            "Give the folder that holds both (each use takes its own part), or a glob that matches only one of them."
        )
    return shards


def list_shards(paths: Paths, split: str | None = None) -> list[str]:
    """Does what `find_shards` does, without checking for mixed splits."""
    return [shard for path in to_list(paths) for shard in _expand(path, split)]


def has_split(paths: Paths, split: str) -> bool:
    """Returns whether a folder among the paths has this split."""
    return any(split in find_splits(folder) for path in to_list(paths) if (folder := _as_folder(path)))


def _as_folder(path: str) -> Folder | None:
    """Returns the folder that a path or URL means, None if it means tars."""
    if not is_remote(path):
        return Folder(_as_local(path)) if os.path.isdir(path) else None
    pattern = "{" in path or _is_glob(path)
    return None if pattern or split_path(path)[1].endswith((".tar", *COMPRESSED)) else Folder(path)


def _is_glob(path: str) -> bool:
    # In a web address a question mark begins the query.
    return "*" in path or "[" in path if is_remote(path) else glob.has_magic(path)


def _as_local(path: str) -> str:
    """Returns a path that webdataset never takes for a command or URL: ./pipe:x.tar for pipe:x.tar."""
    return f"./{path}" if ":" in path.partition("/")[0] else path


def find_splits(folder: Folder) -> dict[str, list[str]]:
    """Returns the tars of each split of a folder, by sub-folders, else manifest, else names; {} without splits."""
    inside: dict[str, list[str]] = {}
    for child in folder.folders(NAMES):
        if tars := _tars(folder.folder(child)):
            inside.setdefault(NAMES[child.lower()], []).extend(tars)
    if inside and (loose := _tars(folder)):
        raise DataError(
            f"{folder.path} has both the sub-folder {next(iter(inside))} and shards of its own ({loose[0]}), so that "
            "it is unclear where the latter belong. Move them into a sub-folder, or list the shards that you mean."
        )
    return inside or _splits_by_manifest(folder) or _splits_by_name(folder)


def to_list(paths: Paths) -> list[str]:
    """Returns the paths as a list: `~` and `file://` resolved, credentials hidden (data/storage/credentials.py)."""
    return [hide(local_path(os.fspath(path))) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


def local_path(path: str) -> str:
    """Returns a path with `~` as the home folder, and without `file://`; other URLs as they are."""
    return os.path.expanduser(path.removeprefix("file://"))


def _describe(paths: Paths) -> str:
    names = to_list(paths)
    return names[0] if len(names) == 1 else f"the list of {len(names)} paths from {names[0]} on"


def _expand(path: str, split: str | None) -> list[str]:
    """Returns the tars that a path or URL means; leaves it to indexing to find that one behind a URL is missing."""
    if path.startswith("pipe:"):
        raise DataError(
            f"{path} cannot be indexed: the output of a command has no byte positions. Stream it with data.mode=stream."
        )
    remote = is_remote(path)
    if remote:
        file_system(path).invalidate_cache()  # An earlier listing may be out of date.
    if folder := _as_folder(path):
        return _folder_shards(folder, split)
    if not remote and os.path.exists(path):
        return [_require_unpacked(_as_local(path))]
    names = list(braceexpand(path)) if "{" in path else [path]
    expand = expand_glob if remote else glob.glob
    found = [file for name in names for file in (sorted(expand(name)) if _is_glob(name) else [name])]
    found = found if remote else list(map(_as_local, found))
    if not found:
        raise DataError(f"no file matches {path}. Check the pattern; in a shell, put it in quotes.")
    for name in found:
        if not remote and not os.path.exists(name):
            raise DataError(f"{name} does not exist. Check the path, and that the folder it is in is mounted.")
    if not remote and all(os.path.isdir(name) for name in found):
        return [shard for name in found for shard in _folder_shards(Folder(name), split)]
    return _keep_shards(path, found)


def _keep_shards(pattern: str, found: list[str]) -> list[str]:
    # A glob such as NAME* matches indexes and manifests as well.
    shards = [name for name in found if name.endswith((".tar", *COMPRESSED))] if _is_glob(pattern) else found
    if not shards and found[0].lower().endswith(ENDINGS) and not is_remote(found[0]):
        from data.index.unpacked import no_shard

        reason = no_shard(pattern, found[0])
        raise DataError(reason)
    if not shards:
        raise DataError(f"none of the {len(found)} files that match {pattern} is a shard (*.tar). Check the pattern.")
    return [
        _require_unpacked(name) for name in shards if not (name.endswith(COMPRESSED) and unpacked_name(name) in shards)
    ]


def _require_unpacked(path: str) -> str:
    if path.lower().endswith((*ENDINGS, ".csv")) and not is_remote(path):
        from data.index.unpacked import no_shard

        reason = no_shard(path, path)
        raise DataError(reason)
    if split_path(path)[1].endswith(COMPRESSED):
        unpacked = f"Unpack it once with `python -m data.index --unpack OUT {path}` and use the folder OUT."
        raise DataError(
            f"{path} is gzip-compressed, so that single images cannot be read from it. "
            f"{'Upload it unpacked.' if is_remote(path) else unpacked}"
        )
    return path


def _folder_shards(folder: Folder, split: str | None) -> list[str]:
    found = find_splits(folder)
    if found and split is None:
        return [shard for shards in found.values() for shard in shards]
    if found and split not in found:
        raise DataError(
            f"{folder.path} has no {split} part, only {' and '.join(found)}. "
            "Name the folder or the shards to be used in its place."
        )
    shards = found[split] if found and split else _tars(folder)
    if not shards:
        raise DataError(_no_shard(folder, split))
    return shards


def _no_shard(folder: Folder, split: str | None) -> str:
    if not folder.remote:
        from data.index.unpacked import way_to_shards

        return f"{folder.path} holds no shard (*.tar){way_to_shards(folder.path, split)}"
    if folder.lists:
        return f"{folder.path} holds no shard (*.tar), or does not exist. Check its spelling."
    return (
        f"{folder.path} has no manifest.json that lists shards, and a web server does not say what else it has. "
        "Copy manifest.json there, as `python -m data.pack` writes it, or name the shards: NAME-{000000..000127}.tar."
    )


def _tars(folder: Folder) -> list[str]:
    """Returns the tars directly in a folder. Raises DataError if a compressed one has no unpacked one beside it."""
    names = folder.files((".tar", *COMPRESSED, *OTHER_COMPRESSION))
    tars = [name for name in names if name.endswith(".tar")]
    known = set(tars)
    packed = [name for name in names if unpacked_name(name) not in known]
    if other := next((name for name in packed if not name.endswith(COMPRESSED)), None):
        raise DataError(
            f"{folder.path} holds compressed shards such as {other}, from which single images cannot be read. Unpack "
            "them once, with the program that made them."
        )
    if packed:
        raise DataError(
            f"{folder.path} holds {len(packed)} gzip-compressed shards such as {packed[0]}, from which single images "
            f"cannot be read. Unpack them once with `python -m data.index --unpack OUT {folder.path}` and use OUT."
        )
    return [folder.file(name) for name in tars]


def unpacked_name(name: str) -> str:
    """Returns the name of a compressed tar once it is unpacked."""
    return re.sub(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2|txz)$", ".tar", name)


def _splits_by_manifest(folder: Folder) -> dict[str, list[str]]:
    """Returns the tars by `"splits": {NAME: {"shards": [{"file": …}, …]}}` of manifest.json, or a list of names."""
    splits = (folder.manifest() or {}).get("splits")
    found: dict[str, list[str]] = {}
    for name, entry in splits.items() if isinstance(splits, dict) else ():
        shards = entry.get("shards", []) if isinstance(entry, dict) else entry
        files = [shard.get("file") if isinstance(shard, dict) else shard for shard in shards]
        files = [folder.file(unpacked_name(file)) for file in files if isinstance(file, str)]
        if files:
            found.setdefault(NAMES.get(str(name).lower(), str(name)), []).extend(files)
    if not found:
        return {}
    _tars(folder)  # Raises if shards are compressed, before they would be reported missing.
    for shard in itertools.chain(*found.values()):
        # Behind a URL thousands of requests would take too long; indexing reports a shard that is missing.
        if not folder.remote and not os.path.exists(shard):
            raise DataError(f"{shard}, which manifest.json lists, is missing. Copy it or edit the manifest.")
    return found


def _splits_by_name(folder: Folder) -> dict[str, list[str]]:
    """Returns the tars by the split in their names; {} if all name the same split, or none."""
    found: dict[str, list[str]] = {}
    for shard in _tars(folder):
        found.setdefault(_split_in_name(shard) or "", []).append(shard)
    if len(found) < 2:
        return {}
    if "" in found:
        raise DataError(
            f"{folder.path} holds shards that name a split and others that do not ({found[''][0]}), so that it is "
            "unclear where the latter belong. Use sub-folders train/ and val/, or list the shards that you mean."
        )
    return found


def _split_in_name(shard: str) -> str | None:
    """Returns the split in the base name of a tar, set off by - _ or a dot."""
    words = [split for word in re.split(r"[-_.]", split_path(shard)[1]) if (split := split_of(word))]
    return words[-1] if words else None


def split_of(name: str) -> str | None:
    """Returns the split that a name stands for, such as train, Training, train2017 or val_images; else None."""
    found = re.fullmatch(r"([a-z]+?)(?:[-_. ]?(?:\d+|set|data|images?|split))?", name.lower())
    return NAMES.get(found[1]) if found else None


def _splits_of(shards: list[str]) -> dict[str, str | None]:
    """Returns the split of each tar by its manifest, else its name, else its folder."""
    found: dict[str, str | None] = {}
    listed: dict[str, str] = {}
    for path in {split_path(shard)[0] for shard in shards}:
        for name, tars in _splits_by_manifest(Folder(path)).items():
            listed.update(dict.fromkeys(tars, name))
    for shard in shards:
        path = shard if is_remote(shard) else os.path.abspath(shard)
        parent = os.path.basename(split_path(path)[0]).lower()
        found[shard] = listed.get(shard) or _split_in_name(shard) or NAMES.get(parent)
    return found
