"""Runs one untested candidate; `python -m moecache.tuning.trial` does so where a crash costs nothing.

That process reads Trials and answers Verdicts, in JSON. moecache.tuning.workers keeps it.
"""

import importlib
import math
from typing import Any

import torch

from moecache import routing
from moecache.backends import registry as backends
from moecache.kernels import contract
from moecache.kernels import registry as ops
from moecache.kernels.contract import Op
from moecache.kernels.tensors import poison
from moecache.schemas.config import Config
from moecache.schemas.errors import InvalidInput
from moecache.schemas.frozen import Frozen
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Status
from moecache.tuning.failing import Failed, failure
from moecache.tuning.process import serve
from moecache.tuning.timing import wait

TOKENS = 1024  # rows of a trial run at most: it looks for faults, not for time


class Trial(Frozen):
    """One candidate to run on a device of this machine."""

    op: str  # see `locate`
    problem: Problem
    config: Config
    backend: str
    index: int = 0
    seed: int = 0


class Verdict(Frozen):
    """What became of a Trial."""

    status: Status = "ok"
    reason: str = ""


def locate(op: Op) -> str:
    """How another process finds this op: its name, or the `module:attribute` in its `where`; else ''."""
    return op.name if ops.built_in(op.name) else str(getattr(op, "where", ""))


def resolve(reference: str) -> Op:
    """The op that `locate` meant.

    Raises:
        InvalidInput: there is none.
    """
    module, colon, attribute = reference.partition(":")
    if not colon:
        return ops.get(reference)
    try:
        found: Op = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(f"op {reference!r} cannot be imported: {error}; give module:attribute") from error
    return found


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


def attempt(trial: Trial) -> Verdict:
    """Run and compare, in this process."""
    try:
        _run(resolve(trial.op), trial)
    except (Exception, SystemExit) as error:
        failed = failure(error)
        return Verdict(status=failed.status, reason=failed.reason)
    return Verdict()


def _run(op: Op, trial: Trial) -> None:
    problem, backend = trial.problem, backends.load(trial.backend)
    place = torch.device("cpu" if trial.backend == "cpu" else f"cuda:{trial.index}")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    bucket, tokens = problem.routing or routing.NAMES[0], min(problem.tokens, TOKENS)
    topk_ids = routing.draw_bucket(bucket, tokens, problem.experts, problem.topk, trial.seed).to(place)
    with torch.no_grad():
        for seed in (trial.seed, contract.EXTREME):
            args = op.inputs(problem, topk_ids, seed)
            out = poison(op.outputs(args))
            got = op.bind(trial.config, args, out)(args, out)
            wait(backend, math.inf)  # the parent ends a hanging worker
            compare(op, problem, got, op.reference(args))


if __name__ == "__main__":
    serve(lambda request: attempt(Trial.model_validate_json(request)).model_dump_json())
