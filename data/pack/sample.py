"""Samples to be packed: images with their side files, read only when their turn comes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from data.index.naming import Naming

Read = Callable[[], bytes]


class Sample(NamedTuple):
    """One image to be packed, with the files that belong to it. Can be pickled for other processes."""

    key: str
    extension: str
    label: int | None  # becomes KEY.cls
    origin: str  # names it in messages
    read: Read
    others: tuple[tuple[str, Read], ...] = ()  # (extension, contents) of the side files, kept byte for byte
    group: str | None = None  # by a column of a list: images of one group stay in one part


class LazySamples:
    """Some millions of samples, of which `make` makes each when it is asked for: that takes much less memory."""

    def __init__(self, count: int, make: Callable[[int], Sample]):
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Sample:
        return self.make(number)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.make, range(self.count))


Samples = list[Sample] | LazySamples


class Source(NamedTuple):
    """All samples of one source, in the same order on every call."""

    samples: Samples
    classes: list[str]
    note: str = ""  # printed for the user, such as the number of files left out
    naming: Naming = Naming([], None)  # of the label maps in tars
