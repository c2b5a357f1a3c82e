"""How the ranks of a team tune one problem in step: the same candidates, each launched by all at the same time."""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import wait as wait_for
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from moecache.schemas.config import Config
from moecache.schemas.problem import Problem
from moecache.team import Team
from moecache.tuning import phases
from moecache.tuning.budget import Budget
from moecache.tuning.run import Entry, Run
from moecache.tuning.timing import Call, Clock, Failed, Sampler

PREPARING = 4  # preparing a sampler makes several calls, each with its own limit


class Plan(NamedTuple):
    """What is tried: see `tune`."""

    asked: Sequence[Config]
    without: Collection[Config]
    incumbent: Config | None
    budget: Budget


def in_common(team: Team, problem: Problem, mine: Plan) -> Plan:
    """The candidates of rank 0 but for those that any rank leaves out, and the shortest of the budgets."""
    if team.size == 1:
        return mine
    asked = [config.model_dump_json() for config in mine.asked]
    without = sorted(config.model_dump_json() for config in mine.without)
    said: Any = [asked, without, mine.incumbent and mine.incumbent.model_dump_json(), mine.budget.seconds]
    told = team.gather(f"candidates for {problem.key}", said)
    first, _, best, _ = told[0]
    return Plan(
        [Config.model_validate_json(text) for text in first],
        {Config.model_validate_json(text) for _, without, *_ in told for text in without},
        best and Config.model_validate_json(best),
        replace(mine.budget, seconds=min(seconds for *_, seconds in told), hurry=False),
    )


def in_step(run: Run, share: float) -> Iterator[Entry]:
    """Entries in the order of the shortlist, each once its kernels are compiled on every rank: none launches it alone,
    and waits for ranks that cannot."""
    for entry in run.in_time(run.entries, share):
        with phases.phase("compile"):
            wait_for(entry.kernels, timeout=run.patience)
        try:
            run.agreed(entry, partial(run.compiled, entry))
        except Failed:
            continue
        yield entry


def prepared(run: Run, entry: Entry, clock: Clock, calls: Sequence[Call]) -> Sampler:
    """What samples a candidate, on all ranks by the same times, so that all launch it as often.

    Raises:
        Failed: it cannot be prepared, on one rank at least.
    """
    limit = PREPARING * run.budget.call_seconds
    if run.team.size == 1:
        return run.attempt(entry, partial(clock.prepare, calls), limit)
    steps, found, us = clock.steps(calls), list[Sampler](), None

    def step() -> float:
        try:
            return run.attempt(entry, partial(steps.send, us), limit)
        except StopIteration as done:
            found.append(done.value)
            return 0.0

    while not found:
        us = run.agreed(entry, step)
    return found[0]
