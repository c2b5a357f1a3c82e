"""Times calls side by side: in captured graphs, with emptied caches, in rounds of alternating order."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moecache.backends.contract import Backend
from moecache.devices import Place
from moecache.tuning.timing import Stats, stats, wait

Call = Callable[[], Any]
FLUSH_BYTES = 256 << 20  # several times the L2 of an H200; writing it also hides the launch of the replay behind it
FEW, MANY = 10, 60  # replays of a round
PATIENCE = 60.0  # seconds for what is under way
READ_BYTES = 4 << 30


@dataclass(frozen=True)
class Recorded:
    """A call that can be repeated, and where its result is after each repetition."""

    run: Callable[[], None]
    result: Any
    graph: bool


class Bench:
    """Captures and times on one device.

    Args:
        rounds: each call is timed so many times, forth and back through the list.
        milliseconds: about how long the replays of a round take together.
    """

    def __init__(self, place: Place, rounds: int = 2, milliseconds: float = 25.0) -> None:
        if place.backend is None:
            raise ValueError(f"{place.device.name} is not in this machine")
        self.place = place
        self.backend: Backend = place.backend
        self._rounds, self._microseconds = rounds, milliseconds * 1e3
        size = FLUSH_BYTES if place.device.vendor != "cpu" else FLUSH_BYTES // 256  # there only to be exercised
        self._flush = torch.empty(size, dtype=torch.uint8, device=place.torch_device)

    def record(self, call: Call) -> Recorded:
        """The call in a graph, replayed once; the plain call where it cannot be captured."""
        kept: list[Any] = [None]

        def keep() -> None:
            kept[0] = call()

        keep()  # twice outside the capture: the first may tune or compile, the second may know more
        keep()
        self.backend.synchronize()
        replay = self.backend.graph(keep)
        run = replay or keep
        run()
        self.backend.synchronize()
        return Recorded(run, kept[0], replay is not None)

    def race(self, calls: dict[str, Recorded]) -> dict[str, Stats]:
        """Median and spread of each in µs."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        counts = {name: self._count(each) for name, each in calls.items()}
        for turn in range(self._rounds):
            for name in list(calls)[:: -1 if turn % 2 else 1]:
                samples[name] += self._samples(calls[name].run, counts[name])
        return {name: stats(taken) for name, taken in samples.items()}

    def sampler(self, call: Recorded) -> Callable[[], float]:
        """Takes one sample in µs, for a race of the tuner's."""
        return lambda: self._samples(call.run, 1)[0]

    def _count(self, call: Recorded) -> int:
        estimate = statistics.median(self._samples(call.run, 3))
        return int(min(MANY, max(FEW, self._microseconds / estimate)))

    def _samples(self, run: Callable[[], None], count: int) -> list[float]:
        pairs = [(self.backend.event(), self.backend.event()) for _ in range(count)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        wait(self.backend, PATIENCE, pairs[-1][1])
        return [max(start.elapsed_us(end), 1e-3) for start, end in pairs]


def bandwidth(bench: Bench, given: float | None) -> tuple[float, str]:
    """(GB/s of reading, where the figure is from): given, or known of the device, or measured now."""
    known = bench.place.device.bandwidth_gbs
    if given or known:
        return (given, "given") if given else (known, bench.place.device.rates_from)
    size = min(READ_BYTES, bench.place.device.memory_bytes // 64)
    data = torch.ones(size // 4, device=bench.place.torch_device)
    took = bench.race({"read": bench.record(data.sum)})["read"].median
    return round(size / took / 1e3, 1), "measured: the sum of float32"


def dense(x: torch.Tensor, w: torch.Tensor, out: torch.dtype) -> Call:
    """x [M, K] times w [N, K] transposed as the vendor's library does it: the time that so many FLOPs need."""
    if x.dtype.itemsize > 1:
        return lambda: torch.matmul(x, w.T)
    one = torch.ones((), device=x.device)
    return lambda: torch._scaled_mm(x, w.T, one, one, out_dtype=out, use_fast_accum=True)
