"""Which config serves any routing: the one that is never far behind the best, in whatever bucket was measured."""

from collections.abc import Mapping
from typing import NamedTuple

from moecache.schemas.problem import Problem


class Verdict(NamedTuple):
    """A config and what it loses: µs / best − 1 in each routing bucket where it was timed."""

    name: str
    losses: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest loss."""
        return max(self.losses.values())


def least_worst(times: Mapping[str, Mapping[str, float]]) -> Verdict | None:
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
    verdicts = [Verdict(name, found) for name, found in losses.items()]
    return min(verdicts, key=lambda v: (-len(v.losses), v.worst, sum(v.losses.values()), v.name), default=None)


def any_routing(problem: Problem) -> Problem:
    """The same question with its routing left open."""
    return problem.model_copy(update={"routing": ""}) if problem.routing else problem
