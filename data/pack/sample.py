"""What is to be packed: images with their side files, read only when their turn comes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

Read = Callable[[], bytes]


class Sample(NamedTuple):
    """One image to be packed, with the files that belong to it. Travels to other processes, so that it pickles."""

    key: str
    extension: str
    label: int | None  # becomes KEY.cls
    origin: str  # what the user knows it by
    read: Read
    others: tuple[tuple[str, Read], ...] = ()  # (extension, contents) of the side files, kept byte for byte


class Samples(Protocol):
    """Some millions of samples: a list, or what makes each when it is asked for."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Sample]: ...
    def __getitem__(self, number: int, /) -> Sample: ...


class Source(NamedTuple):
    """All samples of one source in an order that does not change from call to call."""

    samples: Samples
    classes: list[str]
    note: str = ""  # what the user should know of the source, such as files that are left out
