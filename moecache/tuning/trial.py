"""Runs one untested candidate; `python -m moecache.tuning.trial` does so where a crash costs nothing.

That process reads Trials, in JSON. moecache.tuning.workers keeps it.
"""

import importlib
import math

import torch

from moecache import routing
from moecache.backends import registry as backends
from moecache.kernels import contract
from moecache.kernels import registry as ops
from moecache.kernels.contract import Op
from moecache.kernels.tensors import poison
from moecache.schemas.errors import InvalidInput
from moecache.tuning.check import Trial, compare
from moecache.tuning.process import serve
from moecache.tuning.timing import wait

TOKENS = 1024  # rows of a trial run at most: it looks for faults, not for time


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


def attempt(trial: Trial) -> None:
    """Run and compare, in this process; raises whatever goes wrong."""
    op, problem, backend = resolve(trial.op), trial.problem, backends.load(trial.backend)
    place = torch.device("cpu" if trial.backend == "cpu" else f"cuda:{trial.index}")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    bucket, tokens = problem.routing or routing.NAMES[0], min(problem.tokens, TOKENS)
    topk_ids = routing.draw_bucket(bucket, tokens, problem.experts, problem.topk).to(place)
    with torch.no_grad():
        for seed in (0, contract.EXTREME):
            args = op.inputs(problem, topk_ids, seed)
            out = poison(op.outputs(args))
            got = op.bind(trial.config, args, out)(args, out)
            wait(backend, math.inf)  # the parent ends a hanging worker
            compare(op, problem, got, op.reference(args))


if __name__ == "__main__":
    serve(lambda request: attempt(Trial.model_validate_json(request)))
