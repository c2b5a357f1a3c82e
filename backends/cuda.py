"""NVIDIA: identity and limits through cuda-python, all else through torch."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moecache.backends import torch_gpu
from moecache.backends.rates import with_rates
from moecache.schemas.device import Device

DRIVER_FILE = Path("/proc/driver/nvidia/version")

check = partial(torch_gpu.checked, "CUDA")


def load_runtime() -> Any:
    """cuda.bindings.runtime, once it has found a device. cudaRuntimeGetVersion succeeds without a driver, so only the
    count is believed. Raises NoDevice."""
    names = ("NVIDIA", "cuda-python", "cuda", "CUDA_VISIBLE_DEVICES")
    return torch_gpu.opened(*names, _bind, lambda runtime: check(runtime.cudaGetDeviceCount()))


def _bind() -> Any:
    from cuda.bindings import runtime

    return runtime


class CudaBackend(torch_gpu.TorchGpu):
    """NVIDIA GPUs."""

    name, api = "cuda", "CUDA"

    def _load(self) -> Any:
        return load_runtime()

    def _device(self, binding: Any | None, index: int) -> Device:
        return describe(torch_gpu.properties(index, OF_TORCH) if binding is None else properties(binding, index))

    def driver(self) -> str:
        """Kernel driver and the newest CUDA that it speaks, `580.95.05 (CUDA 13.0)`."""
        if self._binding is None:
            import torch

            return f"{kernel_driver()} (torch CUDA {torch.version.cuda})"
        version = check(self._binding.cudaDriverGetVersion())
        return f"{kernel_driver()} (CUDA {version // 1000}.{version % 1000 // 10})"


OF_TORCH = {  # cudaDeviceProp's name -> torch's
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
    "clockRate": "clock_rate",
    "memoryClockRate": "memory_clock_rate",
}


def properties(runtime: Any, index: int) -> Any:
    """cudaDeviceProp, with the two clocks that CUDA 13 moved out of it."""
    prop, kinds = check(runtime.cudaGetDeviceProperties(index)), runtime.cudaDeviceAttr
    clocks = {"clockRate": kinds.cudaDevAttrClockRate, "memoryClockRate": kinds.cudaDevAttrMemoryClockRate}
    fields = {name: getattr(prop, name) for name in OF_TORCH if name not in clocks}
    return SimpleNamespace(
        **fields, **{name: check(runtime.cudaDeviceGetAttribute(kind, index)) for name, kind in clocks.items()}
    )


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
