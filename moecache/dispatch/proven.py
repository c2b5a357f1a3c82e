"""What is known of a problem's candidates before it is tuned: those that were good under another routing, which suffice
where they are many, and those that broke off an earlier tuning; and what is kept of one that raised in a call."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from moecache.dispatch.recall import Spread
from moecache.place import Place
from moecache.schemas.config import Config
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing


def proven(spread: Spread) -> list[Config]:
    """The configs that were timed under any routing, the one that came nearest to the best of a routing first."""
    nearest = least_loss(spread.times)
    return [spread.configs[name] for name in sorted(nearest, key=lambda name: (nearest[name], name))]


def fatal(timings: Iterable[tuple[Timing, str]], here: Environment) -> set[Config]:
    """Configs of a problem without a winner that may have ended its tuning: the next would end there, too."""
    bad = ("timeout", "crashed", "raised")
    return {row.config for row, _ in timings if row.environment == here and row.status in bad}


def raised(problem: Problem, config: Config, place: Place, error: BaseException) -> Timing:
    """The row of a config that raised at launch."""
    return Timing(
        problem=problem, config=config, environment=place.environment, status="raised",
        reason=f"at launch: {type(error).__name__}: {error}"[:500],
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


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
