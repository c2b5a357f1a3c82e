"""What the ranks of a team do together: which ops ask for that, what all measure, and who writes a file they share."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moecache.kernels.contract import Op
from moecache.schemas.problem import Problem
from moecache.team import ALONE, Team


def team_of(op: Op, team: Team) -> Team:
    """The ranks that an op is tuned with: all where its candidates are collectives, else this one alone."""
    return team if getattr(op, "collective", False) else ALONE


@contextmanager
def in_turn(team: Team, cache: Path | None) -> Iterator[bool]:
    """Tells whether this rank writes what all have measured, or reads it once it is written.

    The first of those ranks writes that have one file, as far as hosts tell; each has its own where there is none.
    """
    mine = None if cache is None else [socket.gethostname(), str(cache.resolve())]
    first = team.gather("cache files", mine).index(mine) == team.rank or mine is None
    if not first:
        team.barrier("timings are written")
    yield first
    if first:
        team.barrier("timings are written")


def problems(team: Team, mine: Sequence[Problem]) -> list[Problem]:
    """The problems of all ranks, in an order that all have: what one has measured another may not have."""
    told = team.gather("problems to measure", [problem.model_dump_json() for problem in mine])
    every = [Problem.model_validate_json(text) for each in told for text in each]
    return list({problem.key: problem for problem in every}.values())
