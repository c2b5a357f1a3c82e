"""NVIDIA: identity and limits through cuda-python, all else through torch."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moecache.backends import torch_gpu
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

    def link(self, index: int, other: int) -> str:
        """See Backend. torch counts the NVLinks of all devices that it sees, also those through switches."""
        try:
            from torch._C._autograd import DeviceType
            from torch._C._distributed_c10d import _detect_dma_connectivity  # type: ignore[attr-defined]

            count = _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix[index][other]
        except (ImportError, RuntimeError):
            return super().link(index, other)
        return f"nvlink{count}" if count else "pcie"

    def driver(self) -> str:
        """Kernel driver and the newest CUDA that it speaks, `580.95.05 (CUDA 13.0)`."""
        if self._binding is None:
            import torch

            return f"{kernel_driver()} (torch CUDA {torch.version.cuda})"
        version = check(self._binding.cudaDriverGetVersion())
        return f"{kernel_driver()} (CUDA {version // 1000}.{version % 1000 // 10})"


OF_TORCH = {**torch_gpu.NAMES, "major": "major", "minor": "minor"}


def properties(runtime: Any, index: int) -> Any:
    """cudaDeviceProp, with the two clocks that CUDA 13 moved out of it."""
    prop, kinds = check(runtime.cudaGetDeviceProperties(index)), runtime.cudaDeviceAttr
    clocks = {"clockRate": kinds.cudaDevAttrClockRate, "memoryClockRate": kinds.cudaDevAttrMemoryClockRate}
    fields = {name: getattr(prop, name) for name in OF_TORCH if name not in clocks}
    fields |= {name: check(runtime.cudaDeviceGetAttribute(kind, index)) for name, kind in clocks.items()}
    return SimpleNamespace(**fields)


def describe(prop: Any) -> Device:
    """A Device from cudaDeviceProp's fields; clocks in kHz, bus width in bits."""
    return torch_gpu.described(
        prop,
        transfers=2,  # the H100 SXM reports 2619 MHz at 5120 bits and moves 3.35 TB/s
        vendor="nvidia",
        arch=f"sm_{prop.major}{prop.minor}",
        name=torch_gpu.text(prop.name),
        shared_bytes=prop.sharedMemPerBlockOptin,
        llc_bytes=prop.l2CacheSize,
    )


def kernel_driver() -> str:
    """Version of the kernel module, `580.95.05`; `NVIDIA` where its file cannot be read."""
    try:
        found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", DRIVER_FILE.read_text())
    except OSError:
        found = None
    return found.group(1) if found else "NVIDIA"
