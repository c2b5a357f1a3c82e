"""AMD through hip-python: identity, limits, events, capture state; torch where the binding fails."""

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

SUCCESS, NOT_READY = 0, 600  # hipError_t
DRIVER_FILE = Path("/sys/module/amdgpu/version")
MAPS_FILE = Path("/proc/self/maps")

# CUs of one XCD, by product; a device or a partition of one is a whole number of XCDs. Used where the driver
# does not report them. gfx942: 304 CUs are 8 of 38 (MI300X), 228 are 6 (MI300A), 152, 76 and 38 are parts
# (DPX, QPX, CPX); 80 are 4 of 20 (MI308X). gfx950: 256 CUs are 8 of 32 (MI355X), 128 are 4 (MI350P, DPX).
XCD_UNITS = {"gfx942": (38, 20), "gfx950": (32,)}
TRANSFERS = {"gfx942": 4, "gfx950": 4}  # HBM3: the MI300X reports 1300 MHz at 8192 bits and moves 5.3 TB/s


def check(result: tuple[Any, ...]) -> Any:
    """The value of a runtime call's answer (status, value), None when it has none.

    Status first: the value of a failed call is uninitialised memory.

    Raises:
        DeviceError: any status but success.
    """
    if int(result[0]) != SUCCESS:
        raise DeviceError(f"the HIP runtime answered {result[0].name} ({int(result[0])})")
    return result[1] if len(result) > 1 else None


def load_runtime() -> Any:
    """hip-python's `hip`, once it has found a device and can read its properties.

    Raises:
        NoDevice: package, library or device is absent, or the library is older than ROCm 6.
    """
    try:
        hip = _import_hip()
    except Exception as error:  # absent, or broken
        raise NoDevice(f"hip-python cannot be imported ({error}); install moecache[rocm]") from error
    torch_gpu.build()  # torch first: where it brings its own libamdhip64.so, the binding then finds that one
    try:  # a missing library or symbol is a RuntimeError, a status newer than the binding a ValueError
        found = check(hip.hipGetDeviceCount())
        if found:
            properties(hip, 0)
    except (RuntimeError, ValueError) as error:
        raise NoDevice(f"no usable AMD driver: {error}") from error
    if not found:
        raise NoDevice("the AMD driver shows no device; is HIP_VISIBLE_DEVICES empty?")
    return hip


def _import_hip() -> Any:
    try:
        from hip import hip
    except ImportError:
        from rocm.bindings import hip  # the name of hip-python 10 without its compatibility package
    return hip


class HipEvent:
    """An event of the HIP runtime on torch's current stream."""

    def __init__(self, hip: Any) -> None:
        self._hip = hip
        self._handle = check(hip.hipEventCreate())

    def record(self) -> None:
        check(self._hip.hipEventRecord(self._handle, torch_gpu.stream()))

    def done(self) -> bool:
        result = self._hip.hipEventQuery(self._handle)
        if int(result[0]) == NOT_READY:
            return False
        check(result)
        return True

    def elapsed_us(self, end: Event) -> float:
        assert isinstance(end, HipEvent)
        return float(check(self._hip.hipEventElapsedTime(self._handle, end._handle))) * 1e3

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._hip.hipEventDestroy(self._handle)


class HipBackend:
    """AMD GPUs. A stream of one HIP runtime is unknown to a second one in the process, unlike CUDA's."""

    name = "hip"

    @cached_property
    def _runtime(self) -> Any | None:
        """The binding; None where it fails and torch finds a device, as when only torch has the library."""
        try:
            return load_runtime()
        except NoDevice:
            if torch_gpu.sees("hip"):
                return None
            raise

    @cached_property
    def _on_stream(self) -> Any | None:
        """The binding where it may touch torch's stream. With two libamdhip64 in the process it may not: a
        foreign stream answers 709 or crashes (ROCm/mori#402, sgl-project/sglang#39513)."""
        torch_gpu.stream()  # torch's library is surely loaded after this
        return self._runtime if hip_libraries() < 2 else None

    def count(self) -> int:
        """Devices that torch can launch kernels on; NoDevice also when torch is built for something else."""
        _ = self._runtime
        return torch_gpu.count("hip")

    def device(self, index: int = 0) -> Device:
        """Identity and limits from the driver, whichever torch is installed."""
        runtime = self._runtime
        try:
            prop = properties_from_torch(index) if runtime is None else properties(runtime, index)
        except (RuntimeError, ValueError, AssertionError) as error:  # torch asserts the index
            raise NoDevice(f"HIP device {index} cannot be read: {error}") from error
        return describe(prop)

    def driver(self) -> str:
        """Kernel driver, where it says so, and HIP runtime, `6.12.12 (HIP 6.4.43483)`."""
        if self._runtime is None:
            import torch

            return f"{kernel_driver()} (torch HIP {torch.version.hip})"
        version = check(self._runtime.hipRuntimeGetVersion())
        return f"{kernel_driver()} (HIP {version // 10**7}.{version // 10**5 % 100}.{version % 10**5})"

    def current(self, index: int) -> AbstractContextManager[object]:
        return torch_gpu.current(index)

    def capturing(self) -> bool:
        """Also True where the runtime cannot tell: work here might spoil a capture."""
        if not torch_gpu.active():
            return False
        if self._on_stream is None:
            return torch_gpu.capturing()
        try:
            status, captured = self._on_stream.hipStreamIsCapturing(torch_gpu.stream())
        except ValueError:  # a failed call whose uninitialised out-value is no capture status
            return True
        return int(status) != SUCCESS or int(captured) != 0

    def event(self) -> Event:
        return torch_gpu.TorchEvent() if self._on_stream is None else HipEvent(self._on_stream)

    def synchronize(self) -> None:
        torch_gpu.synchronize()

    def graph(self, call: Callable[[], object]) -> Callable[[], None] | None:
        return torch_gpu.graph(call)


def properties(hip: Any, index: int) -> Any:
    """hipDeviceProp_t's fields that `describe` reads, and the XCDs, 0 where the driver does not say."""
    try:
        prop = check(hip.hipGetDeviceProperties(index))  # hip-python 10 returns the record
    except TypeError:
        prop = hip.hipDeviceProp_t()  # 6.4 fills one
        check(hip.hipGetDeviceProperties(prop, index))
    fields = {name: getattr(prop, name) for name in _FROM_TORCH}
    return SimpleNamespace(**fields, xcds=xcds_from_driver(hip, index))


_FROM_TORCH = {  # hipDeviceProp_t's name -> torch's
    "name": "name",
    "gcnArchName": "gcnArchName",
    "multiProcessorCount": "multi_processor_count",
    "warpSize": "warp_size",
    "sharedMemPerBlock": "shared_memory_per_block",
    "sharedMemPerBlockOptin": "shared_memory_per_block_optin",
    "maxThreadsPerBlock": "max_threads_per_block",
    "maxThreadsPerMultiProcessor": "max_threads_per_multi_processor",
    "l2CacheSize": "L2_cache_size",
    "totalGlobalMem": "total_memory",
    "clockRate": "clock_rate",
    "memoryClockRate": "memory_clock_rate",
    "memoryBusWidth": "memory_bus_width",
}


def properties_from_torch(index: int) -> Any:
    """The same record from torch; what it lacks is 0."""
    import torch

    prop = torch.cuda.get_device_properties(index)
    return SimpleNamespace(**{ours: getattr(prop, its, 0) for ours, its in _FROM_TORCH.items()}, xcds=0)


def describe(prop: Any) -> Device:
    """A Device from hipDeviceProp_t's fields; clocks in kHz, bus width in bits."""
    arch = _text(prop.gcnArchName).split(":")[0]  # gfx942:sramecc+:xnack-
    device = Device(
        vendor="amd",
        arch=arch,
        name=_text(prop.name) or f"AMD {arch}",
        units=prop.multiProcessorCount,
        xcds=prop.xcds or xcds_from_units(arch, prop.multiProcessorCount),
        wave=prop.warpSize,
        shared_bytes=max(prop.sharedMemPerBlock, prop.sharedMemPerBlockOptin),
        max_threads=prop.maxThreadsPerBlock or 1024,
        waves_per_unit=(prop.maxThreadsPerMultiProcessor or 2048) // prop.warpSize,  # HIP may report 0
        l2_bytes=prop.l2CacheSize,
        memory_bytes=prop.totalGlobalMem,
        clock_mhz=prop.clockRate // 1000,
    )
    transfers = TRANSFERS.get(arch, 2)
    return with_rates(device, bus_gbs=prop.memoryClockRate * prop.memoryBusWidth * transfers / 8e6)


def _text(value: bytes | str) -> str:
    return (value.decode(errors="replace") if isinstance(value, bytes) else str(value)).rstrip("\0")


def xcds_from_driver(hip: Any, index: int) -> int:
    """XCDs of the logical device; 0 where the binding or the driver is too old to say."""
    attribute = getattr(hip.hipDeviceAttribute_t, "hipDeviceAttributeNumberOfXccs", None)
    if attribute is None:
        return 0
    status, found = hip.hipDeviceGetAttribute(attribute, index)
    return int(found) if int(status) == SUCCESS else 0


def xcds_from_units(arch: str, units: int) -> int:
    """XCDs derived from the CU count; 1 for a count or an architecture that is not known."""
    return next((units // cus for cus in XCD_UNITS.get(arch, ()) if units % cus == 0), 1)


def hip_libraries() -> int:
    """Different libamdhip64 files that this process has loaded."""
    try:
        lines = MAPS_FILE.read_text().splitlines()
    except OSError:
        return 0
    return len({line.split(maxsplit=5)[-1] for line in lines if "libamdhip64" in line})


def kernel_driver() -> str:
    """Version of the kernel module, `6.12.12`; `amdgpu` where the kernel's own has none."""
    try:
        return DRIVER_FILE.read_text().strip()
    except OSError:
        return "amdgpu"
