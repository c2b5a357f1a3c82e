"""Why a candidate cannot go on, told without torch, for the helpers that load none."""

import re

from moecache.schemas.errors import NoDevice
from moecache.schemas.rule import Status

# What drivers, runtimes and torch say when device, driver or tools are gone, whatever a candidate does.
_LOST = re.compile(
    r"no usable nvidia driver|found no nvidia driver|no (cuda|hip|rocm) gpus|no (cuda|rocm|hip)-capable device"
    r"|error ?no_?device|\b0 active drivers|driver version is insufficient|insufficient_?driver|not compiled with cuda"
    r"|busy or unavailable|devices_?unavailable|device (is )?lost|fallen off the bus|uncorrectable ecc"
    r"|system not yet initialized|system_?not_?ready|cublas_status_not_initialized|can't start new thread"
    r"|cannot find (ptxas|ld\.lld)|no space left on device",
    re.IGNORECASE,
)
_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|status_alloc_failed|memoryallocation", re.IGNORECASE
)


class Failed(Exception):
    """A candidate cannot go on; the race continues without it."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


def kind(error: BaseException) -> Status:
    """`oom` and `lost` say nothing of the candidate: there was no memory, or device, driver, disk or package failed."""
    text, names = str(error), [each.__name__ for each in type(error).__mro__]
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or _MEMORY.search(text):
        return "oom"
    if isinstance(error, NoDevice | OSError | ImportError) or _LOST.search(text):
        return "lost"
    compiler = any(each.__module__.startswith("triton.") for each in type(error).__mro__)
    return "compile" if compiler else "raised"


def failure(error: BaseException) -> Failed:
    """The status and reason of whatever a candidate raised."""
    text = " ".join(str(error).split())[:400]
    if isinstance(error, Failed):
        return error
    status = kind(error)
    return Failed(status, (text or "out of memory") if status == "oom" else f"{type(error).__name__}: {text}")
