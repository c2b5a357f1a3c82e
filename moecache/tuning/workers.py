"""Subprocesses where candidates are compiled, all cores at once, and tried where that is wanted: what crashes or hangs
there costs one candidate."""

import contextlib
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from moecache.kernels.compile import is_compiled
from moecache.kernels.contract import Source
from moecache.schemas.device import Device
from moecache.tuning.check import Trial
from moecache.tuning.compiler import job
from moecache.tuning.failing import Failed
from moecache.tuning.process import Process, stop_all

COUNT = 16  # compiling processes at most: each holds about 0.2 GB of memory
IDLE_SECONDS = 30.0  # after which they end
CONTEXT_SECONDS = 20.0  # making a device context and loading libraries takes 1 to 5 s


@dataclass(frozen=True)
class _Job:
    request: bytes
    seconds: float
    done: "Future[None]"


class Workers:
    """Processes start when first needed, end when they have been idle, at the latest with the pool.

    Args:
        count: that compile; default: one a core that this process may use but its own, at most COUNT.
    """

    def __init__(self, count: int | None = None) -> None:
        self._count = count or max(1, min(COUNT, len(os.sched_getaffinity(0)) - 1))
        self._all: list[Process] = []
        self._trial = Process("moecache.tuning.trial")
        self._serving, self._idle, self._closed = 0, 0, False
        self._jobs: deque[_Job] = deque()
        self._known: dict[bytes, Future[None]] = {}
        self._news = threading.Condition()
        self._finalizer = weakref.finalize(self, stop_all, self._all, os.getpid())

    def start(self, device: Device, most: int = COUNT) -> None:
        """Start the compiling processes, so many at most: they need a second before they are ready, and a core each."""
        self._submit(job(None, device), 60.0)
        with self._news:
            self._closed = False
            while self._serving < min(self._count, most):
                self._serving += 1
                threading.Thread(target=self._serve, daemon=True, name="moecache compiling").start()

    def compile(self, sources: Iterable[Source], device: Device, seconds: float = 60.0) -> "list[Future[None]]":
        """Compile into Triton's disk cache, each kernel once, in the order of asking.

        Returns:
            One future for each kernel that another process can compile. It may raise Failed, also after `seconds`,
            CancelledError, or MoecacheError if no process can be started.
        """
        found = []
        for source in sources:
            if (request := job(source, device)) is not None:
                found.append(self._submit(request, seconds))
        if self._jobs:
            self.start(device, self._serving - self._idle + len(self._jobs))
        return found

    def complete(self, sources: Iterable[Source], device: Device) -> None:
        """Compile side by side what Triton's disk cache lacks, if that is more than one kernel, and wait for it. A
        failure is the launch's to tell."""
        missing = [source for source in sources if not is_compiled(source, device)]
        if len(missing) > 1:
            wait(self.compile(missing, device))

    def drop(self) -> None:
        """Forget what no process has begun."""
        with self._news:
            while self._jobs:
                left = self._jobs.pop()
                del self._known[left.request]
                left.done.cancel()
                left.done.set_running_or_notify_cancel()

    def run(self, trial: Trial, seconds: float, deadline: float = math.inf) -> bool:
        """Run one candidate in a subprocess of its own, beside CONTEXT_SECONDS for the first touch of a device.

        Returns:
            False when the deadline, on the scale of time.perf_counter, came first.

        Raises:
            Failed: it does not run, or gives a wrong result.
            MoecacheError: the process cannot be started.
        """
        if self._trial not in self._all:
            self._all.append(self._trial)
        try:
            return self._trial.ask(trial.model_dump_json().encode(), seconds + CONTEXT_SECONDS, deadline)
        except Failed:
            if trial.backend != "cpu":
                self._trial.stop()  # its device context may be broken
            raise

    def close(self) -> None:
        """End every process. The pool can be used again: it starts new ones."""
        with self._news:
            self.drop()
            self._known.clear()
            self._closed = True
            self._news.notify_all()
        stop_all(self._all, os.getpid())

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _submit(self, request: bytes | None, seconds: float) -> "Future[None]":
        assert request is not None
        with self._news:
            if request not in self._known:
                self._known[request] = Future()
                self._jobs.append(_Job(request, seconds, self._known[request]))
                self._news.notify()
            return self._known[request]

    def _serve(self) -> None:
        """One process and the thread that asks it, until there is nothing to do."""
        process = Process("moecache.tuning.compiler")
        self._all.append(process)
        with contextlib.suppress(OSError):  # the first job says so
            process.start()
        while (todo := self._next()) is not None:
            try:
                process.ask(todo.request, todo.seconds)
            except BaseException as error:
                todo.done.set_exception(error)
            else:
                todo.done.set_result(None)
        process.stop()

    def _next(self) -> _Job | None:
        with self._news:
            self._idle += 1
            self._news.wait_for(lambda: self._jobs or self._closed, timeout=IDLE_SECONDS)
            self._idle -= 1
            if self._jobs and not self._closed:
                return self._jobs.popleft()
            self._serving -= 1
            return None
