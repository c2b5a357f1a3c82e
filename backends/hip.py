"""AMD: identity and limits through hip-python, all else through torch. Each may have its own HIP runtime, and a stream
of one is unknown to the other."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moecache.backends import torch_gpu
from moecache.backends.rates import with_rates
from moecache.schemas.device import Device

DRIVER_FILE = Path("/sys/module/amdgpu/version")

# CUs of one XCD, by product; a device or a partition of one is a whole number of XCDs. Used where the driver
# does not report them. gfx942: 304 CUs are 8 of 38 (MI300X), 228 are 6 (MI300A), 152, 76 and 38 are parts
# (DPX, QPX, CPX); 80 are 4 of 20 (MI308X). gfx950: 256 CUs are 8 of 32 (MI355X), 128 are 4 (MI350P, DPX).
XCD_UNITS = {"gfx942": (38, 20), "gfx950": (32,)}
TRANSFERS = {"gfx942": 4, "gfx950": 4}  # HBM3: the MI300X reports 1300 MHz at 8192 bits and moves 5.3 TB/s

check = partial(torch_gpu.checked, "HIP")


def load_runtime() -> Any:
    """hip-python's `hip`, once it has found a device and can read its properties, which ROCm 5 cannot. Raises
    NoDevice."""
    return torch_gpu.opened("AMD", "hip-python", "rocm", "HIP_VISIBLE_DEVICES", _bind, _count)


def _bind() -> Any:
    try:
        from hip import hip
    except ImportError:
        from rocm.bindings import hip  # the name of hip-python 10 without its compatibility package
    return hip


def _count(hip: Any) -> int:
    torch_gpu.build()  # torch first: where it brings its own libamdhip64.so, the binding then finds that one
    if found := check(hip.hipGetDeviceCount()):
        properties(hip, 0)
    return found or 0


class HipBackend(torch_gpu.TorchGpu):
    """AMD GPUs."""

    name, api = "hip", "HIP"

    def _load(self) -> Any:
        return load_runtime()

    def _device(self, binding: Any | None, index: int) -> Device:
        return describe(torch_gpu.properties(index, OF_TORCH) if binding is None else properties(binding, index))

    def driver(self) -> str:
        """Kernel driver, where it says so, and HIP runtime, `6.12.12 (HIP 6.4.43483)`."""
        if self._binding is None:
            import torch

            return f"{kernel_driver()} (torch HIP {torch.version.hip})"
        version = check(self._binding.hipRuntimeGetVersion())
        return f"{kernel_driver()} (HIP {version // 10**7}.{version // 10**5 % 100}.{version % 10**5})"


OF_TORCH = {  # hipDeviceProp_t's name -> torch's
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


def properties(hip: Any, index: int) -> Any:
    """hipDeviceProp_t's fields that `describe` reads, and the XCDs, 0 where the driver does not say."""
    try:
        prop = check(hip.hipGetDeviceProperties(index))  # hip-python 10 returns the record
    except TypeError:
        prop = hip.hipDeviceProp_t()  # 6.4 fills one
        check(hip.hipGetDeviceProperties(prop, index))
    return SimpleNamespace(**{name: getattr(prop, name) for name in OF_TORCH}, xcds=xcds_from_driver(hip, index))


def describe(prop: Any) -> Device:
    """A Device from hipDeviceProp_t's fields; clocks in kHz, bus width in bits."""
    arch = _text(prop.gcnArchName).split(":")[0]  # gfx942:sramecc+:xnack-
    device = Device(
        vendor="amd",
        arch=arch,
        name=_text(prop.name) or f"AMD {arch}",
        units=prop.multiProcessorCount,
        xcds=getattr(prop, "xcds", 0) or xcds_from_units(arch, prop.multiProcessorCount),
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
    return int(found) if int(status) == 0 else 0


def xcds_from_units(arch: str, units: int) -> int:
    """XCDs derived from the CU count; 1 for a count or an architecture that is not known."""
    return next((units // cus for cus in XCD_UNITS.get(arch, ()) if units % cus == 0), 1)


def kernel_driver() -> str:
    """Version of the kernel module, `6.12.12`; `amdgpu` where the kernel's own has none."""
    try:
        return DRIVER_FILE.read_text().strip()
    except OSError:
        return "amdgpu"
