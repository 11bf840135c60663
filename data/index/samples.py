"""Members of a tar → its samples, by webdataset's rule: files of one key belong together.

1 key    a name up to the first dot of its base name; the rest is its extension
2 run    neighbours of one key
3 join   runs of one key that lie apart, unless both have the same extension: labels that follow after all images
4 image  the member called .jpg, .png, …, else the only one that ends so; several are a tie, for `data.image` to decide
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import NamedTuple, TypeVar

from data.errors import DataError
from data.index.passed_over import PassedOver
from data.index.tar import Member, TarBytes, walk

Content = TypeVar("Content")
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "npy")
FIRST = "first"  # the value of data.image that decides a tie as versions without this setting did
# Folders of thumbnails and of deleted files, which storage devices and archivers put among the images.
CLUTTER = {
    "@eaDir",
    "__MACOSX",
    "#recycle",
    "@Recycle",
    "@Recently-Snapshot",
    "$RECYCLE.BIN",
    "System Volume Information",
}
IN_CLUTTER = "files and folders of thumbnails and waste"
NO_NUMBER = ".cls that hold no number, taken for no label"
MAX_LABEL = 64  # bytes of a .cls that are read
MAX_DIGITS = 18  # of a label, which the index holds as int64
NUMBER = re.compile(rb"\d{1,18}(\.\d*)?([eE][+-]?\d{1,2})?")
NO_LABEL = (b"", b"-1", b"-1.0")


class Part(NamedTuple):
    """A member as a part of a sample."""

    key: str
    extension: str  # in lower case
    member: Member
    label: int  # that it holds; -1: none


class Sample:
    """Parts of one key: the members by their extensions, the label, and the number of runs with an image."""

    __slots__ = ("image_runs", "label", "members")

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.label = -1
        self.image_runs = 0

    @property
    def images(self) -> list[str]:
        return image_extensions(self.members)

    @property
    def tied(self) -> bool:
        return self.image_runs > 1 or is_tied(self.images)


def split_name(name: str) -> tuple[str, str]:
    """Splits a name into (key, extension) by webdataset's rule: the key ends before the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def read_parts(tar: TarBytes, passed_over: PassedOver) -> Iterable[Part]:
    """Yields the members of a tar that belong to samples. Counts hidden files and those without an extension."""
    for member in walk(tar, passed_over):
        key, extension = split_name(member.name)
        extension = extension.lower()
        if "\n" in member.name:
            raise DataError(
                f"{tar.path} has a line break in the member name {member.name!r}, which no index can hold. Rename it."
            )
        if not key or key.endswith("/"):
            passed_over.add("hidden files", member.name)
        elif not extension:
            passed_over.add("files without an extension", member.name)
        elif "/" in key and not CLUTTER.isdisjoint(key.split("/")):
            passed_over.add(IN_CLUTTER, member.name)
        elif extension == "cls":
            text = tar.pread(min(member.size, MAX_LABEL), member.offset).strip()
            label = parse_label(text)
            if label < 0 and text not in NO_LABEL:
                passed_over.add(NO_NUMBER, f"{member.name}: {text[:20].decode('utf-8', 'backslashreplace')}")
            yield Part(key, extension, member, label)
        else:
            yield Part(key, extension, member, -1)


def group(tar: str, parts: Iterable[Part], passed_over: PassedOver) -> tuple[list[Sample], list[tuple[Member, Sample]]]:
    """Returns the samples, and the image of each run that has one: the samples, unless runs with images are joined.

    Raises DataError if it is unclear to which of two samples a member belongs.
    """
    samples: list[Sample] = []
    firsts: list[tuple[Member, Sample]] = []
    last: dict[str, Sample] = {}
    for key, run in itertools.groupby(parts, key=lambda part: part.key):
        members, label = {}, -1
        for part in run:
            if part.extension in members:
                raise _twice(tar, key, part.extension, members[part.extension], part.member)
            members[part.extension] = part.member
            label = part.label if part.extension == "cls" else label
        image = first_image(members)
        sample = last.get(key)
        if sample is not None and (common := sample.members.keys() & members.keys()):
            if image is None or not sample.images:
                extension = min(common)
                raise _twice(tar, key, extension, sample.members[extension], members[extension])
            passed_over.add("keys that occur again, each as a sample of its own", key)
            sample = None
        if sample is None:
            sample = last[key] = Sample()
            samples.append(sample)
        sample.members.update(members)
        sample.label = max(sample.label, label)
        if image is not None:
            sample.image_runs += 1
            firsts.append((image, sample))
    return samples, firsts


def _twice(tar: str, key: str, extension: str, one: Member, other: Member) -> DataError:
    return DataError(
        f"{tar} has two members with the key {key!r} and the extension {extension!r}: {one.name!r} and "
        f"{other.name!r}. A key must not contain dots and belongs to one sample."
    )


def normalise_extension(text: str) -> str:
    """Returns an extension that a user has named as the index has it: png for .PNG."""
    return text.lower().removeprefix(".")


def image_extensions(members: Iterable[str]) -> list[str]:
    """Returns those among the extensions of a sample that are images."""
    return [extension for extension in members if extension.rpartition(".")[2] in IMAGES]


def is_tied(images: list[str]) -> bool:
    """Returns whether the extensions of a sample's images leave open which is the image. .jpg goes before .seg.png."""
    return len(images) > 1 and sum(extension in IMAGES for extension in images) != 1


def first_image(members: Mapping[str, Content]) -> Content | None:
    """Returns the member called .jpg, .png, …, else the first ending so, such as .large.jpg."""
    images = image_extensions(members)
    exact = [extension for extension in images if extension in IMAGES]
    return members[(exact or images)[0]] if images else None


def find_image(members: Mapping[str, Content], image: str | None = None) -> Content | None:
    """Returns the image of a sample, None if it has none.

    image  its extension; FIRST: any, as `first_image` does; None: the only one

    Raises DataError if None is given and there are several.
    """
    if image not in (None, FIRST):
        return members.get(image)
    if image is None and is_tied(images := image_extensions(members)):
        raise DataError(
            f"it has {len(images)} images, {', '.join(f'.{name}' for name in images)}. {say_choice(images)}"
        )
    return first_image(members)


def say_choice(images: Iterable[str]) -> str:
    """Says how to decide between several images of a sample."""
    choices = list(dict.fromkeys(images))[:4]
    sentence = f"Choose one with data.image={' or data.image='.join(choices)} (--image in data.pack and data.inspect)"
    if all("." in choice for choice in choices):
        sentence += "; or, if the dots belong to the names, rename the files: a key ends at the first dot"
    return sentence + "."


def parse_label(text: bytes) -> int:
    """Returns the whole number in a .cls member, -1 if it is something else.

    2.0, as pandas writes it, is 2, and so is 2.000000000000000000e+00, as NumPy's savetxt does.
    """
    text = text.strip()
    if text.isdigit():
        return int(text) if len(text) <= MAX_DIGITS else -1
    if not NUMBER.fullmatch(text):
        return -1
    value = Decimal(text.decode())
    return int(value) if value < 10**MAX_DIGITS and value == value.to_integral_value() else -1
