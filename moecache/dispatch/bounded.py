"""A table that may lose what it holds at any time, and so never grows for ever."""

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

LIMIT = 1 << 16  # entries


class Bounded(dict[K, V]):
    """A dict that begins anew when a key is set beside `limit` others."""

    def __init__(self, limit: int = LIMIT) -> None:
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self.limit and key not in self:
            self.clear()
        super().__setitem__(key, value)
