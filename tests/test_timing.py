"""The race on a simulated clock, and the device clock on a simulated device and on this processor."""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecache.backends.cpu import CpuBackend
from moecache.schemas.device import Device
from moecache.schemas.errors import DeviceLost
from moecache.tuning import timing
from moecache.tuning.failing import Failed
from moecache.tuning.timing import CAP, MINIMUM, USABLE, DeviceClock, race, stats


def measure(clock: DeviceClock, calls: Sequence[Callable[[], object]], deadline: float = math.inf) -> timing.Stats:
    """The median of one thing alone: a race with one entry."""
    return race({"": clock.prepare(calls)}, deadline=deadline)[""]


class Bench:
    """Candidates with true times, measured by a noisy, drifting clock that is also the time of day."""

    def __init__(self, true: dict[str, float], seed: int = 0, spread: float = 0.0, drift: float = 0.0) -> None:
        self.true, self.spread, self.drift = true, spread, drift
        self.rng = random.Random(seed)
        self.order: list[str] = []

    def sample(self, name: str) -> Callable[[], float]:
        def take() -> float:
            self.order.append(name)
            slower = 1 + self.drift * len(self.order)
            return self.true[name] * slower * (1 + self.rng.gauss(0, self.spread))

        return take

    def run(self, keep: Sequence[str] = (), deadline: float = math.inf) -> dict[str, timing.Stats]:
        samplers = {name: self.sample(name) for name in self.true}
        return race(samplers, keep=keep, deadline=deadline, now=lambda: float(len(self.order)))


def test_stats() -> None:
    found = stats([10.0, 12.0, 11.0, 50.0, 10.0])
    assert (found.median, found.mad, found.n) == (11.0, 1.0, 5)
    assert found.noise == pytest.approx(1.2533 * 1.4826 * 1.0 / math.sqrt(5) / 11.0)


def test_slow_ones_leave_early_unless_kept() -> None:
    bench = Bench({"default": 400.0, "a": 10.0, "b": 11.0, "c": 14.0, "d": 16.0, "e": 500.0})
    found = bench.run(keep=["default"])
    rounds = {"default": MINIMUM, "a": MINIMUM, "b": MINIMUM, "c": timing.FIRST, "d": USABLE, "e": USABLE}
    assert {name: s.n for name, s in found.items()} == rounds
    assert found["e"].median == 500.0 and found["d"].median == 16.0


def test_halving_spends_samples_on_the_best_and_on_the_kept() -> None:
    bench = Bench({"default": 19.0} | {f"c{i:02}": 10.0 + i * 0.09 for i in range(16)}, spread=0.002)
    found = bench.run(keep=["default"])
    counts = [found[f"c{i:02}"].n for i in range(16)]
    assert counts == sorted(counts, reverse=True) and counts[0] >= MINIMUM and counts[-1] == timing.FIRST
    assert sum(n >= MINIMUM for n in counts) == timing.FINALISTS  # 16 -> 8 -> 6
    assert found["default"].n == MINIMUM


def test_a_race_stops_when_settled_and_at_the_cap() -> None:
    assert Bench({"a": 10.0, "b": 10.1}, spread=0.001).run()["a"].n == MINIMUM
    middling = Bench({"a": 10.0, "b": 10.1}, spread=0.03).run()["a"]
    assert MINIMUM < middling.n < CAP and middling.noise <= timing.NOISE
    wild = Bench({"a": 10.0, "b": 10.1}, spread=0.2).run()
    assert wild["a"].n == wild["b"].n == CAP


def test_long_calls_need_fewer_rounds_once_they_are_settled() -> None:
    quiet = Bench({"a": 20_000.0, "b": 20_500.0, "c": 29_000.0}, spread=0.001).run()
    assert [quiet[name].n for name in "abc"] == [timing.ENOUGH_US // 20_000, timing.ENOUGH_US // 20_000, timing.FIRST]
    assert Bench({"a": 20_000.0}, spread=0.03).run()["a"].n >= MINIMUM, "noisy ones do"


def test_rounds_interleave_in_changing_order() -> None:
    bench = Bench({name: 10.0 for name in "abcde"})
    bench.run()
    rounds = ["".join(bench.order[i : i + 5]) for i in range(0, len(bench.order), 5)]
    assert all(sorted(r) == list("abcde") for r in rounds)
    neighbours = {pair for r in rounds for pair in itertools.pairwise(r)}
    assert len(set(rounds)) == 10 and {("a", "b"), ("b", "a"), ("e", "a")} <= neighbours


def test_drift_does_not_favour_those_who_left_early() -> None:
    """The device slows down by a third; whoever was measured only at the start must not look fast for it."""
    true = {f"c{i:02}": 10.0 * (1 + 0.03 * i) for i in range(16)}
    bench = Bench(true, spread=0.002, drift=0.001)
    found = bench.run()
    last = max(found, key=lambda name: true[name])
    assert found[last].n < MINIMUM, "the case is only interesting for one that left early"
    for name, s in found.items():
        assert s.median / found["c00"].median == pytest.approx(true[name] / true["c00"], rel=0.02), name


def test_deadline_still_tries_the_first_two() -> None:
    found = Bench({"default": 10.0, "other": 9.0, "third": 8.0}).run(deadline=-1.0)
    assert {name: s.n for name, s in found.items()} == {"default": USABLE, "other": USABLE}
    late = Bench({name: 10.0 for name in "abcd"}, spread=0.2)
    assert late.run(deadline=40.0) and len(late.order) <= 42, "the deadline holds in the final, too"


def test_failures_leave_and_other_errors_surface() -> None:
    bench = Bench({"a": 10.0, "b": 11.0, "c": 12.0})
    tries = iter(range(100))

    def fails_later() -> float:
        if next(tries) == 9:
            raise Failed("raised", "at last")
        return 9.0

    found = race({name: bench.sample(name) for name in bench.true} | {"bad": fails_later})
    assert set(found) == {"a", "b", "c"} and found["a"].n == MINIMUM
    with pytest.raises(ZeroDivisionError):
        race({"a": lambda: 1 / 0})


@settings(max_examples=60)
@given(st.lists(st.floats(1.0, 1000.0), min_size=1, max_size=30), st.integers(0, 3))
def test_without_noise_the_race_finds_the_best_and_measures_exactly(times: list[float], kept: int) -> None:
    true = {f"c{i:02}": us for i, us in enumerate(times)}
    found = Bench(true).run(keep=list(true)[:kept])
    assert set(found) == set(true)
    for name, s in found.items():
        assert s.median == pytest.approx(true[name]) and s.mad == pytest.approx(0, abs=1e-9)
    best = min(true, key=lambda name: true[name])
    assert found[best].n >= MINIMUM
    assert all(found[name].n >= MINIMUM for name in list(true)[:kept] if true[name] <= 1.1 * true[best])


# --- the device clock ---


class Machine:
    """A device that runs calls after a launch delay, with graphs; time passes only as it says."""

    name = "fake"

    def __init__(self, graphs: bool, launch_us: float = 10.0, hang_at: int | None = None) -> None:
        self.graphs, self.launch_us, self.hang_at = graphs, launch_us, hang_at
        self.host = self.busy = 0.0  # µs: what the host has reached, and when the device is done
        self.calls: list[str] = []
        self.recording: list[float] | None = None

    def kernel(self, us: float, name: str = "") -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            if self.recording is not None:
                self.recording.append(us)
            else:
                self.work(us)

        return call

    def work(self, us: float) -> None:
        self.host += self.launch_us
        self.busy = max(self.busy, self.host) + us

    def event(self) -> "Mark":
        return Mark(self)

    def capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.host = max(self.host, self.busy)

    def graph(self, call: Callable[[], object]) -> Callable[[], None] | None:
        if not self.graphs:
            return None
        self.recording = []
        call()
        total, self.recording = sum(self.recording), None
        return lambda: self.work(total)


class Mark:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.at = machine, 0.0

    def record(self) -> None:
        self.at = self.machine.busy = max(self.machine.busy, self.machine.host)

    def done(self) -> bool:
        if self.machine.hang_at is not None and len(self.machine.calls) >= self.machine.hang_at:
            return False
        self.machine.host = max(self.machine.host, self.at)
        return True

    def elapsed_us(self, end: "Mark") -> float:
        return end.at - self.at


def device(llc_bytes: int) -> Device:
    return Device(vendor="nvidia", arch="sm_90", name="fake", units=1, llc_bytes=llc_bytes)


def test_copies_exceed_the_cache_within_the_memory() -> None:
    clock = DeviceClock(Machine(True), device(60 << 20), memory_bytes=1 << 30)
    assert clock.copies(4 << 20) == 30  # 120 MiB
    assert clock.copies(1 << 30) == clock.copies(1 << 40) == 1
    assert clock.copies(0) == clock.copies(100) == timing.COPIES
    tight = DeviceClock(Machine(True), device(60 << 20), memory_bytes=32 << 20)
    assert tight.copies(10 << 20) == 3 and tight.copies(1 << 30) == 1
    assert DeviceClock(Machine(True), device(0)).copies(100) == 1, "unknown caches: nothing to rotate for"


@pytest.mark.parametrize("us", [1.5, 40.0, 800.0, 20_000.0])
def test_graphs_hide_the_launch(us: float) -> None:
    """Plain calls of a short kernel measure the launch; graphs measure the kernel."""
    machine = Machine(graphs=True)
    sample = DeviceClock(machine, device(0)).prepare([machine.kernel(us)] * 3)
    assert [sample() for _ in range(5)] == pytest.approx([us] * 5, rel=0.01)
    plain = Machine(graphs=False)
    assert DeviceClock(plain, device(0)).prepare([plain.kernel(us)] * 3)() == pytest.approx(max(us, 10), rel=0.3)


def test_every_set_is_rotated() -> None:
    for graphs in (True, False):
        machine = Machine(graphs)
        calls = [machine.kernel(5.0, name) for name in "abcdefg"]
        sample = DeviceClock(machine, device(0)).prepare(calls)
        machine.calls.clear()
        if graphs:  # recorded once: three turns through seven sets make up 20 calls
            DeviceClock(machine, device(0)).prepare(calls)
            assert "".join(machine.calls[2:]) == "abcdefg" * 3
        else:
            samples = [sample() for _ in range(4)]
            assert "".join(machine.calls).startswith("abcdefgabcdefg") and len(samples) == 4


def test_a_hang_is_left_with_a_clear_error() -> None:
    began = time.perf_counter()
    machine = Machine(graphs=False, hang_at=4)
    sample = DeviceClock(machine, device(0), seconds=0.2).prepare([machine.kernel(500.0)])
    with pytest.raises(DeviceLost, match=r"0\.2 s; restart"):
        for _ in range(4):
            sample()
    assert time.perf_counter() - began >= 0.2


def test_this_processor_is_timed_with_real_time() -> None:
    backend = CpuBackend()
    found = measure(
        DeviceClock(backend, backend.device()), [lambda: time.sleep(2e-3)], deadline=time.perf_counter() + 1
    )
    assert found.median >= 2000 and found.n >= USABLE
    ratio = [
        measure(
            DeviceClock(backend, backend.device()),
            [lambda n=n: sum(range(n))],
            deadline=time.perf_counter() + 1,
        ).median
        for n in (2_000, 200_000)
    ]
    assert ratio[1] / ratio[0] > 5  # 100 on a quiet machine


@pytest.mark.gpu
def test_graph_and_event_clock_agree_with_bandwidth() -> None:
    """On a real GPU a copy of 1 GiB has a plausible rate, and a small one is not timed as its launch."""
    import torch

    from moecache.backends.registry import detect

    backend = detect()
    clock = DeviceClock(backend, backend.device())
    big, out = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    us = measure(clock, [lambda: out.copy_(big)]).median
    assert 500 < (2 << 30) / us / 1e3 < 10_000, f"{us=}"  # GB/s
    small, tiny = (torch.empty(64, device="cuda") for _ in range(2))
    us = measure(clock, [lambda: tiny.copy_(small)] * 4).median
    assert 0.5 < us < 5.0, f"{us=}"
    assert statistics.median(clock.prepare([lambda: tiny.copy_(small)])() for _ in range(5)) == pytest.approx(
        us, rel=0.2
    )
