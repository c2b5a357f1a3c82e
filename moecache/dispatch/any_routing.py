"""Which config serves any routing: the one that is never far behind the best, in whatever bucket was measured; and
which two do where a captured graph needs two."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from moecache.feedback import FEW_PAIRS
from moecache.predict.rates import alone_us
from moecache.routing import NAMES
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.device import KNOWN, by_arch
from moecache.schemas.problem import Problem, bucket_levels
from moecache.schemas.timing import Tier, Winner

WORTH = 0.01  # what a second config must gain in the worst bucket: it takes memory, and a capture twice the launches
MOST = 128  # configs that are paired: those nearest to the best of a bucket. All pairs of so many take 5 ms


class ByRouting(NamedTuple):
    """What is known of one question under every routing that was measured.

    Attributes:
        winners: the stored answer of each routing bucket: winner, tier, file.
        times: µs by config name, by routing bucket, as far as `believed`; of the winner's file and environment.
        configs: by name.
        bad: names that failed under some routing.
    """

    winners: dict[str, tuple[Winner, Tier, str]]
    times: dict[str, dict[str, float]]
    configs: dict[str, Config]
    bad: frozenset[str]


class LeastWorst(NamedTuple):
    """A config and what it loses: µs / best − 1 in each routing bucket where it was timed."""

    name: str
    losses: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest loss."""
        return max(self.losses.values())


class Turns(NamedTuple):
    """Two configs by turns and the largest loss over the measured routing buckets."""

    both: Alternatives
    worst: float


def least_worst(times: Mapping[str, Mapping[str, float]]) -> LeastWorst | None:
    """The config whose largest loss is least; ties by the sum of the losses, then by name.

    One that is timed in fewer buckets than another never beats it: what was not timed may be slow.

    Args:
        times: µs by config name, by routing bucket; a bucket without times counts for nothing.
    """
    losses: dict[str, dict[str, float]] = {}
    for bucket, each in times.items():
        best = min(each.values(), default=0.0)
        for name, us in each.items():
            losses.setdefault(name, {})[bucket] = us / best - 1
    every = [LeastWorst(name, found) for name, found in losses.items()]
    return min(every, key=lambda v: (-len(v.losses), v.worst, sum(v.losses.values()), v.name), default=None)


def least_loss(times: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """By config name, µs / best of the routing, where that is least.

    Args:
        times: µs by config name, by routing bucket.
    """
    found: dict[str, float] = {}
    for each in times.values():
        best = min(each.values(), default=0.0)
        for name, us in each.items():
            found[name] = min(found.get(name, us / best), us / best)
    return found


def by_turns(
    alternating: Any,
    problem: Problem,
    times: Mapping[str, Mapping[str, float]],
    configs: Mapping[str, Config],
    single: LeastWorst,
    failed: Collection[str] = (),
) -> Turns | None:
    """Two configs that lose less by turns than `single` does alone, by WORTH at least; None where none do, or where the
    op cannot put two into one call.

    Args:
        alternating: what puts two configs of the op into one call, see `kernels.registry.alternating`.
        times: µs by config name, by routing bucket: what `single` was chosen from.
        configs: by name.
        failed: names of alternatives that raised in this process.
    """
    measured = {bucket: each for bucket, each in times.items() if each}
    if alternating is None or problem.tokens * problem.topk <= FEW_PAIRS or single.worst <= WORTH:
        return None
    kinds = {name: alternating.kind(problem, config) for name, config in configs.items()}
    names = _nearest({name for each in measured.values() for name in each if kinds.get(name)}, measured)
    if len(names) < 2:
        return None
    us = np.array([[each.get(name, np.inf) for each in measured.values()] for name in names])
    device = by_arch(problem.arch) or KNOWN["h200"]
    idle = np.array([alone_us(alternating.idle(problem, configs[name]), device) for name in names])
    best = np.array([min(each.values()) for each in measured.values()])
    bad = {frozenset(name.split(" | ")) for name in failed}
    apart = [[kinds[a] != kinds[b] or (bool(bad) and frozenset((a, b)) in bad) for b in names] for a in names]
    pair = _best_pair(us, idle, best, np.array(apart))
    if pair is None or pair[2] >= single.worst - WORTH:
        return None
    first, second, worst = pair
    wins = dict(zip(measured, us[second] + idle[first] < us[first] + idle[second], strict=True))
    if 2 * sum(wins.values()) > len(wins):
        first, second, wins = second, first, {bucket: not won for bucket, won in wins.items()}
    served = tuple(name for name in NAMES if _owned(name, wins))
    return Turns(Alternatives(first=configs[names[first]], second=configs[names[second]], served=served), worst)


def _nearest(names: Collection[str], measured: Mapping[str, Mapping[str, float]]) -> list[str]:
    """In a fixed order; of many those that are nearest to the best of some bucket."""
    if len(names) <= MOST:
        return sorted(names)
    least = least_loss(measured)
    return sorted(sorted(names, key=lambda name: (least[name], name))[:MOST])


def _best_pair(us: Any, idle: Any, best: Any, apart: Any) -> tuple[int, int, float] | None:
    """(one, other, worst loss) of the two rows of `us` [configs, buckets] whose worst loss by turns is least, with what
    the other one takes that has nothing to do; those that are to be kept apart left out. Ties by the sum, then by
    order."""
    works = us[:, None] + idle[None, :, None]
    losses = np.minimum(works, works.transpose(1, 0, 2)) / best - 1
    worst, total = losses.max(axis=2), losses.sum(axis=2)
    worst[apart] = worst[np.tril_indices(len(us))] = np.inf
    least = worst.min()
    if not np.isfinite(least):
        return None
    ties = [(int(i), int(j)) for i, j in zip(*np.nonzero(worst == least), strict=True)]
    one, other = min(ties, key=lambda at: (total[at], at))
    return one, other, float(least)


def _owned(name: str, wins: Mapping[str, bool]) -> bool:
    """Whether the second of two serves a routing bucket: one that was not measured goes with the nearest measured one,
    to the first where several are as near."""

    def apart(other: str) -> int:
        return sum(abs(a - b) for a, b in zip(bucket_levels(name), bucket_levels(other), strict=True))

    least = min(apart(bucket) for bucket in wins)
    return all(won for bucket, won in wins.items() if apart(bucket) == least)
