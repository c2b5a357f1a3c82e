"""What a warm-up measures by default, and what it reports."""

from dataclasses import dataclass

from moecache.schemas.config import Config
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Tier

TOKENS = tuple(1 << k for k in range(15))  # 1 to 16384: every token bucket that an engine asks
ROUTING = ("uniform", "dir2", "zipf", "hot1")  # they reach two to four routing buckets of a token bucket
OPS = ("moe_sort", "fused_moe", "grouped_gemm")  # built in: any process with this library can measure them
MOST_TOKENS = 1 << 17  # that one call may have
SPENT = "the budget is spent"  # the one reason for which a run may end without having measured all


@dataclass(frozen=True)
class LeftOut:
    """The part of the layers for which an op has no problems.

    Attributes:
        reason: in words for people.
        nothing: whether it has no problem at all.
    """

    op: str
    reason: str
    nothing: bool

    def __str__(self) -> str:
        return f"{self.op} {'is left out' if self.nothing else 'is left out in part'}: {self.reason}"


@dataclass(frozen=True)
class WarmRow:
    """What one problem is served with after the warm-up.

    Attributes:
        problem: the problem.
        config: what serves it.
        us: its time in µs. It is None where nothing was measured, and so are default_us, margin and noise.
        default_us: time of the static default in µs.
        margin: gain over the default, default / winner − 1.
        tier: how the answer is known.
        measured: number of candidates measured in this run; 0 if the answer was known or could not be measured.
        reason: why this config, or why it is not measured.
        noise: median absolute deviation / median of its samples.
    """

    problem: Problem
    config: Config
    us: float | None
    default_us: float | None
    margin: float | None
    tier: Tier
    measured: int
    reason: str
    noise: float | None = None


@dataclass(frozen=True)
class Progress:
    """Where a warm-up is. `remaining` is an estimate in seconds, None before anything was measured."""

    done: int
    total: int
    problem: Problem
    text: str
    elapsed: float
    remaining: float | None
