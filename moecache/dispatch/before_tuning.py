"""What tuning begins with: the routing, and what is known of the candidates. Those that were good under another routing
suffice where they are many; those that broke off an earlier tuning are left out. Also what is kept of one that raised
in a call."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moecache import routing
from moecache.dispatch import policy
from moecache.dispatch.policy import Ask
from moecache.dispatch.recall import Recall, Spread
from moecache.kernels.code import code_of
from moecache.kernels.own_mode import own_mode
from moecache.place import Place
from moecache.schemas.config import Config
from moecache.schemas.device import same_product
from moecache.schemas.problem import Problem
from moecache.schemas.timing import TRIES, Status, Timing
from moecache.store.trying import note


def known(ask: Ask, recall: Recall) -> dict[str, Any]:
    """What is known of the candidates of a question, as arguments of `tune`. Callers hold the dispatcher's lock."""
    place = ask.place
    won = policy.stored(ask, recall)
    seed = won or policy.stored(ask, recall, elsewhere=True)
    rows = [row for row, _ in recall.timings(ask.problem) if row.environment == place.environment]
    space, failed = ask.op.space(ask.problem, place.device), recall.failed(ask.problem)
    return {
        "incumbent": seed.config if seed else _told(ask, recall),
        "proven": proven(recall.spread(ask.problem, place), place),
        "without": left_out(rows, space, won is not None, failed),
    }  # fmt: skip


def _told(ask: Ask, recall: Recall) -> Config | None:
    """The config that a table of another project names for such calls, on this product if there is one."""
    if (told := getattr(ask.op, "told", None)) is None:
        return None
    rows = [row for row, _ in recall.timings(told(ask.problem)) if row.told and not policy.refused(ask, row.config)]
    return min(rows, key=lambda row: not recall.of_product(row, ask.place)).config if rows else None


def proven(spread: Spread, place: Place) -> list[Config]:
    """The configs that were timed on this product under any routing, the one that came nearest to the best of a routing
    first."""
    name = place.environment.device_name
    here = {b for b, (winner, _, _) in spread.winners.items() if same_product(winner.environment.device_name, name)}
    nearest = least_loss({bucket: each for bucket, each in spread.times.items() if bucket in here})
    return [spread.configs[name] for name in sorted(nearest, key=lambda name: (nearest[name], name))]


def left_out(rows: Sequence[Timing], space: Sequence[Config], known: bool, here: Collection[str]) -> set[Config]:
    """Configs of a problem that are not tried: with a winner those that failed for good, for the next would end there,
    too; without one all that may have ended a tuning, until nothing else is left.

    Args:
        rows: the timings of the problem in this environment.
        known: whether it has a winner.
        here: names of configs that failed in this process.
    """
    bad = {row.config: row for row in rows if row.status in ("timeout", "crashed", "raised")}
    lasting = {config for config, row in bad.items() if row.n >= TRIES}
    if known:
        return lasting
    failed = {row.config for row in rows if row.status != "ok"}
    spent = lasting | {config for config in bad if config.name in here}
    return spent if failed.issuperset(space) else set(bad)


def _failure(problem: Problem, config: Config, place: Place, status: Status, reason: str) -> Timing:
    """The row of a config that failed outside of a race, now."""
    return Timing(
        problem=problem, config=config, environment=place.environment, status=status, reason=reason,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"), code=code_of(problem.op, config.variant),
    )  # fmt: skip


def _ended_by(problem: Problem, config: Config, place: Place) -> Timing:
    """The row of a config that was being tried when its process ended."""
    reason = "its process ended while it was tried; `moecache prune --failed` lets it be tried again"
    return _failure(problem, config, place, "crashed", reason)


@contextmanager
def noted(cache: Path | None, problem: Problem, place: Place) -> Iterator[Callable[[Config | None], None]]:
    """A function that notes which config is tried, None for none, so that a next process knows what ended this one."""
    with note(cache) as written:
        yield lambda config: written.write(None if config is None else _ended_by(problem, config, place))


def raised(problem: Problem, config: Config, place: Place, error: BaseException) -> Timing:
    """The row of a config that raised at launch."""
    reason = f"at launch: {type(error).__name__}: {error}"[:500]
    return _failure(problem, config, place, "raised", reason)


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


def in_its_routing(ask: Ask) -> Ask:
    """The question in the routing bucket of its call, where it leaves the routing open."""
    if ask.problem.routing or ask.topk_ids is None:
        return ask
    bucket = routing.bucket(routing.histogram(ask.topk_ids, ask.problem.experts))
    return replace(ask, problem=ask.problem.model_copy(update={"routing": bucket}))


@own_mode()
def routing_to_tune(ask: Ask) -> torch.Tensor:
    """topk_ids [tokens, topk] on the problem's device, in its routing bucket.

    The caller's own routing where it is of that size and bucket; else drawn from the problem's bucket, or, if
    the problem names none, from the bucket of the caller's routing.
    """
    problem, bucket = ask.problem, ask.problem.routing
    given = ask.topk_ids
    if given is not None and given.dim() == 2:
        seen = routing.bucket(routing.histogram(given, problem.experts))
        bucket = bucket or seen
        if bucket == seen and tuple(given.shape) == (problem.tokens, problem.topk):
            return given.detach().clone().to(ask.place.torch_device)
    if problem.topk > problem.experts:  # no draw gives distinct experts then: the caller's rows over again
        rows = given if given is not None and len(given) else torch.zeros(1, problem.topk, dtype=torch.int32)
        return rows[torch.arange(problem.tokens) % len(rows)].to(ask.place.torch_device)
    bucket = bucket or routing.NAMES[0]
    drawn = routing.draw_bucket(bucket, problem.tokens, problem.experts, problem.topk)
    return drawn.to(ask.place.torch_device)
