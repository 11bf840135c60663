"""Images that a CSV file lists, to be packed."""

import csv
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError
from data.index.classes import same_name
from data.index.samples import CLUTTER, IMAGES, parse_label
from data.pack.class_list import number_by_name
from data.pack.divide import FOLDER
from data.pack.image_folder import key_of_path, read_file
from data.pack.sample import Sample, Source

# pandas writes a column of numbers in which one is missing as 2.0, and the missing one as nan where it is asked to.
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?|nan|<na>", re.ASCII | re.IGNORECASE)
MAX_DIGITS = 6  # of a number that is a class; longer ones are ids, that is names


class Row(NamedTuple):
    """A line of the list; the label is None where there is no such column, or it says -1."""

    path: str
    label: str | None
    line: int
    group: str | None


def find_listed(source: Path, given: list[str] | None = None, group_by: str | None = None) -> Source:
    """Returns the images of a CSV with the columns `path`, perhaps `label`, and that of groups; paths relative to it.

    given     names of the classes by their numbers, which labels then are (--classes)
    group_by  column of the groups (--group-by); without such a column `folder` means that of the image

    Labels that are all numbers stay as they are (2.0 is 2); names are numbered in alphabetical order, and so are ids of
    more than six digits; -1 is no label. Files are opened only when they are packed. Raises DataError if the header is
    another one, the list is empty, a path is no image, or a label is missing, no class, or of another kind than others.
    """
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            rows = list(_read_rows(csv.DictReader(file), source, group_by))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source} is no CSV file in UTF-8 ({error}). Save it as such.") from None
    if not rows:
        raise DataError(f"{source} lists no image below its header. Add lines of path[,label].")
    names = sorted({row.label for row in rows if row.label is not None})
    numbers, classes = _number_labels(source, rows, names, given)
    unlabelled = sum(row.label is None for row in rows) if names else 0
    without = len(classes) - len(set(numbers.values()))
    notes = [
        f"{unlabelled} images with the label -1 are packed without a label" if unlabelled else "",
        f"{without} of {len(classes)} classes have no image in {source}" if without else "",
    ]
    samples = [
        Sample(
            key_of_path(re.sub(r"^(\.\./|/)+", "", os.path.normpath(row.path))),
            row.path.rpartition(".")[2].lower(),
            None if row.label is None else numbers[row.label],
            row.path,
            partial(read_file, str(source.parent / row.path)),
            group=row.group,
        )
        for row in rows
    ]
    return Source(samples, classes, "; ".join(filter(None, notes)))


def _number_labels(
    source: Path, rows: list[Row], names: list[str], given: list[str] | None
) -> tuple[dict[str, int], list[str]]:
    """Returns the number of each label, and the names of all classes. Raises DataError if names and numbers are mixed.

    names  the labels, each once, sorted
    """
    if given is not None and not names:
        raise DataError(f"{source} has no label to be numbered by --classes. Leave it out.")
    if given is not None:
        if any(same_name(name) not in given for name in names) and all(name.isdecimal() for name in names):
            if (highest := max(map(int, names))) >= len(given):
                raise DataError(f"{source} has the label {highest}, and --classes ends at {len(given) - 1}. Extend it.")
            return {name: int(name) for name in names}, given
        return number_by_name(given, names, str(source)), given
    number = next((row for row in rows if row.label and row.label.isdecimal()), None)
    name = next((row for row in rows if row.label and not row.label.isdecimal()), None)
    if number and name:
        raise DataError(
            f"{source} has numbers and names for labels: {number.label!r} in line {number.line}, {name.label!r} in "
            f"line {name.line}. Use either; -1 is for an image without a label."
        )
    if name or any(len(label) > MAX_DIGITS for label in names):
        return {label: number for number, label in enumerate(names)}, names
    numbers = {label: int(label) for label in names}
    return numbers, [str(number) for number in range(max(numbers.values(), default=-1) + 1)]


def _read_rows(reader: csv.DictReader, source: Path, group_by: str | None) -> Iterator[Row]:
    """Yields the lines."""
    header = list(reader.fieldnames or ())
    if group_by not in (None, FOLDER, *header):
        raise DataError(
            f"--group-by {group_by} is no column of {source}, which begins with the line {','.join(header)!r}. Name "
            "one of its columns, or folder."
        )
    if "path" not in header or len(header) > len(set(header)) or not {*header} <= {"path", "label", group_by}:
        raise DataError(
            f"{source} begins with the line {','.join(header)!r}. A list of images has the header `path` or "
            "`path,label`, and the column that --group-by names. Remove the others."
        )
    for row in reader:
        path, label, line = row["path"], row.get("label"), reader.line_num
        if None in row or not all((row[name] or "").strip() for name in header):
            raise DataError(
                f"{source}, line {line}, does not have {len(header)} fields. Complete the line; the label -1 is for an "
                "image without one."
            )
        if Path(path).suffix[1:].lower() not in IMAGES:
            raise DataError(
                f"{source}, line {line}: {path!r} is no image, it ends in none of "
                f"{', '.join('.' + extension for extension in IMAGES)}. Remove the line."
            )
        if not CLUTTER.isdisjoint(Path(path).parts):
            raise DataError(
                f"{source}, line {line}: {path!r} lies in a folder of thumbnails or waste, whose files no index takes. "
                "Remove the line, or move the image."
            )
        number = None if label is None else _read_label(label.strip(), f"{source}, line {line}")
        yield Row(path, number, line, row[group_by].strip() if group_by in header else None)


def _read_label(text: str, place: str) -> str | None:
    """Returns a name, or the digits of a number; None for -1. Raises DataError for numbers that are no class."""
    if not NUMBER.fullmatch(text):
        return same_name(text)
    if text.isdecimal():
        return text
    if re.fullmatch(r"-1(\.0*)?", text):
        return None
    if (number := parse_label(text.removeprefix("+").encode())) >= 0:
        return str(number)
    raise DataError(
        f"{place} has the label {text}, which is no class: these are names, or whole numbers from 0 on. Correct it, or "
        "write -1 for an image without a label."
    )
