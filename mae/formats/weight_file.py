"""From the bytes of a weight file to its contents, by what the file begins with and not by its name.

torch.save, zip or older   tensors and plain values. Objects of other classes are never built: an `Inert` stands in
safetensors                tensors, and what is said beside them
folder                     one of the two, whole or in the parts that an index lists
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mae.errors import CheckpointError
from mae.run.checkpoint_files import read

REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global")
NAMES = ("model.safetensors", "pytorch_model.bin")  # in a folder, in the order in which libraries look


@dataclass(frozen=True)
class Contents:
    """Contents of a file or folder.

    tree     what was saved: usually nested dictionaries with tensors, which stay in the file until they are used
    said     metadata of safetensors
    refused  classes of the objects that were not built
    """

    tree: Any
    said: dict[str, str] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


class Inert:
    """Stands for an object whose class could run code: takes whatever the object was to be built of, and forgets it."""

    def __new__(cls, *_: object, **__: object) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def read_file(path: Path) -> Contents:
    """Reads a file of torch.save or safetensors, memory-mapped. Raises CheckpointError if it is missing, damaged or
    something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            # The length of a header, then the header, which is JSON.
            safetensors = file.read(9)[8:] == b"{"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return _read_safetensors(path) if safetensors else _read_torch(path)


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, "pt") as contents:
            said, keys = contents.metadata() or {}, contents.keys()
            return Contents({key: contents.get_tensor(key) for key in keys}, said)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}; it was probably cut off") from error


def _read_torch(path: Path) -> Contents:
    """Reads a file of torch.save with `weights_only=True`. Classes that torch refuses by name are stood in for."""
    stand_ins: dict[str, type[Inert]] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(inert, name) for name, inert in stand_ins.items()]):
                return Contents(read(path), refused=tuple(stand_ins))
        except CheckpointError as error:
            found = REFUSED.search(str(error.__cause__))
            # torch's sentence leaves "builtins." out.
            name = found and (found[1] if "." in found[1] else f"builtins.{found[1]}")
            if name is None or name in stand_ins:
                raise
            stand_ins[name] = type(name, (Inert,), {})


def read_folder(folder: Path) -> Contents:
    """Reads the weights of a folder of Hugging Face or timm, in one file or in several.

    Raises CheckpointError if it has none, or a part is missing or damaged.
    """
    for name in NAMES:
        if (folder / name).exists():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            return _read_parts(folder, index)
    there = sorted(file.name for file in folder.iterdir() if file.is_file() and file.suffix != ".json")
    raise CheckpointError(
        f"{folder} has neither {NAMES[0]} nor {NAMES[1]}, nor their parts; it holds {', '.join(there[:8]) or 'no file'}"
    )


def _read_parts(folder: Path, index: Path) -> Contents:
    try:
        parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} does not say which file holds which weights: {error}") from error
    if missing := [part for part in parts if not (folder / part).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:8])} of the {len(parts)} files in {index.name}")
    read_parts = [read_file(folder / part) for part in parts]
    if other := [part for part, contents in zip(parts, read_parts, strict=True) if not isinstance(contents.tree, dict)]:
        raise CheckpointError(f"{folder / other[0]} holds no weights by name")
    return Contents(
        {key: value for part in read_parts for key, value in part.tree.items()},
        refused=tuple(name for part in read_parts for name in part.refused),
    )
