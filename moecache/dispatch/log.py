"""What the logger `moecache` says: each choice once a problem, and every timing as debugging."""

import logging
from collections.abc import Iterable

from moecache.dispatch.bounded import Bounded
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Choice, Timing
from moecache.text import micros

LOGGER = logging.getLogger("moecache")
_told: dict[str, Choice] = Bounded()


def to_stderr(level: str) -> None:
    """Show what is said from a level on, `info` or `debug`, where the program has set up no logging of its own."""
    if not level:
        return
    LOGGER.setLevel(level.upper())
    if not LOGGER.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        LOGGER.addHandler(handler)


def chosen(problem: Problem, choice: Choice) -> Choice:
    """The choice, which is told where the problem was not given the same before."""
    if LOGGER.isEnabledFor(logging.INFO) and _told.get(problem.key) != choice:
        _told[problem.key] = choice
        told = f"{problem.key} gets {choice.config.name}, {choice.tier}: {choice.reason}"
        LOGGER.info("%s", f"{told}; from {choice.source}" if choice.source else told)
    return choice


def timed(timings: Iterable[Timing]) -> None:
    """What is stored just now; what failed is told too."""
    if LOGGER.isEnabledFor(logging.DEBUG):
        for row in timings:
            us = f"{micros(row.median_us)} µs" if row.status == "ok" else f"{row.status}: {row.reason}"
            LOGGER.debug("%s %s %s", row.problem.id, row.config.name, us)
