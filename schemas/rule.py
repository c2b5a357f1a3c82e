"""The rule that says which timing of one problem in one environment wins. Tuner, store, commands and report ask here.
The view `winner` of a cache file says the same in SQL."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

Status = Literal["ok", "raised", "oom", "timeout", "compile", "crashed", "wrong", "lost"]  # of a timing
TIE_BAND = 0.01  # winners closer than this are tied: of gaps of 0.25 to 1 %, 8 in 100 turn round in a second run
ENOUGH = 3  # samples: fewer prove nothing
ERROR = 1.2533 * 1.4826  # standard error of a median of n normal samples, in MAD/√n
BAND, ERRORS = 1 + TIE_BAND, 4 * ERROR * ERROR


class Entry(NamedTuple):
    """The timing of one usable candidate; its µs are above 0. Entries sort by time, then by name."""

    us: float
    name: str
    mad: float | None  # unknown where None
    n: int
    default: bool = False


class Decision(NamedTuple):
    """What the rule decides for some entries.

    Attributes:
        won: the winner.
        default_us: time of the static default; None if it has none.
        tied: number of entries that the winner is not proved faster than, itself included.
        runner_up_us: the best time of those that the winner is proved faster than; None if there are none.
    """

    won: Entry
    default_us: float | None
    tied: int
    runner_up_us: float | None


def better(a: Entry, b: Entry) -> bool:
    """Whether `a` is proved faster than `b`: by more than the tie band, and by more than two standard errors of the
    difference. If either is measured badly, nothing is proved."""
    us, _, mad, n, _ = a
    slow, _, spread, count, _ = b
    if us * BAND >= slow or n < ENOUGH or count < ENOUGH or mad is None or spread is None:
        return False
    apart = slow - us
    return apart * apart > ERRORS * (mad * mad / n + spread * spread / count)


def decide(entries: Iterable[Entry]) -> Decision:
    """The fastest of those that are proved faster than the static default. If there is none, the default. Without a
    timing of the default, the fastest of those with ENOUGH samples, else of all. Equal times go by name.

    If there are several defaults, the fastest counts, so no winner is ever slower than any of them.
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
    """µs by name, for choices that rest on several problems. An entry that is faster than the static default, but not
    proved so, counts as a hair slower than it. So the default goes first."""
    order = sorted(entries)
    default = next((each for each in order if each.default), None)
    if default is None:
        return {each.name: each.us for each in order}
    behind = math.nextafter(default.us, math.inf)
    slow = {each.name for each in order if each.us < behind and each != default and not better(each, default)}
    return {each.name: behind if each.name in slow else each.us for each in order}
