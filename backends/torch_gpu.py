"""A GPU of either vendor. Its streams, events, graphs and capture state are torch's, whose torch.cuda has one face for
both; its identity and limits come from the vendor's binding, or from torch where that fails."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from moecache.schemas.device import Device, with_rates
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

    why = f"is a {built!r} build and cannot run kernels on it; install a torch built for {backend!r}"
    if built == backend:
        if torch.cuda.is_available() and (found := torch.cuda.device_count()):
            return found
        why = "finds none"
    raise NoDevice(f"the driver has a device for {backend!r}, but torch {torch.__version__} {why}")


def checked(api: str, result: tuple[Any, ...]) -> Any:
    """The value of a runtime call's answer (status, value), None when it has none.

    Status first: the value of a failed call is uninitialised memory.

    Raises:
        DeviceError: any status but success.
    """
    if int(result[0]) != 0:
        raise DeviceError(f"the {api} runtime answered {result[0].name} ({int(result[0])})")
    return result[1] if len(result) > 1 else None


def opened(
    vendor: str, package: str, extra: str, visible: str, bind: Callable[[], Any], count: Callable[[Any], int]
) -> Any:
    """A vendor's binding, once it has found a device.

    Raises:
        NoDevice: package, driver or device is absent; the message says which.
    """
    try:
        binding = bind()
    except Exception as error:  # absent, or broken
        raise NoDevice(f"{package} cannot be imported ({error}); install moecache[{extra}]") from error
    try:  # a missing library or symbol is a RuntimeError, a status newer than the binding a ValueError
        found = count(binding)
    except (RuntimeError, ValueError) as error:
        raise NoDevice(f"no usable {vendor} driver: {error}") from error
    if not found:
        raise NoDevice(f"the {vendor} driver shows no device; is {visible} empty?")
    return binding


# What the properties of both vendors are called -> torch's name.
NAMES = {
    "name": "name",
    "multiProcessorCount": "multi_processor_count",
    "warpSize": "warp_size",
    "sharedMemPerBlockOptin": "shared_memory_per_block_optin",
    "maxThreadsPerBlock": "max_threads_per_block",
    "maxThreadsPerMultiProcessor": "max_threads_per_multi_processor",
    "l2CacheSize": "L2_cache_size",
    "totalGlobalMem": "total_memory",
    "memoryBusWidth": "memory_bus_width",
    "clockRate": "clock_rate",
    "memoryClockRate": "memory_clock_rate",
}


def properties(index: int, names: Mapping[str, str]) -> Any:
    """A vendor's record of properties from torch, by the vendor's name -> torch's; what torch lacks is 0."""
    import torch

    prop = torch.cuda.get_device_properties(index)
    return SimpleNamespace(**{name: getattr(prop, its, 0) for name, its in names.items()})


def described(prop: Any, transfers: int, **own: Any) -> Device:
    """A device of a vendor's properties: clocks in kHz, bus width in bits, `transfers` of memory in a clock."""
    device = Device(
        units=prop.multiProcessorCount,
        wave=prop.warpSize,
        max_threads=prop.maxThreadsPerBlock or 1024,
        waves_per_unit=(prop.maxThreadsPerMultiProcessor or 2048) // prop.warpSize,  # HIP may report 0
        l2_bytes=prop.l2CacheSize,
        memory_bytes=prop.totalGlobalMem,
        clock_mhz=prop.clockRate // 1000,
        **own,
    )
    return with_rates(device, bus_gbs=prop.memoryClockRate * prop.memoryBusWidth * transfers / 8e6)


def text(value: bytes | str) -> str:
    """What a vendor's runtime says."""
    return (value.decode(errors="replace") if isinstance(value, bytes) else str(value)).rstrip("\0")


class TorchGpu:
    """What the backends of both vendors share."""

    name = api = ""  # of the backend, and of the vendor's runtime in words

    def _load(self) -> Any:
        raise NotImplementedError

    def _device(self, binding: Any | None, index: int) -> Device:
        raise NotImplementedError

    @cached_property
    def _binding(self) -> Any | None:
        """The vendor's; None where it fails but torch finds a device, as when the binding is too new."""
        try:
            return self._load()
        except NoDevice:
            if sees(self.name):
                return None
            raise

    def count(self) -> int:
        """Devices that torch can launch kernels on; NoDevice also when torch is built for something else."""
        _ = self._binding
        return count(self.name)

    def device(self, index: int = 0) -> Device:
        """Identity and limits from the driver, whichever torch is installed."""
        binding = self._binding
        try:
            return self._device(binding, index)
        except (RuntimeError, ValueError, AssertionError) as error:  # torch asserts the index
            raise NoDevice(f"{self.api} device {index} cannot be read: {error}") from error

    def current(self, index: int) -> AbstractContextManager[object]:
        """See Backend."""
        import torch

        return torch.cuda.device(index)

    def link(self, index: int, other: int) -> str:
        """See Backend: what torch says of both vendors."""
        import torch

        return "peer" if torch.cuda.can_device_access_peer(index, other) else "none"

    def capturing(self) -> bool:
        """See Backend. Before torch has touched a GPU in this process no stream exists."""
        if "torch" not in sys.modules or not (torch := sys.modules["torch"]).cuda.is_initialized():
            return False
        try:
            return bool(torch.cuda.is_current_stream_capturing())
        except RuntimeError:  # on the legacy default stream while another stream captures: work here would spoil that
            return True

    def event(self) -> "TorchEvent":
        return TorchEvent()

    def synchronize(self) -> None:
        import torch

        torch.cuda.current_stream().synchronize()

    def graph(self, call: Callable[[], object]) -> Callable[[], None] | None:
        """See Backend: warm up and record on a side stream. The replay runs on the stream that is current then.

        None when the capture fails, records nothing (a replay would time an empty graph) or another is on:
        the caller's stream, torch's allocator and its random generators stay usable. A fault of the warm-up is
        the call's own and raises.
        """
        import torch

        if self.capturing():
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


class TorchEvent:
    """torch's own event."""

    def __init__(self) -> None:
        import torch

        self._event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self._event.record()

    def done(self) -> bool:
        return bool(self._event.query())

    def elapsed_us(self, end: "TorchEvent") -> float:
        try:
            return float(self._event.elapsed_time(end._event)) * 1e3
        except (RuntimeError, ValueError) as error:
            raise DeviceError(f"no time between two events: {error}") from error


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
