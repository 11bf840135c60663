"""Samples to be packed: images with their side files, read only when their turn comes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

Read = Callable[[], bytes]


class Sample(NamedTuple):
    """One image to be packed, with the files that belong to it. Can be pickled for other processes."""

    key: str
    extension: str
    label: int | None  # becomes KEY.cls
    origin: str  # names it in messages
    read: Read
    others: tuple[tuple[str, Read], ...] = ()  # (extension, contents) of the side files, kept byte for byte


class Samples(Protocol):
    """Some millions of samples: a list, or a subclass that makes each sample when it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Sample: ...
    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))


class Source(NamedTuple):
    """All samples of one source, in the same order on every call."""

    samples: Samples
    classes: list[str]
    note: str = ""  # printed for the user, such as the number of files left out
