"""What is known of a device: identity, limits and rates. Some devices are known without having one."""

import re
from typing import Any

from pydantic import Field

from moecache.schemas.frozen import Frozen
from moecache.schemas.problem import Vendor, Word


class Device(Frozen):
    """A device. Limits decide what fits, rates feed the cost model. Units: bytes, MHz, GB/s, TFLOP/s; 0 = unknown."""

    vendor: Vendor
    arch: Word = Field(description="sm_90, gfx942, gfx950, x86_64, …")
    name: str
    units: int = Field(ge=1, description="SMs, CUs or cores of the logical device (a partition has fewer)")
    xcds: int = Field(default=1, ge=1, description="accelerator dies that share no L2; 1 on NVIDIA")
    wave: int = Field(default=32, ge=1, description="lanes of a warp or wavefront")
    shared_bytes: int = Field(default=0, ge=0, description="shared memory or LDS that one block may use")
    max_threads: int = Field(default=1024, ge=1, description="threads of one block")
    waves_per_unit: int = Field(default=64, ge=1, description="warps or wavefronts resident on one unit")
    l2_bytes: int = Field(default=0, ge=0)
    llc_bytes: int = Field(default=0, ge=0, description="last-level cache: a cold measurement exceeds it")
    memory_bytes: int = Field(default=0, ge=0)
    clock_mhz: int = Field(default=0, ge=0)
    bandwidth_gbs: float = Field(default=0, ge=0, description="device memory, read")
    peak_tflops: tuple[tuple[str, float], ...] = Field(default=(), description="dense rate by dtype")
    launch_us: float = Field(default=2.0, ge=0, description="cost of one more kernel in a stream or graph")
    rates_from: str = Field(default="unknown", description="'measured …' or 'table: …', with the source")


_HOPPER: dict[str, Any] = dict(
    vendor="nvidia", arch="sm_90", units=132, shared_bytes=232448, waves_per_unit=64, clock_mhz=1980,
    launch_us=1.0,
)  # fmt: skip
_CDNA3: dict[str, Any] = dict(
    vendor="amd", arch="gfx942", units=304, xcds=8, wave=64, shared_bytes=65536, waves_per_unit=32,
    l2_bytes=4 << 20, llc_bytes=256 << 20, clock_mhz=2100, launch_us=2.0,
)  # fmt: skip
_CDNA4: dict[str, Any] = dict(
    vendor="amd", arch="gfx950", units=256, xcds=8, wave=64, shared_bytes=163840, waves_per_unit=32,
    l2_bytes=4 << 20, llc_bytes=256 << 20, launch_us=2.0,
)  # fmt: skip
_SHEET = "table: vendor datasheet"

# Used to predict and compile without the device, and to fill in rates that no driver reports.
KNOWN: dict[str, Device] = {
    "h100": Device(
        **_HOPPER, name="NVIDIA H100", l2_bytes=50 << 20, llc_bytes=50 << 20, memory_bytes=80 << 30,
        bandwidth_gbs=3060, peak_tflops=(("bf16", 680), ("fp8", 1360)),
        rates_from="measured 2026-11-26: read 3.06 TB/s, cuBLAS on long bf16 products 680 TFLOP/s; fp8 assumed twice",
    ),
    "h200": Device(
        **_HOPPER, name="NVIDIA H200", l2_bytes=60 << 20, llc_bytes=60 << 20, memory_bytes=141 << 30,
        bandwidth_gbs=4440, peak_tflops=(("bf16", 694), ("fp8", 1388)),
        rates_from="measured 2026-11-20: read 4.44 TB/s, cuBLAS 8192^3 bf16 694 TFLOP/s; fp8 assumed twice",
    ),
    "mi300x": Device(
        **_CDNA3, name="AMD Instinct MI300X", memory_bytes=192 << 30, bandwidth_gbs=5300,
        peak_tflops=(("bf16", 1307), ("fp8", 2615)), rates_from=_SHEET,
    ),
    "mi325x": Device(
        **_CDNA3, name="AMD Instinct MI325X", memory_bytes=256 << 30, bandwidth_gbs=6000,
        peak_tflops=(("bf16", 1307), ("fp8", 2615)), rates_from=_SHEET,
    ),
    "mi350x": Device(
        **_CDNA4, name="AMD Instinct MI350X", memory_bytes=288 << 30, clock_mhz=2200, bandwidth_gbs=8000,
        peak_tflops=(("bf16", 2307), ("fp8", 4614)), rates_from=_SHEET,
    ),
    "mi355x": Device(
        **_CDNA4, name="AMD Instinct MI355X", memory_bytes=288 << 30, clock_mhz=2400, bandwidth_gbs=8000,
        peak_tflops=(("bf16", 2517), ("fp8", 5033)), rates_from=_SHEET,
    ),
}  # fmt: skip


def same_product(a: str, b: str) -> bool:
    """Whether two names of devices mean one product, whatever a driver puts around them.

    An H100 with HBM3 and an H100 on PCIe are two products: architecture and units may be equal, memory is not. If a
    name is missing, they count as one.
    """
    return not a or not b or _plain(a) == _plain(b)


def _plain(name: str) -> str:
    return " ".join(re.sub(r"\((r|tm|c)\)|\b(nvidia|amd|instinct|tesla)\b", " ", name.casefold()).split())


def by_arch(arch: str) -> Device | None:
    """The device whose constants stand for an architecture if no such device is here; None for unknown ones."""
    return {"sm_90": KNOWN["h200"], "gfx942": KNOWN["mi300x"], "gfx950": KNOWN["mi355x"]}.get(arch)
