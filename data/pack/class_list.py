"""--classes FROM: the numbers of the classes come from another part of the data set, or from a text file."""

import os
from collections import Counter
from pathlib import Path

from data.errors import DataError
from data.index.classes import names_in, same_name, some
from data.index.splits import local_path
from data.storage.credentials import hide
from data.storage.listing import Folder


def read_class_list(given: str, option: str = "--classes") -> list[str]:
    """Returns the names of the classes of a packed folder or URL, or those in a text file, one per line.

    given  the folder, its manifest.json, or the file

    Raises DataError if there are none, or one is there twice.
    """
    given = local_path(hide(given)).removesuffix("/manifest.json")
    if os.path.isfile(given):
        try:
            names = [same_name(line.strip()) for line in Path(given).read_text("utf-8-sig").rstrip().splitlines()]
        except UnicodeDecodeError as error:
            raise DataError(f"{option} {given} is no text file in UTF-8 ({error}). Save it as such.") from None
    else:
        names = names_in(Folder(given))
    if not names or "" in names:
        raise DataError(
            f"{option} {given} {'has an empty line' if names else 'names no classes'}. Give a folder packed with "
            "labels, such as OUT/train, or a text file with the name of a class in each line."
        )
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise DataError(f"{option} {given} has the class {name!r} {times} times. List each once.")
    return names


def number_by_name(given: list[str], names: list[str], source: str) -> dict[str, int]:
    """Returns the number that each name has in the list that is given.

    names  each once

    Raises DataError if one is not in the list, or if two are the same one.
    """
    numbers = {name: number for number, name in enumerate(given)}
    for name, times in Counter(map(same_name, names)).most_common(1):
        if times > 1:
            raise DataError(f"{source} has {times} classes that are called {name!r}. Give each a name of its own.")
    if missing := [name for name in names if same_name(name) not in numbers]:
        raise DataError(
            f"{source} has the classes {some(missing)}, which --classes does not list. Give --classes a list of all of "
            "them, or leave them out of the source."
        )
    return {name: numbers[same_name(name)] for name in names}
