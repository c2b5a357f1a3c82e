"""What tuning begins with: the routing, and what is known of the candidates. Those that were good under another routing
suffice where they are many; those that broke off an earlier tuning are left out. Also what is kept of one that raised
in a call, and why a call measured nothing."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moecache import routing
from moecache.devices import Place
from moecache.dispatch.any_routing import ByRouting, least_loss
from moecache.kernels.code import code_of
from moecache.kernels.own_mode import own_mode
from moecache.schemas.config import Config
from moecache.schemas.problem import Problem
from moecache.schemas.rule import Status
from moecache.schemas.timing import TRIES, Timing, now
from moecache.store.trying import note


def proven(by_routing: ByRouting, place: Place) -> list[Config]:
    """The configs that were timed on this product under any routing, the one that came nearest to the best of a routing
    first."""
    here = {bucket for bucket, (winner, *_) in by_routing.winners.items() if not place.foreign(winner.environment)}
    nearest = least_loss({bucket: each for bucket, each in by_routing.times.items() if bucket in here})
    return [by_routing.configs[name] for name in sorted(nearest, key=lambda name: (nearest[name], name))]


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


def unusable(problem: Problem, config: Config, place: Place, status: Status, reason: str) -> Timing:
    """The row of a config that failed outside of a race, now."""
    here, code = place.environment, code_of(problem.op, config.variant)
    ran: dict[str, Any] = {"problem": problem, "config": config, "environment": here, "code": code}
    return Timing(**ran, status=status, reason=reason, measured_at=now())


@contextmanager
def noted(cache: Path | None, problem: Problem, place: Place) -> Iterator[Callable[[Config | None], None]]:
    """A function that notes which config is tried, None for none, so that a next process knows what ended this one."""
    ended = "its process ended while it was tried; `moecache prune --failed` lets it be tried again"
    with note(cache) as write:
        yield lambda config: write(unusable(problem, config, place, "crashed", ended) if config else None)


def unmeasured(timings: Sequence[Timing], left: int, seconds: float) -> str:
    """Why tuning within the budget of a call found no winner, with so many candidates left; '' where it found one."""
    if any(row.status == "ok" for row in timings):
        return ""
    if timings:
        return f"no candidate was usable ({timings[0].config.name}: {timings[0].reason})"
    late = f"MOECACHE_BUDGET, {seconds:g} s, does not suffice to time a candidate"
    return late if left else "all candidates have failed earlier"


def in_its_routing(problem: Problem, topk_ids: torch.Tensor | None) -> Problem:
    """The question in the routing bucket of its call, where it leaves the routing open."""
    if problem.routing or topk_ids is None:
        return problem
    bucket = routing.bucket(routing.histogram(topk_ids, problem.experts))
    return problem.model_copy(update={"routing": bucket})


@own_mode()
def routing_to_tune(problem: Problem, given: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """topk_ids [tokens, topk] on the device, in the problem's routing bucket.

    The caller's own routing where it is of that size and bucket; else drawn from the problem's bucket, or, if
    the problem names none, from the bucket of the caller's routing.
    """
    bucket = problem.routing
    if given is not None and given.dim() == 2:
        seen = routing.bucket(routing.histogram(given, problem.experts))
        bucket = bucket or seen
        if bucket == seen and tuple(given.shape) == (problem.tokens, problem.topk):
            return given.detach().clone().to(device)
    if problem.topk > problem.experts:  # no draw gives distinct experts then: the caller's rows over again
        rows = given if given is not None and len(given) else torch.zeros(1, problem.topk, dtype=torch.int32)
        return rows[torch.arange(problem.tokens) % len(rows)].to(device)
    bucket = bucket or routing.NAMES[0]
    return routing.draw_bucket(bucket, problem.tokens, problem.experts, problem.topk).to(device)
