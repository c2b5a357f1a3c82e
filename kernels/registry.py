"""The ops that exist, by name. Only this file names them all."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from moecache.kernels.contract import Op
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem

_BUILT_IN = {"moe_sort": ("sort.op", "SORT"), "fused_moe": ("fused_moe.op", "FUSED_MOE")}  # file and name
_BUILT_IN |= {"grouped_gemm": ("grouped_gemm.op", "GROUPED_GEMM")}
_wrapped: dict[str, Op] = {}
_OF_RANKS = {"ep_exchange": ("ep.op", "EXCHANGE")}  # judged here, asked by a context of ranks alone
_ALTERNATING = {"fused_moe": "moecache.kernels.fused_moe.alternatives"}
_NO_TRITON = "Triton is not installed here"


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
        return f"{_NO_TRITON}, without which nothing is known of kernels for GPUs"
    return ""


def get(name: str) -> Op:
    """The op of that name; imports its kernels.

    Raises:
        InvalidInput: there is no such op, the message lists those that exist; or it takes Triton, and there is none.
    """
    if name in _wrapped:
        return _wrapped[name]
    if not known(name):
        raise InvalidInput(f"no op named {name!r}; this process knows {', '.join(names())}")
    if name in _OF_RANKS and find_spec("triton") is None:
        raise InvalidInput(f"{_NO_TRITON}, without which nobody can ask {name}: pip install 'moecache[cuda]' brings it")
    file, constant = (_BUILT_IN | _OF_RANKS)[name]
    op: Op = getattr(import_module(f"moecache.kernels.{file}"), constant)
    return op


def register(op: Op) -> None:
    """Add a wrapped op.

    Raises:
        InvalidInput: the name belongs to a built-in op.
    """
    if op.name in _BUILT_IN:
        raise InvalidInput(f"op name {op.name!r} is taken by a built-in op; choose another")
    _wrapped[op.name] = op
