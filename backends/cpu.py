"""The host's processor: identity from the operating system, the monotonic clock as event, no graphs."""

import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from moecache.backends.contract import Event
from moecache.schemas.device import Device
from moecache.schemas.errors import DeviceError, NoDevice

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MAX_CLOCK = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")  # kHz
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


class CpuEvent:
    """A reading of the monotonic clock. torch's CPU operations return when they are done."""

    def __init__(self) -> None:
        self._at: int | None = None

    def record(self) -> None:
        self._at = time.perf_counter_ns()

    def done(self) -> bool:
        return True

    def elapsed_us(self, end: Event) -> float:
        assert isinstance(end, CpuEvent)
        if self._at is None or end._at is None:
            raise DeviceError("no time between two events: one was never recorded")
        return (end._at - self._at) / 1e3


class CpuBackend:
    """One logical device: the cores that this process may run on."""

    name = "cpu"

    def count(self) -> int:
        return 1

    def device(self, index: int = 0) -> Device:
        """Identity and caches; the rates stay 0, as nothing reports them."""
        if index != 0:
            raise NoDevice(f"CPU device {index} does not exist; the only one is 0")
        l2, last = caches()
        return Device(
            vendor="cpu",
            arch=platform.machine() or "unknown",
            name=_field("model name") or platform.processor() or platform.machine() or "CPU",
            units=len(os.sched_getaffinity(0)),
            wave=1,
            max_threads=1,
            waves_per_unit=1,
            l2_bytes=l2,
            llc_bytes=last,
            memory_bytes=memory(),
            clock_mhz=clock(),
        )

    def driver(self) -> str:
        """The operating system; its version decides no timing."""
        return platform.system()

    def current(self, index: int) -> AbstractContextManager[object]:
        return nullcontext()

    def link(self, index: int, other: int) -> str:
        return "cpu"

    def capturing(self) -> bool:
        return False

    def event(self) -> Event:
        return CpuEvent()

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def graph(self, call: Callable[[], object]) -> Callable[[], None] | None:
        return None


def caches() -> tuple[int, int]:
    """Bytes of the second-level cache and of the last level of core 0; 0 where the system does not say."""
    sizes = {}
    for folder in sorted(CACHES.glob("index*")):
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(folder / "size"))
        level = _read(folder / "level")
        if size and level.isdigit():
            sizes[int(level)] = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
    return sizes.get(2, 0), sizes[max(sizes)] if sizes else 0


def memory() -> int:
    """Bytes of memory, or the limit of the control group where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read(MEMORY_LIMIT)
    return min(total, int(limit)) if limit.isdigit() else total


def clock() -> int:
    """Highest clock of core 0 in MHz, else the present one; 0 where the system does not say."""
    highest = _read(MAX_CLOCK)
    return int(highest) // 1000 if highest.isdigit() else int(float(_field("cpu MHz") or 0))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _field(name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.+)$", _read(CPUINFO), re.MULTILINE)
    return found[1].strip() if found else ""
