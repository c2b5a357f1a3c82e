"""Says where the time of tuning went: seconds by phase, for whoever records."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PHASES = ("compile", "inputs", "reference", "check", "prepare", "race")  # compile: only what is waited for

_spent: ContextVar[dict[str, float] | None] = ContextVar("_spent", default=None)


@contextmanager
def recording() -> Iterator[dict[str, float]]:
    """The seconds of each phase that is entered within the block, in this thread."""
    spent: dict[str, float] = {}
    token = _spent.set(spent)
    try:
        yield spent
    finally:
        _spent.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Time spent in the block counts for this phase. Phases are not nested."""
    spent, began = _spent.get(), time.perf_counter()
    try:
        yield
    finally:
        if spent is not None:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
