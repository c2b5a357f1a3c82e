"""What torch offers for a GPU of either vendor: its build, current stream, graphs, and a stand-in for events
and capture state where the vendor's binding fails. torch.cuda has one face for both, so nothing branches."""

import contextlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

from moecache.backends.contract import Event
from moecache.schemas.errors import DeviceError, NoDevice

# torch's pinned-memory allocator keeps a pointer to a graph whose capture failed: never free such a graph.
_refused: list[Any] = []


def build() -> str:
    """The backend that this torch launches kernels on: "cuda", "hip" or "cpu"."""
    try:
        import torch
    except Exception as error:  # absent or broken: a missing shared library raises OSError
        raise NoDevice(f"torch cannot be imported ({error}); moecache needs it to run kernels") from error
    return "hip" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"


def sees(backend: str) -> bool:
    """Whether this torch is built for the backend and finds a device."""
    import torch

    return build() == backend and torch.cuda.is_available()


def count(backend: str) -> int:
    """Devices that this torch can launch kernels on.

    Raises:
        NoDevice: torch is absent, built for something else, or finds no device.
    """
    built = build()
    import torch

    if built != backend:
        raise NoDevice(
            f"the driver has a device for {backend!r}, but torch {torch.__version__} is a {built!r} build "
            f"and cannot run kernels on it; install a torch built for {backend!r}"
        )
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        raise NoDevice(f"the driver has a device for {backend!r}, but torch {torch.__version__} finds none")
    return found


def active() -> bool:
    """Whether torch has touched a GPU in this process; until then no stream exists."""
    return "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()


def current(index: int) -> contextlib.AbstractContextManager[object]:
    """Within it that device is torch's current one, and the one before it is again afterwards."""
    import torch

    return torch.cuda.device(index)


def stream() -> int:
    """The handle of torch's current stream on its current device."""
    import torch

    return int(torch.cuda.current_stream().cuda_stream)


def synchronize() -> None:
    """Wait for torch's current stream."""
    import torch

    torch.cuda.current_stream().synchronize()


def capturing() -> bool:
    """torch's own answer to Backend.capturing."""
    import torch

    return active() and torch.cuda.is_current_stream_capturing()


class TorchEvent:
    """torch's own event, where the binding's cannot be used."""

    def __init__(self) -> None:
        import torch

        self._event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self._event.record()

    def done(self) -> bool:
        return bool(self._event.query())

    def elapsed_us(self, end: Event) -> float:
        assert isinstance(end, TorchEvent)
        try:
            return float(self._event.elapsed_time(end._event)) * 1e3
        except (RuntimeError, ValueError) as error:
            raise DeviceError(f"no time between two events: {error}") from error


def graph(call: Callable[[], object]) -> Callable[[], None] | None:
    """Backend.graph: warm up and record on a side stream. The replay runs on the stream that is current then.

    None when the capture fails, records nothing (a replay would time an empty graph) or another is on:
    the caller's stream, torch's allocator and its random generators stay usable. A fault of the warm-up is
    the call's own and raises.
    """
    import torch

    if capturing():
        return None
    caller = torch.cuda.current_stream()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    recorded, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    side.wait_stream(caller)
    try:
        with torch.cuda.stream(side):
            call()  # lazy set-up, compilation and allocation must not happen inside the capture
            side.synchronize()
            launches = _record(recorded, pool, call)
            if launches is None:
                _recover(recorded, pool)
    finally:
        caller.wait_stream(side)
    if not launches:
        return None

    def replay(_keep: object = call) -> None:  # the graph holds addresses of the call's tensors
        recorded.replay()

    return replay


def _record(recorded: Any, pool: Any, call: Callable[[], object]) -> bool | None:
    """Capture on the current stream: whether anything was launched, None when the capture failed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # thread_local: this capture and an allocation of another thread must not fail each other
            recorded.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                call()
            finally:
                recorded.capture_end()
        except Exception:
            return None
    return not any("Graph is empty" in str(warning.message) for warning in caught)


def _recover(recorded: Any, pool: Any) -> None:
    """Undo what capture_end leaves when the capture was invalid: the allocator still routes to the graph's
    pool, and the generators believe in a capture, so the next torch.rand raises. A good capture ends that."""
    import torch

    recorded.reset()
    _refused.append(recorded)
    with contextlib.suppress(RuntimeError):  # raises when capture_end got past this point by itself
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
    _record(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), lambda: torch.zeros(1, device="cuda"))
