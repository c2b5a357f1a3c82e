"""The backends, and which of them has a device here. Only this file imports them all."""

from contextlib import suppress

from moecache.backends.contract import Backend
from moecache.schemas.errors import InvalidInput, NoDevice

BACKENDS = ("cuda", "hip", "cpu")


def load(name: str) -> Backend:
    """The backend of that name, whether or not its device is present.

    Raises:
        InvalidInput: there is no such backend.
    """
    if name == "cuda":
        from moecache.backends.cuda import CudaBackend

        return CudaBackend()
    if name == "hip":
        from moecache.backends.hip import HipBackend

        return HipBackend()
    if name == "cpu":
        from moecache.backends.cpu import CpuBackend

        return CpuBackend()
    raise InvalidInput(f"backend {name!r} does not exist; allowed are {', '.join(BACKENDS)}")


def detect() -> Backend:
    """The first backend that has a device; the CPU always has one."""
    for name in ("cuda", "hip"):
        with suppress(NoDevice):
            if (backend := load(name)).count() > 0:
                return backend
    return load("cpu")
