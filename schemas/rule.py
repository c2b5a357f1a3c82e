"""The decision rule: which of the timings of one problem in one environment serves. Race, store, commands and report
all ask here; the view `winner` of a cache file says the same in SQL."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from moecache.schemas.timing import TIE_BAND, Timing

ENOUGH = 3  # samples: fewer prove nothing
ERROR = 1.2533 * 1.4826  # standard error of a median of n normal samples, in MAD/√n
BAND, ERRORS = 1 + TIE_BAND, 4 * ERROR * ERROR


class Entry(NamedTuple):
    """The timing of one usable candidate, µs above 0. Entries sort by time, then by name."""

    us: float
    name: str
    mad: float | None  # unknown where None
    n: int
    default: bool = False

    @classmethod
    def of(cls, timing: Timing) -> "Entry":
        """A usable timing."""
        return cls(timing.median_us or math.inf, timing.config.name, timing.mad_us, timing.n, timing.is_default)


class Decision(NamedTuple):
    """What the rule makes of some entries.

    Attributes:
        default_us: time of the static default; None where it has none.
        tied: entries that the winner is not proved faster than, itself included.
        runner_up_us: the best time of the others.
    """

    won: Entry
    default_us: float | None
    tied: int
    runner_up_us: float | None


def better(a: Entry, b: Entry) -> bool:
    """Whether `a` is proved faster than `b`: by more than the tie band, and by more than two standard errors of the
    difference. What is measured badly, `a` or `b`, proves nothing."""
    us, _, mad, n, _ = a
    slow, _, spread, count, _ = b
    if us * BAND >= slow or n < ENOUGH or count < ENOUGH or mad is None or spread is None:
        return False
    apart = slow - us
    return apart * apart > ERRORS * (mad * mad / n + spread * spread / count)


def decide(entries: Iterable[Entry]) -> Decision:
    """The fastest of those that are proved faster than the static default; the default where there is none. Without a
    timing of the default the fastest of those with ENOUGH samples, else of all. Equal times go by name.

    Of several defaults the fastest counts, so no winner is ever slower than any.
    """
    order = sorted(entries)
    default = next((each for each in order if each.default), None)
    if default is None:
        won = next((each for each in order if each.n >= ENOUGH), order[0])
    else:
        won = next((each for each in order if better(each, default)), default)
    behind = [each.us for each in order if better(won, each)]
    return Decision(won, default and default.us, len(order) - len(behind), behind[0] if behind else None)


def believed(entries: Iterable[Entry]) -> dict[str, float]:
    """µs by name, for choices that rest on several problems: what is faster than the static default and not proved so
    counts as a hair slower than it, so that the default goes first."""
    order = sorted(entries)
    default = next((each for each in order if each.default), None)
    if default is None:
        return {each.name: each.us for each in order}
    behind = math.nextafter(default.us, math.inf)
    slow = {each.name for each in order if each.us < behind and each != default and not better(each, default)}
    return {each.name: behind if each.name in slow else each.us for each in order}
