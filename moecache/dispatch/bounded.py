"""A table that may lose what it holds at any time, and so never grows for ever."""

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

LIMIT = 1 << 16  # entries: keys may hold exact token counts


class Bounded(dict[K, V]):
    """A dict that begins anew when a key is set beside LIMIT others."""

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= LIMIT and key not in self:
            self.clear()
        super().__setitem__(key, value)
