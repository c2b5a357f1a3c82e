"""What is known of a device: identity, limits and rates. Some devices are known without having one."""

import re
from typing import Any

from pydantic import Field

from moecache.schemas.frozen import Frozen, Vendor, Word

CLOCK_MHZ = 2000  # of a device that does not say


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


_SHEET = "table: vendor datasheet"
_H100 = "measured 2026-11-26: read 3.06 TB/s, cuBLAS on long bf16 products 680 TFLOP/s; fp8 assumed twice"
_H200 = "measured 2026-11-20: read 4.44 TB/s, cuBLAS 8192^3 bf16 694 TFLOP/s; fp8 assumed twice"


_HOPPER = dict[str, Any](vendor="nvidia", arch="sm_90", units=132, shared_bytes=232448, clock_mhz=1980, launch_us=1.0)
_CDNA = dict[str, Any](vendor="amd", xcds=8, wave=64, waves_per_unit=32, l2_bytes=4 << 20, llc_bytes=256 << 20)
_GFX942 = _CDNA | {"arch": "gfx942", "units": 304, "shared_bytes": 65536, "clock_mhz": 2100}
_GFX950 = _CDNA | {"arch": "gfx950", "units": 256, "shared_bytes": 163840}


def _product(
    kind: dict[str, Any], name: str, memory_gb: int, gbs: float, bf16: float, fp8: float, source: str, **own: Any
) -> Device:
    rates: dict[str, Any] = {"bandwidth_gbs": gbs, "peak_tflops": (("bf16", bf16), ("fp8", fp8)), "rates_from": source}
    return Device(name=name, memory_bytes=memory_gb << 30, **kind, **rates, **own)


# Used to predict and compile without the device, and to fill in rates that no driver reports.
KNOWN: dict[str, Device] = {
    "h100": _product(_HOPPER, "NVIDIA H100", 80, 3060, 680, 1360, _H100, l2_bytes=50 << 20, llc_bytes=50 << 20),
    "h200": _product(_HOPPER, "NVIDIA H200", 141, 4440, 694, 1388, _H200, l2_bytes=60 << 20, llc_bytes=60 << 20),
    "mi300x": _product(_GFX942, "AMD Instinct MI300X", 192, 5300, 1307, 2615, _SHEET),
    "mi325x": _product(_GFX942, "AMD Instinct MI325X", 256, 6000, 1307, 2615, _SHEET),
    "mi350x": _product(_GFX950, "AMD Instinct MI350X", 288, 8000, 2307, 4614, _SHEET, clock_mhz=2200),
    "mi355x": _product(_GFX950, "AMD Instinct MI355X", 288, 8000, 2517, 5033, _SHEET, clock_mhz=2400),
}


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


# --- the rates that no driver reports ---


def with_rates(device: Device, bus_gbs: float = 0.0) -> Device:
    """The device with bandwidth, dense rates, last-level cache and launch cost; `rates_from` says the source.

    A known product gives its own figures. A part of one (MIG, CPX) or another product of a known architecture
    gets the dense rates of its relative, scaled by units and clock, and the bandwidth `bus_gbs` (memory clock
    times bus width, GB/s), a part at most its share.
    """
    words = re.findall(r"[a-z0-9]+", device.name.lower())
    named = [known for key, known in KNOWN.items() if key in words and known.arch == device.arch]
    twins = [known for known in KNOWN.values() if _twins(known, device)]
    if twins:
        model = min(twins, key=lambda known: (known not in named, abs(known.clock_mhz - device.clock_mhz)))
        said = f"{model.rates_from} ({model.name})"
        return _filled(device, model, model.bandwidth_gbs, model.peak_tflops, said)
    relative = named[0] if named else by_arch(device.arch)
    if relative is None:
        said = "derived: memory clock and bus width; dense rates unknown" if bus_gbs else "unknown"
        return _filled(device, device, bus_gbs, (), said)
    share = device.units / relative.units
    scale = share * (device.clock_mhz / relative.clock_mhz if device.clock_mhz else 1.0)
    peaks = tuple((dtype, round(rate * scale, 1)) for dtype, rate in relative.peak_tflops)
    bandwidth, source = bus_gbs, "memory clock and bus width"
    if not bus_gbs or (named and share < 1 and relative.bandwidth_gbs * share < bus_gbs):
        bandwidth = relative.bandwidth_gbs * share
        source = f"its share, {device.units} of {relative.units} units"
    said = f"derived: dense rates of {relative.name} by units and clock, bandwidth by {source}"
    return _filled(device, relative, bandwidth, peaks, said)


def _twins(known: Device, device: Device) -> bool:
    """Equal arch and units, and memory within 10 %, which tells an MI300X from an MI325X under any name."""
    near = abs(known.memory_bytes - device.memory_bytes) <= 0.1 * known.memory_bytes
    return known.arch == device.arch and known.units == device.units and near


def _filled(
    device: Device, model: Device, bandwidth_gbs: float, peaks: tuple[tuple[str, float], ...], said: str
) -> Device:
    """With these rates, and those of the model's figures that no driver reports."""
    missing = {name: getattr(device, name) or getattr(model, name) for name in ("l2_bytes", "llc_bytes", "clock_mhz")}
    rates = {"bandwidth_gbs": round(bandwidth_gbs, 1), "peak_tflops": peaks, "rates_from": said}
    return device.model_copy(update={**missing, **rates, "launch_us": model.launch_us})
