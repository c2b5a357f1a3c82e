"""Compiles kernels for another process: `python -m moecache.tuning.compiler`. Imports no torch, so it starts soon."""

import importlib
import os
import pickle
import sys
from dataclasses import replace

from moecache.kernels.compile import hash_kernels, hash_triton, prepare_driver, prepare_launch
from moecache.kernels.contract import Source
from moecache.schemas.device import Device
from moecache.tuning.failing import Failed, failure
from moecache.tuning.process import serve


def job(source: Source | None, device: Device) -> bytes | None:
    """What `main` reads; without a source it is Triton's own driver that is compiled. None for a kernel that another
    process cannot import, or constants that it cannot be sent."""
    if source is None:
        return pickle.dumps(("", "", None, device))
    module, name = getattr(source.fn, "__module__", "__main__"), getattr(source.fn, "__name__", "")
    if module == "__main__" or getattr(sys.modules.get(module), name, None) is not source.fn:
        return None
    hash_kernels(source.fn)  # before this process launches it
    try:
        return pickle.dumps((module, name, replace(source, fn=None), device))
    except (pickle.PicklingError, TypeError, AttributeError):
        return None


def work(request: bytes) -> None:
    """Do one job. A compiler's crash ends the process: the one that asked sees that.

    Raises:
        Failed: the kernel does not compile.
    """
    module, name, source, device = pickle.loads(request)
    if source is None:
        return prepare_driver(device)
    try:
        why = prepare_launch(replace(source, fn=getattr(importlib.import_module(module), name)), device)
    except (Exception, SystemExit) as error:
        failed = failure(error)
        raise Failed(failed.status if failed.status in ("oom", "lost") else "compile", failed.reason) from error
    if why:
        raise Failed("compile", why)


def main() -> None:
    """Serve jobs, behind whatever else this machine has to do."""
    os.nice(5)
    hash_triton()
    serve(work)


if __name__ == "__main__":
    main()
