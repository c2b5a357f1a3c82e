"""NVIDIA through cuda-python: identity, limits, events, capture state; torch where the binding fails."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moecache.backends import torch_gpu
from moecache.backends.contract import Event
from moecache.backends.rates import with_rates
from moecache.schemas.device import Device
from moecache.schemas.errors import DeviceError, NoDevice

SUCCESS, NOT_READY, CAPTURE_IMPLICIT = 0, 600, 906  # cudaError_t
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def check(result: tuple[Any, ...]) -> Any:
    """The value of a runtime call's answer (status, value), None when it has none.

    Status first: the value of a failed call means nothing.

    Raises:
        DeviceError: any status but success.
    """
    if int(result[0]) != SUCCESS:
        raise DeviceError(f"the CUDA runtime answered {result[0].name} ({int(result[0])})")
    return result[1] if len(result) > 1 else None


def load_runtime() -> Any:
    """cuda.bindings.runtime, once it has found a device.

    cudaRuntimeGetVersion succeeds without a driver, so only the device count is believed.

    Raises:
        NoDevice: package, driver or device is absent.
    """
    try:
        from cuda.bindings import runtime
    except Exception as error:  # absent, or broken
        raise NoDevice(f"cuda-python cannot be imported ({error}); install moecache[cuda]") from error
    try:  # a missing library is a RuntimeError, a status newer than the binding a ValueError
        found = check(runtime.cudaGetDeviceCount())
    except (RuntimeError, ValueError) as error:
        raise NoDevice(f"no usable NVIDIA driver: {error}") from error
    if not found:
        raise NoDevice("the NVIDIA driver shows no device; is CUDA_VISIBLE_DEVICES empty?")
    return runtime


class CudaEvent:
    """An event of the CUDA runtime on torch's current stream."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._handle = check(runtime.cudaEventCreate())

    def record(self) -> None:
        check(self._runtime.cudaEventRecord(self._handle, torch_gpu.stream()))

    def done(self) -> bool:
        result = self._runtime.cudaEventQuery(self._handle)
        if int(result[0]) == NOT_READY:
            return False
        check(result)
        return True

    def elapsed_us(self, end: Event) -> float:
        assert isinstance(end, CudaEvent)
        return float(check(self._runtime.cudaEventElapsedTime(self._handle, end._handle))) * 1e3

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._runtime.cudaEventDestroy(self._handle)


class CudaBackend:
    """NVIDIA GPUs. A handle of one CUDA runtime is valid in every other of the process, torch's included."""

    name = "cuda"

    @cached_property
    def _runtime(self) -> Any | None:
        """The binding; None where it fails but torch finds a device, as when the binding is too new."""
        try:
            return load_runtime()
        except NoDevice:
            if torch_gpu.sees("cuda"):
                return None
            raise

    def count(self) -> int:
        """Devices that torch can launch kernels on; NoDevice also when torch is built for something else."""
        _ = self._runtime
        return torch_gpu.count("cuda")

    def device(self, index: int = 0) -> Device:
        """Identity and limits from the driver, whichever torch is installed."""
        runtime = self._runtime
        try:
            prop = properties_from_torch(index) if runtime is None else properties(runtime, index)
        except (RuntimeError, ValueError, AssertionError) as error:  # torch asserts the index
            raise NoDevice(f"CUDA device {index} cannot be read: {error}") from error
        return describe(prop)

    def driver(self) -> str:
        """Kernel driver and the newest CUDA that it speaks, `580.95.05 (CUDA 13.0)`."""
        if self._runtime is None:
            import torch

            return f"{kernel_driver()} (torch CUDA {torch.version.cuda})"
        version = check(self._runtime.cudaDriverGetVersion())
        return f"{kernel_driver()} (CUDA {version // 1000}.{version % 1000 // 10})"

    def current(self, index: int) -> AbstractContextManager[object]:
        return torch_gpu.current(index)

    def capturing(self) -> bool:
        """Also True on the legacy default stream while another stream captures: work there would spoil it."""
        if not torch_gpu.active():
            return False
        if self._runtime is None:
            return torch_gpu.capturing()
        result = self._runtime.cudaStreamIsCapturing(torch_gpu.stream())
        return int(result[0]) == CAPTURE_IMPLICIT or int(check(result)) != 0

    def event(self) -> Event:
        return torch_gpu.TorchEvent() if self._runtime is None else CudaEvent(self._runtime)

    def synchronize(self) -> None:
        torch_gpu.synchronize()

    def graph(self, call: Callable[[], object]) -> Callable[[], None] | None:
        return torch_gpu.graph(call)


def properties(runtime: Any, index: int) -> Any:
    """cudaDeviceProp, with the two clocks that CUDA 13 moved out of it."""
    prop = check(runtime.cudaGetDeviceProperties(index))
    attributes = runtime.cudaDeviceAttr
    return SimpleNamespace(
        **{name: getattr(prop, name) for name in _FROM_TORCH},
        clockRate=check(runtime.cudaDeviceGetAttribute(attributes.cudaDevAttrClockRate, index)),
        memoryClockRate=check(runtime.cudaDeviceGetAttribute(attributes.cudaDevAttrMemoryClockRate, index)),
    )


_FROM_TORCH = {  # cudaDeviceProp's name -> torch's
    "name": "name",
    "major": "major",
    "minor": "minor",
    "multiProcessorCount": "multi_processor_count",
    "warpSize": "warp_size",
    "sharedMemPerBlockOptin": "shared_memory_per_block_optin",
    "maxThreadsPerBlock": "max_threads_per_block",
    "maxThreadsPerMultiProcessor": "max_threads_per_multi_processor",
    "l2CacheSize": "L2_cache_size",
    "totalGlobalMem": "total_memory",
    "memoryBusWidth": "memory_bus_width",
}


def properties_from_torch(index: int) -> Any:
    """The same record from torch; what an older torch lacks is 0."""
    import torch

    prop = torch.cuda.get_device_properties(index)
    clocks = {"clockRate": "clock_rate", "memoryClockRate": "memory_clock_rate"}
    return SimpleNamespace(**{ours: getattr(prop, its, 0) for ours, its in (_FROM_TORCH | clocks).items()})


def describe(prop: Any) -> Device:
    """A Device from cudaDeviceProp's fields; clocks in kHz, bus width in bits."""
    name = prop.name.decode(errors="replace") if isinstance(prop.name, bytes) else str(prop.name)
    device = Device(
        vendor="nvidia",
        arch=f"sm_{prop.major}{prop.minor}",
        name=name.rstrip("\0"),
        units=prop.multiProcessorCount,
        wave=prop.warpSize,
        shared_bytes=prop.sharedMemPerBlockOptin,
        max_threads=prop.maxThreadsPerBlock or 1024,
        waves_per_unit=(prop.maxThreadsPerMultiProcessor or 2048) // prop.warpSize,
        l2_bytes=prop.l2CacheSize,
        llc_bytes=prop.l2CacheSize,
        memory_bytes=prop.totalGlobalMem,
        clock_mhz=prop.clockRate // 1000,
    )
    # Two transfers a clock: the H100 SXM reports 2619 MHz at 5120 bits and moves 3.35 TB/s.
    return with_rates(device, bus_gbs=prop.memoryClockRate * prop.memoryBusWidth * 2 / 8e6)


def kernel_driver() -> str:
    """Version of the kernel module, `580.95.05`; `NVIDIA` where its file cannot be read."""
    try:
        found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", DRIVER_FILE.read_text())
    except OSError:
        found = None
    return found.group(1) if found else "NVIDIA"
