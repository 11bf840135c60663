"""LRU cache of open files and memory maps."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Thing = TypeVar("Thing")


class LRU(Generic[Key, Thing]):
    """Keeps the `limit` most recently used things open; opens each on first use, closes the least recently used.

    Pickles without what is open, so `open` and `close` have to be picklable.
    """

    def __init__(self, open: Callable[[Key], Thing], close: Callable[[Thing], None], limit: int):
        self.open, self.close, self.limit = open, close, limit
        self.things: OrderedDict[Key, Thing] = OrderedDict()

    def __getitem__(self, key: Key) -> Thing:
        if key in self.things:
            self.things.move_to_end(key)
            return self.things[key]
        thing = self.things[key] = self.open(key)
        if len(self.things) > self.limit:
            self.close(self.things.popitem(last=False)[1])
        return thing

    def __reduce__(self):
        return LRU, (self.open, self.close, self.limit)
