"""One subprocess that does one job after the other; killed when one takes too long, started anew when it is gone.

`Process` is the parent's end, `serve` the other. What interpreters, kernels and compilers print there goes to stderr.
"""

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any

from moecache.schemas.errors import MoecacheError
from moecache.tuning.failing import Failed, failure

FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # nothing in a kernel ends a process so
START_SECONDS = 120.0  # importing torch and Triton takes 3 s, much longer on a busy disk


class Killed(Failed):
    """A helper was ended from outside, as where memory is short: that says nothing of its job, whose status is lost."""


class Process:
    """`python -m module`, which calls `serve`."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - its stderr, which shares the offset
        self._ready = False

    def start(self) -> None:
        """Start it, unless it runs, without waiting for it."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
                start_new_session=True,  # a Ctrl-C is ours alone, and ptxas ends with it
            )
        self._ready = False

    def ask(self, request: bytes, seconds: float, deadline: float = math.inf) -> bool:
        """Whether it has done that; False when the deadline, on the scale of time.perf_counter, came first.

        Raises:
            Failed: it could not, died, or took more than `seconds` and was killed; as Killed where somebody else ended
                it, and the one that was asked again.
            MoecacheError: it cannot be started.
        """
        try:
            answer = self._ask(request, seconds, deadline)
        except Killed:
            answer = self._ask(request, seconds, deadline)
        if answer is None:
            return False
        status, reason = json.loads(answer)
        if status != "ok":
            raise Failed(status, reason)
        return True

    def _ask(self, request: bytes, seconds: float, deadline: float) -> bytes | None:
        self._begin()
        self._errors.seek(0)
        self._errors.truncate()
        limit = min(seconds, deadline - time.perf_counter())
        if limit <= 0:
            return None
        if answer := self._answer(limit, request):
            return answer
        if answer is None:
            self.stop()
            if limit < seconds:
                return None
            raise Failed("timeout", f"no result after {seconds:g} s")
        code = self.stop(2.0)
        told, said = f"the process {_ending(code)}", self._said()
        if code is not None and -code in FROM_OUTSIDE:
            raise Killed("lost", f"{told}, from outside: {said}".rstrip(": "))
        raise Failed("crashed", f"{told}: {said}".rstrip(": "))

    def stop(self, patience: float = 0.0) -> int | None:
        """End it, if it does not do so itself, and all that it started; its exit code, None where it did not."""
        process, self._process = self._process, None
        if process is None:
            return None
        code = None
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:  # not reaped yet, so its number is still its own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._pipe is not None:
            self._pipe.close()
        return code

    def _begin(self) -> None:
        """Start it, unless it runs, and wait until it is ready."""
        self.start()
        if not self._ready and not self._answer(START_SECONDS):
            code = self.stop(2.0)
            raise MoecacheError(f"a helper process cannot start: it {_ending(code)}: {self._said()}")
        self._ready = True

    def _answer(self, seconds: float, request: bytes = b"") -> bytes | None:
        """The answer to a request, or the word that it is ready; b'' when it is gone, None when none came in time."""
        assert self._pipe is not None
        try:
            if request:
                self._pipe.send_bytes(request)
            return self._pipe.recv_bytes() if self._pipe.poll(seconds) else None
        except (EOFError, OSError):
            return b""

    def _said(self) -> str:
        """The end of what it wrote to stderr, on one line."""
        self._errors.seek(0)
        return " ".join(self._errors.read().decode(errors="replace").split())[-300:]


def serve(work: Callable[[bytes], None]) -> None:
    """Do what is asked, and answer how it ended, until the parent is gone; then end at once, whatever is running."""
    pipe: Connection[Any, Any] = Connection(int(sys.argv[1]))
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, requests), daemon=True).start()
    pipe.send_bytes(b"ready")
    while True:
        answer = "ok", ""
        try:
            work(requests.get())
        except (Exception, SystemExit) as error:
            failed = failure(error)
            answer = failed.status, failed.reason
        pipe.send_bytes(json.dumps(answer).encode())


def _listen(pipe: "Connection[Any, Any]", requests: "queue.SimpleQueue[bytes]") -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            requests.put(pipe.recv_bytes())
    os._exit(0)


def stop_all(processes: list[Process], owner: int) -> None:
    """End them and empty the list; not in a forked child of the process `owner`, which started them."""
    if os.getpid() == owner:
        while processes:
            processes.pop().stop()


def _ending(code: int | None) -> str:
    if code is None:
        return "did not answer"
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
