"""The only clock: samples of one candidate with cold caches, and the race that decides how many each gets.

Everything here that changes a timing is part of the measuring policy: raise `schemas.timing.POLICY` with it.
"""

import math
import statistics
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Protocol

from moecache.backends.contract import Backend, Event
from moecache.schemas.device import Device
from moecache.schemas.errors import DeviceLost
from moecache.schemas.rule import BAND, ENOUGH, ERROR
from moecache.tuning.failing import Failed

Call = Callable[[], object]
Sampler = Callable[[], float]
Steps = Generator[float, Any, Sampler]

COLD = 2  # rotated input sets hold this many last-level caches: no call finds its own inputs cached
COPIES = 128  # sets at most: inputs of a few KB would want thousands
SAMPLE_US = 200.0  # a sample lasts at least this long: events resolve about 0.5 µs
GRAPH_CALLS = 20  # calls in a graph at most, but for one of each set
LONG_US = 1000.0  # a graph this long is enough: its launch (about 10 µs) hides behind the replay before it
LEAD_US = 4_000.0  # up to here an untimed replay keeps the device busy while the timed one is launched

USABLE = ENOUGH  # after so many rounds the slow are dropped
SLOW = 1.5  # this many times slower than the best is slow
FIRST, STEP = 8, 6  # rounds before the first halving, and between halvings
BEHIND = 1.15  # slower than this after FIRST rounds, by the medians, leaves too: ten standard errors
FINALISTS = 6  # beside those that are kept anyway
MINIMUM, CAP = 24, 72  # rounds of a finalist; spreads of up to 3.5 % settle within CAP
ENOUGH_US = 200_000.0  # of calls so long fewer rounds will do, once they are settled
NOISE = 0.005  # relative standard error of a median at which a finalist is settled
CONTENDS = 1.10  # a finalist slower than this gets MINIMUM rounds and no more


class Clock(Protocol):
    """Turns calls into samples."""

    def copies(self, set_bytes: int) -> int:
        """How many input sets of this size to rotate."""

    def prepare(self, calls: Sequence[Call]) -> Sampler:
        """A function that takes one sample: µs of a call, averaged over `calls`, which differ in inputs."""

    def steps(self, calls: Sequence[Call]) -> Steps:
        """As `prepare`, for ranks that make all calls together, so that all make as many: it yields each time by which
        it decides, and is sent the one that all decide by."""


@dataclass(frozen=True)
class Stats:
    """Median and median absolute deviation of n samples, in µs."""

    median: float
    mad: float
    n: int

    @property
    def noise(self) -> float:
        """Standard error of the median, relative to it, as of normal samples."""
        return ERROR * self.mad / math.sqrt(self.n) / self.median


def stats(samples: Sequence[float]) -> Stats:
    """Of at least one sample."""
    median = statistics.median(samples)
    return Stats(median, statistics.median(abs(s - median) for s in samples), len(samples))


def wait(backend: Backend, seconds: float, event: Event | None = None) -> None:
    """Wait until the device has passed `event`, or all work issued so far. Polls, so that a hang can be left.

    Raises:
        DeviceLost: it has not after `seconds`.
    """
    if event is None:
        event = backend.event()
        event.record()
    deadline = time.perf_counter() + seconds
    pause = 0.0
    while not event.done():
        if time.perf_counter() > deadline:
            raise DeviceLost(f"the device has not finished a call after {seconds:g} s; restart the process")
        time.sleep(pause)
        pause = min(pause + 1e-6, 1e-3)


class DeviceClock:
    """Device events on the current stream; a replayed graph where calls can be captured, else plain calls.

    Args:
        memory_bytes: what all rotated sets together may take.
        seconds: a sample that takes longer raises DeviceLost.
    """

    def __init__(self, backend: Backend, device: Device, *, memory_bytes: int = 2 << 30, seconds: float = 10.0) -> None:
        self._backend = backend
        self._cold_bytes = COLD * device.llc_bytes
        self._memory_bytes = memory_bytes
        self._seconds = seconds

    def copies(self, set_bytes: int) -> int:
        """Enough to exceed the last-level cache, within the memory budget; always at least one."""
        size = max(1, set_bytes)
        return max(1, min(math.ceil(self._cold_bytes / size), self._memory_bytes // size, COPIES))

    def prepare(self, calls: Sequence[Call]) -> Sampler:
        """See Clock."""
        steps, us = self.steps(calls), None
        try:
            while True:
                us = steps.send(us)
        except StopIteration as done:
            sampler: Sampler = done.value
            return sampler

    def steps(self, calls: Sequence[Call]) -> Steps:
        """See Clock. The first call may compile, so it is never timed. The untimed replay before a timed one also takes
        up what ranks start apart."""
        calls[0]()
        wait(self._backend, self._seconds)
        estimate = yield self._sample(calls[-1], 1)
        turns = math.ceil(min(GRAPH_CALLS, LONG_US / estimate) / len(calls))
        count = turns * len(calls)
        replay = self._backend.graph(lambda: [call() for call in islice(cycle(calls), count)])
        if replay is None:
            turn = cycle(calls)
            return lambda: self._sample(lambda: next(turn)(), _repeats(estimate))
        once = yield self._sample(replay, 1)
        lead = once < LEAD_US
        repeats = 1 if once > 2 * SAMPLE_US else _repeats((yield self._sample(replay, 1, lead)))
        return lambda: self._sample(replay, repeats, lead) / count

    def _sample(self, call: Call, repeats: int, lead: bool = False) -> float:
        """µs per call of `repeats` calls in a row, behind an untimed one if `lead`."""
        start, end = self._backend.event(), self._backend.event()
        if lead:
            call()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        wait(self._backend, self._seconds, end)
        return max(start.elapsed_us(end), 1e-3) / repeats


def _repeats(microseconds: float) -> int:
    return max(1, min(100, math.ceil(SAMPLE_US / microseconds)))


def race(
    samplers: Mapping[str, Sampler],
    *,
    keep: Collection[str] = (),
    deadline: float = math.inf,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Stats]:
    """Interleaved round-robin, successive halving, then a paired final. What failed, or was cut short by the deadline,
    is not in the result.

    Args:
        samplers: by name of the candidate, in order of importance: the first two get samples even when the deadline has
            passed.
        keep: names that reach the final whatever they cost (the default and the incumbent).
        deadline: on the scale of `now`.
    """
    field = _Field(samplers, deadline, now)
    field.rounds(USABLE)
    field.narrow([name for name in field.live if name in keep or not field.slow(name)])
    field.rounds(FIRST - USABLE)
    field.narrow({*field.contenders(BEHIND), *keep})
    while len(rest := [name for name in field.ranked() if name not in keep]) > FINALISTS and not field.late():
        field.narrow([*rest[: max(FINALISTS, math.ceil(len(rest) / 2))], *keep])
        field.rounds(STEP)
    while not field.late() and field.round < MINIMUM and not field.enough():
        field.rounds(1)
    field.narrow({*field.contenders(CONTENDS), *(set(keep) & field.undecided())})
    while not field.late() and field.round < CAP and not field.settled():
        field.rounds(1)
        field.narrow(field.undecided())
    return field.result()


class _Field:
    """Samples of a running race, in rounds: sample i of every candidate was taken in round i."""

    def __init__(self, samplers: Mapping[str, Sampler], deadline: float, now: Callable[[], float]) -> None:
        self.live = list(samplers)
        self.samples: dict[str, list[float]] = {name: [] for name in samplers}
        self.round = 0
        self._samplers, self._sure = samplers, self.live[:2]
        self._deadline, self._now = deadline, now

    def late(self) -> bool:
        return self._now() > self._deadline

    def narrow(self, names: Collection[str]) -> None:
        """Only these stay."""
        self.live = [name for name in self.live if name in names]

    def rounds(self, count: int) -> None:
        """Up to `count` more samples of every live candidate, in changing order: no fixed neighbours."""
        for _ in range(count):
            shift = self.round % max(1, len(self.live))
            order = self.live[shift:] + self.live[:shift]
            for name in reversed(order) if self.round % 2 else order:
                self._take(name)
            self.round += 1

    def _take(self, name: str) -> None:
        if self.late() and not (name in self._sure and len(self.samples[name]) < USABLE):
            return
        try:
            self.samples[name].append(self._samplers[name]())
        except Failed:
            del self.samples[name]
            self.live.remove(name)

    def slow(self, name: str) -> bool:
        """Far behind already; the best sample of each counts, as one hiccup must not end a good candidate."""
        lowest = {n: min(self.samples[n]) for n in self.live if self.samples[n]}
        return name in lowest and lowest[name] > SLOW * min(lowest.values())

    def ranked(self) -> list[str]:
        """Live names, best median first."""
        measured = [name for name in self.live if self.samples[name]]
        return sorted(measured, key=self._median)

    def contenders(self, factor: float) -> list[str]:
        """Live names within that factor of the best."""
        ranked = self.ranked()
        return [name for name in ranked if self._median(name) <= factor * self._median(ranked[0])]

    def undecided(self) -> set[str]:
        """Live names that the best may not be proved faster than, by two standard errors of either: `schemas.rule`
        allows less, but is asked once, and this after each round."""
        found = {name: stats(self.samples[name]) for name in self.ranked()}
        if not found:
            return set()
        best = min(found.values(), key=lambda s: s.median)
        band = (BAND + 2 * best.noise) * best.median
        return {name for name, s in found.items() if s.median * (1 - 2 * s.noise) <= band}

    def settled(self) -> bool:
        return all(stats(self.samples[name]).noise <= NOISE for name in self.live)

    def enough(self) -> bool:
        return self.settled() and all(sum(self.samples[name]) >= ENOUGH_US for name in self.live)

    def result(self) -> dict[str, Stats]:
        """Of those with enough samples.

        The finalists were in every round, so they are paired. The device drifts (clocks, heat): what left
        early is scaled by how the finalists changed since then.
        """
        found = {}
        for name, samples in self.samples.items():
            if len(samples) >= USABLE:
                raw, drift = stats(samples), self._drift(len(samples))
                found[name] = Stats(raw.median * drift, raw.mad * drift, raw.n)
        return found

    def _drift(self, rounds: int) -> float:
        """How much slower the finalists are over all rounds than over the first ones."""
        ratios = [self._median(n) / statistics.median(self.samples[n][:rounds]) for n in self.ranked()]
        return statistics.median(ratios) if ratios else 1.0

    def _median(self, name: str) -> float:
        return statistics.median(self.samples[name])
