"""A forked child is served, whatever the threads of its parent were doing."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from samples import run

import moecache
from moecache.dispatch import using
from moecache.forks import Lock
from moecache.store import Store

IDS = torch.arange(32, dtype=torch.int32).reshape(16, 2) % 8
PATIENCE = 120  # seconds, of a machine that has much else to do


def child(work: Callable[[], bool]) -> int:
    """The exit code of a forked child: 0 where its work came out true."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads
        pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)
        torch.set_num_threads(1)  # torch's threads do not outlive a fork, whoever forks
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def busy(*works: Callable[[int], object]) -> Iterator[None]:
    """Threads that do their work again and again, with new numbers."""
    stop = threading.Event()

    def run(work: Callable[[int], object]) -> None:
        number = 0
        while not stop.is_set():
            work(number := number + 1)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


FIRST = """
import os, signal, sys, threading, time, warnings
import moecache
from moecache import forks
forks.PATIENCE_S = 120.0  # of a busy machine
threading.Thread(target=lambda: moecache.fused_moe).start()
while "moecache.ops" not in sys.modules:
    time.sleep(0.001)
warnings.simplefilter("ignore")
if (pid := os.fork()) == 0:
    signal.alarm(120)
    os._exit(0 if callable(moecache.fused_moe) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_child_of_a_process_that_is_importing_what_it_calls_first_does_not_wait_for_ever() -> None:
    assert run(FIRST) == "0"


def test_a_child_finds_a_lock_free_and_awaits_what_must_not_be_half_done() -> None:
    plain, whole, done = Lock(reentrant=False), Lock(awaited=True), []

    def hold() -> None:
        with plain, whole:
            held.set()
            time.sleep(0.3)
            done.append(True)

    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert child(lambda: done == [True] and plain.acquire(blocking=False) and whole.acquire(blocking=False)) == 0
    thread.join()
    assert plain.acquire(blocking=False) and not plain.acquire(blocking=False)
    assert whole.acquire(blocking=False) and whole.acquire(blocking=False), "the parent has given it back"


def test_children_are_served_beside_threads_that_make_layers_files_and_dispatchers(tmp_path: Path) -> None:
    def serves(number: int) -> bool:
        return int(moecache.moe_sort(IDS, 8 + number % 64, 16, layer=number).counts.sum()) == 32

    def another(number: int) -> None:
        with using(mode="replay", db=tmp_path / f"{number % 3}.sqlite"):
            pass

    def files(number: int) -> None:
        serving.lookup.tiers.user.wanted()

    with using(mode="tune", budget=0.0, db=tmp_path / "db.sqlite", path=()) as serving:
        assert serves(0)
        with busy(serves, files):
            assert [child(lambda n=n: serves(10**6 + n)) for n in range(4)] == [0] * 4  # type: ignore[misc]
    with using(mode="off"), busy(another):
        assert [child(lambda n=n: serves(n)) for n in range(2)] == [0] * 2  # type: ignore[misc]


def wrapped(name: str, other: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Doubles; its second config does it by `other`."""

    def double(x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        return other(x) if config["other"] else 2 * x

    return moecache.wrap(
        double, op=name, configs=[{"other": 0}, {"other": 1}], version="1",
        key=lambda x: {"tokens": x.shape[0], "dtype": x.dtype},
    )  # fmt: skip


def test_a_candidate_that_ends_its_process_is_known_to_the_next(tmp_path: Path) -> None:
    def crash(x: torch.Tensor) -> torch.Tensor:
        tried.touch()
        os.kill(os.getpid(), signal.SIGKILL)
        return x

    db, tried, call, x = tmp_path / "db.sqlite", tmp_path / "tried", wrapped("crashing", crash), torch.ones(64)

    def run() -> bool:
        with using(mode="tune", budget=2.0, db=db, path=()):
            return torch.equal(call(x), 2 * x)

    with Store.open(db):
        pass
    assert child(run) == -signal.SIGKILL and tried.exists()
    tried.unlink()
    assert child(run) == 0 and child(run) == 0 and not tried.exists()
    with Store.open(db) as store:
        found = {timing.config.params[0][1]: timing for timing in store.timings()}
    assert found[0].status == "ok" and found[1].status == "crashed" and "ended" in found[1].reason
    assert [path.name for path in tmp_path.iterdir()] == ["db.sqlite"], "no note stays"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseException])
def test_whatever_a_candidate_raises_is_its_failure(error: type[BaseException], tmp_path: Path) -> None:
    def stop(x: torch.Tensor) -> torch.Tensor:
        raise error("enough")

    call, x = wrapped(f"stops{error.__name__}", stop), torch.ones(64)
    with using(mode="tune", budget=2.0, db=tmp_path / "db.sqlite", path=()) as serving:
        assert torch.equal(call(x), 2 * x) and torch.equal(call(x), 2 * x)
        reasons = {timing.status: timing.reason for timing in serving.lookup.tiers.user.timings()}
    assert error.__name__ in reasons["raised"] and "ok" in reasons


def test_what_the_budget_does_not_suffice_for_is_wanted_and_no_failure(tmp_path: Path) -> None:
    calls = []

    def slow(x: torch.Tensor) -> torch.Tensor:
        calls.append("slow")
        time.sleep(1.0)
        return 2 * x

    def all_slow(x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        calls.append("all")
        time.sleep(0.5)
        return 2 * x

    one, x = wrapped("one-slow", slow), torch.ones(64)
    every = moecache.wrap(
        all_slow, op="all-slow", configs=[{"a": 1}, {"a": 2}], version="1", key=lambda x: {"tokens": x.shape[0]}
    )
    with using(mode="tune", budget=0.3, db=tmp_path / "db.sqlite", path=()) as serving:
        for call in (one, every):
            assert torch.equal(call(x), 2 * x)
        store = serving.lookup.tiers.user
        assert {problem.op for problem, _ in store.wanted()} == {"one-slow", "all-slow"}
        assert [t for t in store.timings() if t.status != "ok" or t.config.params == (("other", 1),)] == []
    assert calls.count("slow") <= 1 and calls.count("all") <= 2, "one reference and the call itself"
