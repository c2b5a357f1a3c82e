"""Locks that a forked child finds free, whatever the threads of its parent were about to do."""

import os
import threading
import weakref
from typing import Any

PATIENCE_S = 5.0  # that a fork waits for an awaited lock

_all: "weakref.WeakSet[Lock]" = weakref.WeakSet()
_awaited: list["Lock"] = []
_taken = threading.local()  # the awaited locks that the fork of this thread has got


class Lock:
    """A lock, in a forked child a new one.

    Args:
        reentrant: a thread that holds it may take it again.
        awaited: a fork takes it first, as what it guards must not be copied half done. Whoever holds it takes no other
            awaited one. For locks of modules, which live as long as the process.
    """

    def __init__(self, *, reentrant: bool = True, awaited: bool = False) -> None:
        self._make: Any = threading.RLock if reentrant else threading.Lock
        self.renew()
        _all.add(self)
        if awaited:
            _awaited.append(self)

    def renew(self) -> None:
        """Be free, whoever holds it."""
        self._lock = self._make()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Whether it was got."""
        return bool(self._lock.acquire(blocking, timeout))

    def release(self) -> None:
        """Give it back."""
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _before() -> None:
    _taken.locks = [lock for lock in _awaited if lock.acquire(timeout=PATIENCE_S)]


def _in_parent() -> None:
    while _taken.locks:
        _taken.locks.pop().release()


def _in_child() -> None:
    for lock in list(_all):
        lock.renew()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
