"""The ops that exist, by name. Only this file imports them all."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from moecache.kernels.contract import Op
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem


def _sort() -> Op:
    from moecache.kernels.sort.op import SORT

    return SORT


def _fused_moe() -> Op:
    from moecache.kernels.fused_moe.op import FUSED_MOE

    return FUSED_MOE


def _ep_exchange() -> Op:
    from moecache.kernels.ep.op import EXCHANGE

    return EXCHANGE


def _grouped_gemm() -> Op:
    from moecache.kernels.grouped_gemm.op import GROUPED_GEMM

    return GROUPED_GEMM


_BUILT_IN: dict[str, Callable[[], Op]] = {"moe_sort": _sort, "fused_moe": _fused_moe, "grouped_gemm": _grouped_gemm}
_wrapped: dict[str, Op] = {}


_OF_RANKS: dict[str, Callable[[], Op]] = {"ep_exchange": _ep_exchange}  # judged here, asked by a context of ranks alone
_ALTERNATING = {"fused_moe": "moecache.kernels.fused_moe.alternatives"}


def alternating(name: str) -> Any:
    """The module that puts two configs of an op into one captured call (`kind`, `plan`); None where there
    is none. It is no member of an op, as it changes no config and no timing."""
    return import_module(_ALTERNATING[name]) if name in _ALTERNATING else None


def names() -> list[str]:
    """Built-in ops first, then the wrapped ones."""
    return [*_BUILT_IN, *_wrapped]


def known(name: str) -> bool:
    """Whether `get` gives the op."""
    return name in names() or name in _OF_RANKS


def built_in(name: str) -> bool:
    """Whether any process with this library knows the op by its name alone."""
    return name in _BUILT_IN


def unaskable(problem: Problem) -> str:
    """Why this process cannot ask the op what fits a problem; '' if it can."""
    if not known(problem.op):
        return f"this process does not know op {problem.op!r}"
    kernels = problem.op in _OF_RANKS or (built_in(problem.op) and problem.vendor != "cpu")
    if kernels and find_spec("triton") is None:
        return "Triton is not installed here, without which nothing is known of kernels for GPUs"
    return ""


def get(name: str) -> Op:
    """The op of that name; imports its kernels.

    Raises:
        InvalidInput: there is no such op; the message lists those that exist.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    if name in _wrapped:
        return _wrapped[name]
    if name in _OF_RANKS:
        return _OF_RANKS[name]()
    raise InvalidInput(f"no op named {name!r}; this process knows {', '.join(names())}")


def register(op: Op) -> None:
    """Add a wrapped op.

    Raises:
        InvalidInput: the name belongs to a built-in op.
    """
    if op.name in _BUILT_IN:
        raise InvalidInput(f"op name {op.name!r} is taken by a built-in op; choose another")
    _wrapped[op.name] = op
