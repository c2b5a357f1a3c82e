"""The errors that moecache raises. Every message names the value and what is allowed."""


class MoecacheError(Exception):
    """Base of all errors of this library."""


class InvalidInput(MoecacheError, ValueError):
    """An argument, option, file or environment variable has a value that is not allowed."""


class NoDevice(MoecacheError, RuntimeError):
    """A backend was asked for and its driver, package or device is absent."""


class DeviceError(MoecacheError, RuntimeError):
    """A call into a vendor's runtime answered with a failure."""


class DeviceLost(DeviceError):
    """A call hangs on the device or broke its context: this process cannot use the device any more.

    `timings` holds what the tuner knew until then, the culprit's failure included: store them.
    """

    timings: tuple[object, ...] = ()


class StoreError(MoecacheError, OSError):
    """A cache file cannot be read or written, or is not a cache file."""


class NotTuned(MoecacheError, LookupError):
    """Strict mode: no measured choice exists for this problem."""
