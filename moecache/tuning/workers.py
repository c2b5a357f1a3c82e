"""A pool of subprocesses that try candidates, so that a compiler's crash or a hang kills only one of them."""

import contextlib
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from moecache.schemas.errors import MoecacheError
from moecache.tuning.trial import Trial, Verdict

START_SECONDS = 120.0  # importing torch and Triton takes 3 s, much longer on a busy disk
CONTEXT_SECONDS = 20.0  # making a device context and loading libraries takes 1 to 5 s
COUNT = 8  # workers at most: each holds about 0.5 GB of memory


class Workers:
    """Workers start when first needed, use no processor time while they wait, and end with the pool.

    Args:
        count: how many; default: one a core that this process may use, at most COUNT.
    """

    def __init__(self, count: int | None = None) -> None:
        self._count = count or min(COUNT, len(os.sched_getaffinity(0)))
        self._idle: list[_Worker] = []
        self._all: list[_Worker] = []
        self._lock = threading.Lock()
        self._device = threading.Lock()  # one trial at a time runs on the device; compiling goes on beside it
        self._finalizer = weakref.finalize(self, _stop_all, self._all, os.getpid())

    def run(
        self,
        trials: Sequence[Trial],
        *,
        compile_seconds: float = 60.0,
        call_seconds: float = 10.0,
        deadline: float = math.inf,
    ) -> list[Verdict | None]:
        """Try all, in parallel; in their order, None for those that the deadline came before.

        Args:
            compile_seconds: limit of one compilation; a worker that exceeds it is killed.
            call_seconds: limit of one run, beside CONTEXT_SECONDS for the first touch of a device.
            deadline: on the scale of time.perf_counter; it does not stop the first two.

        Raises:
            MoecacheError: no worker can be started.
        """
        verdicts: list[Verdict | None] = [None] * len(trials)
        errors: list[BaseException] = []
        todo = deque(range(len(trials)))
        limits = (compile_seconds, call_seconds + CONTEXT_SECONDS)

        def serve() -> None:
            try:
                while todo:
                    i = todo.popleft()
                    verdicts[i] = self._try(trials[i], limits, math.inf if i < 2 else deadline)
            except IndexError:  # another thread took the last one
                pass
            except BaseException as error:
                errors.append(error)
                todo.clear()

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(self._count, len(trials)))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C: leave nothing behind
            todo.clear()
            self.close()
            raise
        if errors:
            raise errors[0]
        return verdicts

    def close(self) -> None:
        """End every worker. The pool can be used again: it starts new ones."""
        with self._lock:
            self._idle.clear()
            _stop_all(self._all, os.getpid())

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _try(self, trial: Trial, limits: tuple[float, float], deadline: float) -> Verdict | None:
        if time.perf_counter() > deadline:
            return None
        worker = self._take()
        verdict = worker.ask(trial.model_copy(update={"backend": ""}), limits[0], deadline)
        if verdict is not None and verdict.status == "ok" and trial.backend:
            with self._device:
                verdict = worker.ask(trial, limits[1], deadline)
            if verdict is not None and verdict.status != "ok" and trial.backend != "cpu":
                worker.stop()  # its device context may be broken
        with self._lock:
            self._idle.append(worker)
        return verdict

    def _take(self) -> "_Worker":
        with self._lock:
            if self._idle:
                return self._idle.pop()
            worker = _Worker()
            self._all.append(worker)
            return worker


class _Worker:
    """One subprocess, restarted when it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - its stderr, which shares the offset
        self._rest = b""

    def ask(self, trial: Trial, seconds: float, deadline: float) -> Verdict | None:
        """The verdict; None when the deadline came first."""
        process = self._started()
        self._errors.seek(0)
        self._errors.truncate()
        limit = min(seconds, deadline - time.perf_counter())
        if limit <= 0:
            return None
        line: bytes | None = b""
        with contextlib.suppress(BrokenPipeError):  # it died before it read the request
            assert process.stdin is not None
            process.stdin.write(trial.model_dump_json().encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, limit)
        if line:
            return Verdict.model_validate_json(line)
        code = self.stop(0.0 if line is None else 2.0)
        if line is None:
            return Verdict(status="timeout", reason=f"no result after {seconds:g} s") if limit == seconds else None
        return Verdict(status="crashed", reason=f"the trial process {_ending(code)}: {self._said()}".rstrip(": "))

    def stop(self, patience: float = 0.0) -> int:
        """End the process, if it does not do so itself, and all that it started; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:  # not reaped yet, so its number is still its own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return process.returncode

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        self._rest = b""
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moecache.tuning.trial"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
            start_new_session=True,  # a Ctrl-C is ours alone, and ptxas ends with the worker
        )  # fmt: skip
        if not self._line(self._process, START_SECONDS):
            code = self.stop(2.0)
            raise MoecacheError(f"a trial process cannot start: it {_ending(code)}: {self._said()}")
        return self._process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next line; b'' when the process has closed its output, None when none came in time."""
        assert process.stdout is not None
        end, pipe = time.perf_counter() + seconds, process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, end - time.perf_counter())):
                    return None
                chunk = os.read(pipe, 1 << 16)
                if not chunk:
                    return b""
                self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _said(self) -> str:
        """The end of what it wrote to stderr, on one line."""
        self._errors.seek(0)
        return " ".join(self._errors.read().decode(errors="replace").split())[-300:]


def _stop_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not end its parent's workers
        while workers:
            workers.pop().stop()


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
