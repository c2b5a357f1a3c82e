"""Makes the calls of candidates in a thread that can be left behind when one hangs."""

import atexit
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch

from moecache.backends.contract import Backend
from moecache.kernels.own_mode import own_mode
from moecache.schemas.errors import DeviceError, DeviceLost
from moecache.tuning.failing import Failed, failure

T = TypeVar("T")
GRACE = 1.0  # seconds beyond a call's limit: a wait for the device gives up first, and says more
PATIENCE = 5.0  # seconds that the end of the process waits for threads that were left: within torch they would abort it

_left: list[threading.Thread] = []  # still at work when they were given up

# What a device or an allocator does to a call. Anything else that is no Failed is an error of our own code.
FAULTS = (DeviceError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


class CallThread:
    """One daemon thread for all calls, on the caller's device and stream.

    Not one a call: a thread that computes first builds its own pool of CPU threads, and that would be timed.
    """

    def __init__(self, stream: "torch.cuda.Stream | None" = None) -> None:
        self._stream = stream
        self._todo: queue.SimpleQueue[Any] | None = None

    def __call__(self, work: Callable[[], T], seconds: float, grace: float = GRACE) -> T:
        """The result of `work`.

        Raises:
            Failed: it raised that, met a fault of the device, or took too long; then its thread is given up.
            DeviceLost: it waited in vain for the device.
        """
        if self._todo is None:
            self._todo = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._serve, args=(self._todo,), daemon=True, name="moecache calls")
            self._thread.start()
        answer: Future[T] = Future()
        self._todo.put((work, answer))
        if not wait([answer], seconds + grace).done:
            self.close()
            _left.append(self._thread)
            raise Failed("timeout", f"no result after {seconds:g} s")
        try:
            return answer.result()
        except DeviceLost:
            raise
        except FAULTS as error:
            raise failure(error) from error

    def close(self) -> None:
        """Let the thread end after what it is doing. The next call starts another."""
        if self._todo is not None:
            self._todo.put(None)
            self._todo = None

    def _serve(self, todo: "queue.SimpleQueue[Any]") -> None:
        place = contextlib.ExitStack()  # device, stream and gradient mode belong to a thread
        if self._stream is not None:
            place.enter_context(torch.cuda.stream(self._stream))
        with place, torch.no_grad():
            while (item := todo.get()) is not None:
                work, answer = item
                try:
                    answer.set_result(work())
                except BaseException as error:  # sys.exit, say: a Ctrl-C reaches the main thread, not this one
                    answer.set_exception(error if isinstance(error, Exception) else failure(error))
                del item, work, answer  # an idle thread must not keep tensors alive


def _wait() -> None:
    end = time.monotonic() + PATIENCE
    for thread in _left:
        thread.join(max(0.0, end - time.monotonic()))


atexit.register(_wait)


@contextlib.contextmanager
def surroundings(backend: Backend, topk_ids: torch.Tensor) -> Iterator["torch.cuda.Stream | None"]:
    """The current stream of the device of `topk_ids`, its work done, and that device current, in torch's default mode;
    random generators as they were afterwards."""
    devices = [topk_ids.get_device()] if topk_ids.is_cuda else []
    with backend.current(devices[0] if devices else 0), torch.random.fork_rng(devices=devices), own_mode():
        backend.synchronize()
        yield torch.cuda.current_stream(devices[0]) if devices else None
