"""A forked child is served, whatever the threads of its parent were doing."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import moecache
from moecache.dispatch import using
from moecache.forks import Lock

IDS = torch.arange(32, dtype=torch.int32).reshape(16, 2) % 8
PATIENCE = 120  # seconds, of a machine that has much else to do


def child(work: Callable[[], bool]) -> int:
    """The exit code of a forked child: 0 where its work came out true."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads
        pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)
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
        serving.recall.tiers.wanted()

    with using(mode="tune", budget=0.0, db=tmp_path / "db.sqlite", path=()) as serving:
        assert serves(0)
        with busy(serves, files):
            assert [child(lambda n=n: serves(10**6 + n)) for n in range(4)] == [0] * 4  # type: ignore[misc]
    with using(mode="off"), busy(another):
        assert [child(lambda n=n: serves(n)) for n in range(2)] == [0] * 2  # type: ignore[misc]
