"""A call that stands for a problem: its sizes, and rows of its experts as the routing bucket spreads them."""

from collections.abc import Sequence
from functools import lru_cache
from math import sqrt
from statistics import NormalDist

import numpy as np

from moecache.predict.work import Cell
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import BUCKETS, Problem, bucket_index, bucket_levels

SPREADS = 12  # that are tried until a call lies in its bucket


def call(problem: Problem) -> Cell:
    """A call that stands for a problem of `fused_moe` or `grouped_gemm`: as many tokens, of which this rank has its
    share, and experts loaded as its routing bucket says.

    Raises:
        InvalidInput: an unknown bucket, more choices than experts, no tokens, or dims without sizes.
    """
    here = problem.experts / problem.dim("global", problem.experts)  # of the pairs, on this rank
    tokens = max(1, round(problem.tokens * here)) if problem.tokens else 0
    return cell(problem, representative(problem.routing, tokens, problem.experts, problem.topk))


def cell(problem: Problem, counts: Sequence[int]) -> Cell:
    """The call that a problem asks about, with its rows per expert.

    Raises:
        InvalidInput: the problem's dims lack hidden or intermediate, or no row is counted.
    """
    layer = problem.op != "grouped_gemm"
    return Cell(
        hidden=problem.dim("hidden"),
        intermediate=problem.dim("intermediate"),
        tokens=max(1, sum(counts) // problem.topk),
        counts=tuple(counts),
        dtype="fp8" if problem.dim("quant", "") else problem.dtype or "bf16",
        whole=layer,
        gated=layer and bool(problem.dim("gated", 1)),
    )


@lru_cache(maxsize=4096)
def representative(name: str, tokens: int, experts: int, topk: int) -> tuple[int, ...]:
    """Tokens per expert of a call in the routing bucket `name`; '' is unknown routing, of which uniform is the guess.

    The most loaded expert comes first. Where no call lies in the bucket, it is one near it.

    Raises:
        InvalidInput: an unknown bucket, or more choices than experts.
    """
    if name not in ("", *BUCKETS):
        raise InvalidInput(f"{name!r} is no routing bucket; allowed are {', '.join(BUCKETS)}")
    if not 1 <= topk <= experts:
        raise InvalidInput(f"topk={topk}; allowed are 1 to experts={experts}, as choices are distinct")
    if not tokens:
        return (0,) * experts
    idle, uneven = bucket_levels(name) if name else (0, 0)
    reachable = min(experts, tokens * topk)
    balanced = experts * (1 - (1 - topk / experts) ** tokens)
    share = reachable * 1.2 * 0.5**idle if idle else min(balanced, reachable)
    active = max(topk, round(share) if name else int(share))  # unknown routing is balanced at best
    chance = (1 - topk / experts) * active / (tokens * topk)  # variance of rows over their mean, squared
    variance = max(chance, active / (reachable * 0.5**uneven) - 1 if uneven else 0.0)
    counts = _spread(tokens, topk, active, 0.0)
    for _ in range(SPREADS):
        wider = _spread(tokens, topk, active, variance)
        if sum(wider) != tokens * topk:  # nobody takes more than all tokens
            break
        counts = wider
        if bucket_index((*counts, *[0] * (experts - active))) % 4 >= uneven:
            break
        variance = 1.3 * variance + 0.05
    return (*counts, *[0] * (experts - active))


def _spread(tokens: int, topk: int, active: int, variance: float) -> list[int]:
    """Rows of the active experts, of a gamma distribution (Wilson and Hilferty's cubes): each has at least one and at
    most one of every token."""
    levels = np.array([NormalDist().inv_cdf((rank + 0.5) / active) for rank in reversed(range(active))])
    rows = np.maximum(1e-3, 1 - variance / 9 + levels * sqrt(variance) / 3) ** 3
    free = np.ones(active, dtype=bool)
    while free.any():
        rows[free] *= (tokens * topk - rows[~free].sum()) / rows[free].sum()
        within = free & (rows >= 1) & (rows <= tokens)
        rows = np.clip(rows, 1, tokens)
        if (within == free).all():
            break
        free = within
    return [int(each) for each in np.diff(np.rint(np.cumsum(rows)), prepend=0)]
