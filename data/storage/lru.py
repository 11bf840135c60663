"""A bounded number of open things, the longest unused closed first."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Thing = TypeVar("Thing")


class LRU(Generic[Key, Thing]):
    """The `limit` most recently used things, each opened on first use.

    Pickles as its rule alone, without what is open: `open` and `close` have to be module functions or methods.
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
