"""torch as it is by default, for what the library makes for itself: whatever mode, autocast or device its caller is in.

The default dtype belongs to the whole process, other threads included, so it stays: whoever makes a float says which.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

AUTOCAST = ("cpu", "cuda")  # AMD's GPUs are called cuda, too


@contextmanager
def own_mode(inference: bool = False) -> Iterator[None]:
    """Within the block tensors are made on the CPU unless a device is named, with no autocast and no gradients, and,
    unless `inference`, such that they may be written to in any mode. Takes 20 µs: never on the path of a hit."""
    cast = [kind for kind in AUTOCAST if torch.is_autocast_enabled(kind)]
    with torch.inference_mode(inference), torch.no_grad(), torch.device("cpu"):
        try:
            for kind in cast:
                torch.set_autocast_enabled(kind, False)
            yield
        finally:
            for kind in cast:
                torch.set_autocast_enabled(kind, True)


def computing(fn: Callable[P, T]) -> Callable[P, T]:
    """A function of tensors that computes the same in every mode, into tensors that were made in any mode."""

    @wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with own_mode(inference=True):
                return fn(*args, **kwargs)
        with torch.inference_mode():
            return fn(*args, **kwargs)

    return run


def callers_mode() -> Callable[[], AbstractContextManager[Any]]:
    """What makes the mode of this moment again, from within `own_mode` or in another thread: a function of the user is
    tuned in the mode in which it is called."""
    inference, device = torch.is_inference_mode_enabled(), torch.get_default_device()
    cast = [(kind, torch.get_autocast_dtype(kind)) for kind in AUTOCAST if torch.is_autocast_enabled(kind)]
    if not (inference or cast or device.type != "cpu"):
        return nullcontext

    def again() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(device)
        for kind, dtype in cast:
            stack.enter_context(torch.autocast(kind, dtype))
        return stack

    return again
