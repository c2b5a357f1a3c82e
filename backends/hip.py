"""AMD: identity and limits through hip-python, all else through torch. Each may have its own HIP runtime, and a stream
of one is unknown to the other."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moecache.backends import torch_gpu
from moecache.schemas.device import Device

DRIVER_FILE = Path("/sys/module/amdgpu/version")

# CUs of one XCD, by product; a device or a partition of one is a whole number of XCDs. Used where the driver
# does not report them. gfx942: 304 CUs are 8 of 38 (MI300X), 228 are 6 (MI300A), 152, 76 and 38 are parts
# (DPX, QPX, CPX); 80 are 4 of 20 (MI308X). gfx950: 256 CUs are 8 of 32 (MI355X), 128 are 4 (MI350P, DPX).
XCD_UNITS = {"gfx942": (38, 20), "gfx950": (32,)}
PCIE, XGMI = 2, 4  # kinds of hsa_amd_link_info_type_t
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

    def link(self, index: int, other: int) -> str:
        """See Backend."""
        if (hip := self._binding) is not None:
            status, kind, hops = hip.hipExtGetLinkTypeAndHopCount(index, other)
            if int(status) == 0 and kind in (XGMI, PCIE):
                return f"xgmi{hops}" if kind == XGMI else "pcie"
        return super().link(index, other)

    def driver(self) -> str:
        """Kernel driver, where it says so, and HIP runtime, `6.12.12 (HIP 6.4.43483)`."""
        if self._binding is None:
            import torch

            return f"{kernel_driver()} (torch HIP {torch.version.hip})"
        version = check(self._binding.hipRuntimeGetVersion())
        return f"{kernel_driver()} (HIP {version // 10**7}.{version // 10**5 % 100}.{version % 10**5})"


OF_TORCH = {**torch_gpu.NAMES, "gcnArchName": "gcnArchName", "sharedMemPerBlock": "shared_memory_per_block"}


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
    arch = torch_gpu.text(prop.gcnArchName).split(":")[0]  # gfx942:sramecc+:xnack-
    return torch_gpu.described(
        prop,
        transfers=TRANSFERS.get(arch, 2),
        vendor="amd",
        arch=arch,
        name=torch_gpu.text(prop.name) or f"AMD {arch}",
        xcds=getattr(prop, "xcds", 0) or xcds_from_units(arch, prop.multiProcessorCount),
        shared_bytes=max(prop.sharedMemPerBlock, prop.sharedMemPerBlockOptin),
    )


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
