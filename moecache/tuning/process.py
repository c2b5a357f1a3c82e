"""One subprocess that answers each line with a line; killed when it takes too long, started anew when it is gone.

`Process` is the parent's end, `serve` the other. What kernels and compilers print there goes to stderr. A request and
its answer carry a number: what an interpreter prints at its start answers nothing.
"""

import contextlib
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from moecache.schemas.errors import MoecacheError
from moecache.tuning.failing import Failed

MARK = b"\x1emoecache "  # before the number of every answer; that of the first, which says that it is ready, is 0
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # nothing in a kernel ends a process so
START_SECONDS = 120.0  # importing torch and Triton takes 3 s, much longer on a busy disk


class Killed(Failed):
    """A helper was ended from outside, as where memory is short: that says nothing of its job, whose status is lost."""


class Process:
    """`python -m module`, which calls `serve`."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - its stderr, which shares the offset
        self._rest, self._ready, self._number = b"", False, 0

    def start(self) -> None:
        """Start it, unless it runs, without waiting for it."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
            start_new_session=True,  # a Ctrl-C is ours alone, and ptxas ends with it
        )
        self._rest, self._ready, self._number = b"", False, 0

    def ask(self, request: bytes, seconds: float, deadline: float) -> bytes | None:
        """The answer; None when the deadline, on the scale of time.perf_counter, came first.

        Raises:
            Failed: it died, or gave no answer within `seconds` and was killed; as Killed where somebody else ended it,
                and the one that was asked again.
            MoecacheError: it cannot be started.
        """
        try:
            return self._ask(request, seconds, deadline)
        except Killed:
            return self._ask(request, seconds, deadline)

    def _ask(self, request: bytes, seconds: float, deadline: float) -> bytes | None:
        process = self._started()
        self._errors.seek(0)
        self._errors.truncate()
        limit = min(seconds, deadline - time.perf_counter())
        if limit <= 0:
            return None
        line: bytes | None = b""
        with contextlib.suppress(BrokenPipeError):  # it died before it read the request
            assert process.stdin is not None
            self._number += 1
            process.stdin.write(b"%d %s\n" % (self._number, request))
            process.stdin.flush()
            line = self._line(process, limit)
        if line:
            return line
        outside = line is not None and _waited(process) in FROM_OUTSIDE
        code = self.stop()
        if outside:
            raise Killed("lost", f"the process {_ending(code)}, from outside: {self._said()}".rstrip(": "))
        if line is not None:
            raise Failed("crashed", f"the process {_ending(code)}: {self._said()}".rstrip(": "))
        if limit < seconds:
            return None
        raise Failed("timeout", f"no result after {seconds:g} s")

    def stop(self, patience: float = 0.0) -> int:
        """End it, if it does not do so itself, and all that it started; its exit code."""
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
        self.start()
        process = self._process
        assert process is not None
        if not self._ready and not self._line(process, START_SECONDS):
            code = self.stop(2.0)
            raise MoecacheError(f"a helper process cannot start: it {_ending(code)}: {self._said()}")
        self._ready = True
        return process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next answer; b'' when the process has closed its output, None when none came in time."""
        assert process.stdout is not None
        end, pipe, mark = time.perf_counter() + seconds, process.stdout.fileno(), MARK + b"%d " % self._number
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                *lines, self._rest = self._rest.split(b"\n")
                for line in lines:  # one at most answers: nothing more was asked
                    if mark in line:
                        return line.partition(mark)[2]
                if not selector.select(max(0.0, end - time.perf_counter())):
                    return None
                chunk = os.read(pipe, 1 << 16)
                if not chunk:
                    return b""
                self._rest += chunk

    def _said(self) -> str:
        """The end of what it wrote to stderr, on one line."""
        self._errors.seek(0)
        return " ".join(self._errors.read().decode(errors="replace").split())[-300:]


def serve(work: Callable[[str], str]) -> None:
    """Answer lines until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    answers.write(f"{MARK.decode()}0 ready\n")
    while True:
        number, _, request = requests.get().partition(" ")
        answers.write(f"{MARK.decode()}{number} {work(request)}\n")


def _listen(requests: "queue.SimpleQueue[str]") -> None:
    """Feed the main thread; when the parent is gone, end at once, whatever is running."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def stop_all(processes: list[Process], owner: int) -> None:
    """End them and empty the list; not in a forked child of the process `owner`, which started them."""
    if os.getpid() == owner:
        while processes:
            processes.pop().stop()


def _waited(process: "subprocess.Popen[bytes]") -> int:
    """The signal that ended a process which has closed its output; 0 where none did, or it goes on."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return max(0, -process.wait(2.0))
    return 0


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
