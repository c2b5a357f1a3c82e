"""The rates that no driver reports: from the table of known products, or derived from clocks and widths."""

import re
from typing import Any

from moecache.schemas.device import KNOWN, Device, by_arch


def with_rates(device: Device, bus_gbs: float = 0.0) -> Device:
    """The device with bandwidth, dense rates, last-level cache and launch cost; `rates_from` says the source.

    A known product gives its own figures. A part of one (MIG, CPX) or another product of a known architecture
    gets the dense rates of its relative, scaled by units and clock, and the bandwidth `bus_gbs` (memory clock
    times bus width, GB/s), a part at most its share.
    """
    words = re.findall(r"[a-z0-9]+", device.name.lower())
    named = [known for key, known in KNOWN.items() if key in words and known.arch == device.arch]
    twins = [known for known in KNOWN.values() if _same_product(known, device)]
    if twins:
        model = min(twins, key=lambda known: (known not in named, abs(known.clock_mhz - device.clock_mhz)))
        rates = _rates(model.bandwidth_gbs, model.peak_tflops, f"{model.rates_from} ({model.name})")
        return device.model_copy(update=_unreported(device, model) | rates)
    relative = named[0] if named else by_arch(device.arch)
    if relative is None:
        said = "derived: memory clock and bus width; dense rates unknown" if bus_gbs else "unknown"
        return device.model_copy(update=_rates(bus_gbs, (), said))
    part = bool(named) and device.units < relative.units
    return device.model_copy(update=_unreported(device, relative) | _derived(device, relative, bus_gbs, part))


def _same_product(known: Device, device: Device) -> bool:
    """Equal arch and units, and memory within 10 %, which tells an MI300X from an MI325X under any name."""
    near = abs(known.memory_bytes - device.memory_bytes) <= 0.1 * known.memory_bytes
    return known.arch == device.arch and known.units == device.units and near


def _unreported(device: Device, model: Device) -> dict[str, Any]:
    return {
        "l2_bytes": device.l2_bytes or model.l2_bytes,
        "llc_bytes": device.llc_bytes or model.llc_bytes,
        "clock_mhz": device.clock_mhz or model.clock_mhz,
        "launch_us": model.launch_us,
    }


def _derived(device: Device, relative: Device, bus_gbs: float, part: bool) -> dict[str, Any]:
    share = device.units / relative.units
    scale = share * (device.clock_mhz / relative.clock_mhz if device.clock_mhz and relative.clock_mhz else 1.0)
    bandwidth, source = bus_gbs, "memory clock and bus width"
    if not bus_gbs or (part and relative.bandwidth_gbs * share < bus_gbs):
        bandwidth, source = (
            relative.bandwidth_gbs * share,
            f"its share, {device.units} of {relative.units} units",
        )
    peaks = tuple((dtype, round(rate * scale, 1)) for dtype, rate in relative.peak_tflops)
    said = f"derived: dense rates of {relative.name} by units and clock, bandwidth by {source}"
    return _rates(bandwidth, peaks, said)


def _rates(bandwidth: float, peaks: tuple[tuple[str, float], ...], said: str) -> dict[str, Any]:
    return {"bandwidth_gbs": round(bandwidth, 1), "peak_tflops": peaks, "rates_from": said}
