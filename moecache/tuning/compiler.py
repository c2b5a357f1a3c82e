"""Compiles kernels for another process: `python -m moecache.tuning.compiler`. Imports no torch, so it starts quickly.

It is sent jobs, each a pickle, and answers in JSON: [status, reason].
"""

import importlib
import json
import os
import pickle
import sys
from dataclasses import replace

from moecache.kernels.compile import hash_kernels, hash_triton, prepare_driver, prepare_launch
from moecache.kernels.contract import Source
from moecache.schemas.device import Device
from moecache.tuning.failing import kind
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


def work(request: bytes) -> str:
    """Do one job. A compiler's crash ends the process: the one that asked sees that."""
    module, name, source, device = pickle.loads(request)
    if source is None:
        prepare_driver(device)
        return json.dumps(["ok", ""])
    try:
        kernel = getattr(importlib.import_module(module), name)
        why, status = prepare_launch(replace(source, fn=kernel), device), "compile"
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        status = found if (found := kind(error)) in ("oom", "lost") else "compile"
    return json.dumps([status if why else "ok", why])


def main() -> None:
    """Serve jobs, behind whatever else this machine has to do."""
    os.nice(5)
    hash_triton()
    serve(work)


if __name__ == "__main__":
    main()
