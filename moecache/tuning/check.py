"""Checks a candidate: what is asked of the process that tries one, and how results are compared."""

from typing import Any

from moecache.kernels.contract import Op
from moecache.schemas.config import Config
from moecache.schemas.frozen import Frozen
from moecache.schemas.problem import Problem
from moecache.schemas.warm import OPS
from moecache.tuning.failing import Failed, failure


class Trial(Frozen):
    """One candidate to run on a device of this machine."""

    op: str  # see `locate`
    problem: Problem
    config: Config
    backend: str
    index: int = 0


def locate(op: Op) -> str:
    """How another process finds this op: its name, or the `module:attribute` in its `where`; else ''."""
    return op.name if op.name in OPS else str(getattr(op, "where", ""))


def compare(op: Op, problem: Problem, got: Any, want: Any) -> float:
    """Relative error of a result.

    Raises:
        Failed: it is above the tolerance, not a number, or of another shape.
    """
    allowed = op.tolerance(problem)
    try:
        error = float(op.error(got, want))
    except Exception as fault:
        raise Failed("wrong", f"cannot be compared with the reference: {failure(fault).reason}") from fault
    if not error <= allowed:
        raise Failed("wrong", f"error {error:g} against the reference, allowed is {allowed:g}")
    return error
