"""Which tars a path or URL means, and which of them are for training, validation and test."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Sequence

from braceexpand import braceexpand

from data.errors import DataError
from data.storage.listing import Folder, LocalFolder, RemoteFolder, matches
from data.storage.protocols import file_system, is_remote, split_path

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
NAMES: dict[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
COMPRESSED = (".tar.gz", ".tgz")


def find_shards(paths: Paths, split: str | None = None) -> list[str]:
    """The tars of one split that a path or a list of paths means.

    paths  a folder, a tar, a glob, a name with {000000..000009}, any of these behind a URL, or a list of these
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
    return [shard for path in listed(paths) for shard in _expand(path, split)]


def has_split(paths: Paths, split: str) -> bool:
    """Whether a folder among the paths has a part of this name."""
    return any(split in parts(folder) for path in listed(paths) if (folder := _folder(path)))


def _folder(path: str) -> Folder | None:
    """The folder that a path or URL means, None if it means tars."""
    if not is_remote(path):
        return LocalFolder(path) if os.path.isdir(path) else None
    pattern = "{" in path or _is_glob(path)
    return None if pattern or split_path(path)[1].endswith((".tar", *COMPRESSED)) else RemoteFolder(path)


def _is_glob(path: str) -> bool:
    # A question mark begins the query of a web address.
    return "*" in path or "[" in path if is_remote(path) else glob.has_magic(path)


def parts(folder: Folder) -> dict[str, list[str]]:
    """The tars of each split of a folder, by its sub-folders, its manifest or the names of its tars; {} without any."""
    inside: dict[str, list[str]] = {}
    for child in folder.folders(NAMES):
        if tars := _tars(folder.folder(child)):
            inside.setdefault(NAMES[child.lower()], []).extend(tars)
    if inside and (loose := _tars(folder)):
        raise DataError(
            f"{folder.path} has both the sub-folder {next(iter(inside))} and shards of its own ({loose[0]}), so that "
            "it is unclear where the latter belong. Move them into a sub-folder, or list the shards that you mean."
        )
    return inside or _manifest_parts(folder) or _named_parts(folder)


def listed(paths: Paths) -> list[str]:
    return [os.fspath(paths)] if isinstance(paths, str | os.PathLike) else [os.fspath(path) for path in paths]


def _shown(paths: Paths) -> str:
    names = listed(paths)
    return names[0] if len(names) == 1 else f"the list of {len(names)} paths from {names[0]} on"


def _expand(path: str, split: str | None) -> list[str]:
    if path.startswith("pipe:"):
        raise DataError(
            f"{path} cannot be indexed: the output of a command has no byte positions. Stream it with data.mode=stream."
        )
    if is_remote(path):
        return _expand_url(path, split)
    if os.path.isdir(path):
        return _from_folder(LocalFolder(path), split)
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
        return [shard for name in found for shard in _from_folder(LocalFolder(name), split)]
    return _only_shards(path, found)


def _expand_url(url: str, split: str | None) -> list[str]:
    """The tars that a URL means; whether they exist shows when they are indexed."""
    file_system(url).invalidate_cache()  # What an earlier call has listed may have changed.
    if folder := _folder(url):
        return _from_folder(folder, split)
    names = list(braceexpand(url)) if "{" in url else [url]
    found = [file for name in names for file in (matches(name) if _is_glob(name) else [name])]
    if not found:
        raise DataError(f"no file matches {url}. Check the pattern; in a shell, put it in quotes.")
    return _only_shards(url, found)


def _only_shards(pattern: str, found: list[str]) -> list[str]:
    # A glob such as NAME* matches indexes and manifests as well.
    shards = [name for name in found if name.endswith((".tar", *COMPRESSED))] if _is_glob(pattern) else found
    if not shards:
        raise DataError(f"none of the {len(found)} files that match {pattern} is a shard (*.tar). Check the pattern.")
    return [_plain(name) for name in shards if not (name.endswith(COMPRESSED) and _unpacked(name) in shards)]


def _plain(path: str) -> str:
    if split_path(path)[1].endswith(COMPRESSED):
        unpacked = f"Unpack it once with `python -m data.index --unpack OUT {path}` and use the folder OUT."
        raise DataError(
            f"{path} is gzip-compressed, so that single images cannot be read from it. "
            f"{'Upload it unpacked.' if is_remote(path) else unpacked}"
        )
    return path


def _from_folder(folder: Folder, split: str | None) -> list[str]:
    found = parts(folder)
    if found and split is None:
        return [shard for shards in found.values() for shard in shards]
    if found and split not in found:
        raise DataError(
            f"{folder.path} has no {split} part, only {' and '.join(found)}. "
            "Name the folder or the shards to be used in its place."
        )
    shards = found[split] if found and split else _tars(folder)
    if not shards:
        raise DataError(_no_shard(folder))
    return shards


def _no_shard(folder: Folder) -> str:
    if isinstance(folder, LocalFolder):
        return f"{folder.path} holds no shard (*.tar). Pack images with `python -m data.pack IMAGES {folder.path}`."
    if folder.lists:
        return f"{folder.path} holds no shard (*.tar), or does not exist. Check its spelling."
    return (
        f"{folder.path} has no manifest.json that lists shards, and a web server does not say what else it has. "
        "Copy manifest.json there, as `python -m data.pack` writes it, or name the shards: NAME-{000000..000127}.tar."
    )


def _tars(folder: Folder) -> list[str]:
    """The tars directly in a folder. DataError: there are compressed ones that are not there unpacked as well."""
    names = folder.files((".tar", *COMPRESSED))
    tars = [name for name in names if name.endswith(".tar")]
    known = set(tars)
    packed = [name for name in names if name.endswith(COMPRESSED) and _unpacked(name) not in known]
    if packed:
        raise DataError(
            f"{folder.path} holds {len(packed)} gzip-compressed shards such as {packed[0]}, from which single images "
            f"cannot be read. Unpack them once with `python -m data.index --unpack OUT {folder.path}` and use OUT."
        )
    return [folder.file(name) for name in tars]


def _unpacked(name: str) -> str:
    return re.sub(r"\.(tar\.gz|tgz)$", ".tar", name)


def _manifest_parts(folder: Folder) -> dict[str, list[str]]:
    """The tars by `"splits": {NAME: {"shards": [{"file": …}, …]}}` of manifest.json; a list of names will do too."""
    text = folder.manifest()
    try:
        manifest = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise DataError(f"{folder.file('manifest.json')} is not JSON ({error}). Restore it or remove it.") from None
    splits = manifest.get("splits") if isinstance(manifest, dict) else None
    found: dict[str, list[str]] = {}
    for name, entry in splits.items() if isinstance(splits, dict) else ():
        shards = entry.get("shards", []) if isinstance(entry, dict) else entry
        files = [shard.get("file") if isinstance(shard, dict) else shard for shard in shards]
        files = [folder.file(_unpacked(file)) for file in files if isinstance(file, str)]
        if files:
            found.setdefault(NAMES.get(str(name).lower(), str(name)), []).extend(files)
    if not found:
        return {}
    _tars(folder)  # Says how to unpack compressed shards before they are missed.
    for shards in found.values():
        for shard in shards:
            if not folder.exists(shard):
                raise DataError(f"{shard}, which manifest.json lists, is missing. Copy it or edit the manifest.")
    return found


def _named_parts(folder: Folder) -> dict[str, list[str]]:
    """The tars by the split in their names. Shards that all name the same split, or none, are no parts."""
    found: dict[str, list[str]] = {}
    for shard in _tars(folder):
        found.setdefault(_name_of(shard) or "", []).append(shard)
    if len(found) < 2:
        return {}
    if "" in found:
        raise DataError(
            f"{folder.path} holds shards that name a split and others that do not ({found[''][0]}), so that it is "
            "unclear where the latter belong. Use sub-folders train/ and val/, or list the shards that you mean."
        )
    return found


def _name_of(shard: str) -> str | None:
    """The split that stands in the base name of a tar, set off by - _ or a dot."""
    words = [word for word in re.split(r"[-_.]", split_path(shard)[1].lower()) if word in NAMES]
    return NAMES[words[-1]] if words else None


def _splits_of(shards: list[str]) -> dict[str, str | None]:
    """The split that each tar belongs to by its manifest, its name, or the folder that it is in."""
    found: dict[str, str | None] = {}
    listed: dict[str, str] = {}
    for path in {split_path(shard)[0] for shard in shards}:
        folder = RemoteFolder(path) if is_remote(path) else LocalFolder(path)
        for name, tars in _manifest_parts(folder).items():
            listed.update(dict.fromkeys(tars, name))
    for shard in shards:
        path = shard if is_remote(shard) else os.path.abspath(shard)
        parent = os.path.basename(split_path(path)[0]).lower()
        found[shard] = listed.get(shard) or _name_of(shard) or NAMES.get(parent)
    return found
