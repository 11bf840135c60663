"""Images that a CSV file lists, to be packed."""

import csv
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data.errors import DataError
from data.index.index_file import IMAGES
from data.pack.image_folder import key_of_path, read_file
from data.pack.sample import Sample, Source


def find_listed(source: Path) -> Source:
    """Returns the images of a CSV with the header `path` or `path,label`, paths relative to the CSV.

    Labels that are all numbers stay as they are; names are numbered in alphabetical order. Files are opened only when
    they are packed. Raises DataError if the header is another one, the list is empty, a path is no image, or a label
    is missing.
    """
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            rows = list(_read_rows(csv.DictReader(file), source))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source} is no CSV file in UTF-8 ({error}). Save it as such.") from None
    if not rows:
        raise DataError(f"{source} lists no image below its header. Add lines of path[,label].")
    names = sorted({label for _, label in rows if label is not None})
    if all(re.fullmatch(r"\d{1,6}", name) for name in names):
        numbers = {name: int(name) for name in names}
        classes = [str(number) for number in range(max(numbers.values(), default=-1) + 1)]
    else:
        numbers = {name: number for number, name in enumerate(names)}
        classes = names
    samples = [
        Sample(
            key_of_path(re.sub(r"^(\.\./|/)+", "", os.path.normpath(path))),
            path.rpartition(".")[2].lower(),
            None if label is None else numbers[label],
            path,
            partial(read_file, str(source.parent / path)),
        )
        for path, label in rows
    ]
    return Source(samples, classes)


def _read_rows(reader: csv.DictReader, source: Path) -> Iterator[tuple[str, str | None]]:
    """Yields (path, label) of each line; the label is None where the list has no such column."""
    header = list(reader.fieldnames or ())
    if header not in (["path"], ["path", "label"]):
        raise DataError(
            f"{source} begins with the line {','.join(header)!r}. "
            "A list of images has the header `path` or `path,label`."
        )
    for row in reader:
        path, label = row["path"], row.get("label")
        if None in row or (len(header) == 2 and not label):
            raise DataError(f"{source}, line {reader.line_num}, does not have {len(header)} fields. Complete the line.")
        if Path(path).suffix[1:].lower() not in IMAGES:
            raise DataError(
                f"{source}, line {reader.line_num}: {path!r} is no image, it ends in none of "
                f"{', '.join('.' + extension for extension in IMAGES)}. Remove the line."
            )
        yield path, label
