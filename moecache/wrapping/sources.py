"""A hash of everything in a user's module that decides what a wrapped function computes."""

import hashlib
import inspect
import types
from typing import Any

from moecache.schemas.errors import InvalidInput


def source_of(*functions: Any) -> str:
    """Twelve hex digits over the functions' text and that of what they call from their own module.

    Raises:
        InvalidInput: the text of one cannot be read (built in C, typed at a prompt).
    """
    digest, seen, todo = hashlib.sha256(), set(), list(functions)
    while todo:
        fn = plain(todo.pop(0))
        if id(fn) in seen:
            continue
        seen.add(id(fn))
        try:
            digest.update(inspect.getsource(fn).encode())
        except (OSError, TypeError) as error:
            raise InvalidInput(
                f"the source of {fn!r} cannot be read ({error}); give version=… and change it with the kernel"
            ) from None
        todo += [other for other in _named(fn) if plain(other).__module__ == fn.__module__]
    return digest.hexdigest()[:12]


def plain(fn: Any) -> Any:
    """The Python function below a Triton kernel, an autotuner or a decorator."""
    while not isinstance(fn, types.FunctionType):
        inner = getattr(fn, "fn", None) or getattr(fn, "__wrapped__", None)
        if inner is None:
            return fn
        fn = inner
    return inspect.unwrap(fn)


def _named(fn: types.FunctionType) -> list[Any]:
    """The functions and kernels that a function names, in the order of its code."""
    values = [fn.__globals__.get(name) for name in fn.__code__.co_names]
    values += [cell.cell_contents for cell in fn.__closure__ or ()]
    return [value for value in values if isinstance(plain(value), types.FunctionType)]
