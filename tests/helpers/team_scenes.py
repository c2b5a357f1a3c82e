"""What ranks do that agree, and what becomes of those whose neighbour dies, hangs, raises or asks something else."""

import os
import signal
from functools import partial
from typing import Any

import torch.distributed as dist
from ranks import LONG, SHORT, lost

from moecache.schemas.errors import InvalidInput
from moecache.team import Team


def agree(rank: int, size: int) -> Any:
    """Every question once, then another team of the same group, one of a part, and one alone."""
    team = Team.of(timeout=LONG)
    team.barrier("here")
    found = {
        "rank": team.rank, "size": team.size, "max": team.agree("a", rank / 2, max), "min": team.agree("b", rank, min),
        "broadcast": team.broadcast("c", {"from": rank}), "gather": team.gather("d", [rank, None, "µ", float("inf")]),
        "same": team.same("equal"),
        "differ": lost(lambda: team.same("one" if rank == 1 else "other"))[:2], "after": team.gather("e", rank),
    }  # fmt: skip
    again = Team.of(timeout=LONG)
    found["again"] = [again.gather("first", rank), team.gather("old", -rank), again.gather("second", 2 * rank)]
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    found["part"] = Team.of(groups[rank % 2], timeout=LONG).gather("part", rank)
    if rank % 2:
        found["outside"] = lost(partial(Team.of, groups[0]))[:2]
    return found


def part(rank: int, size: int) -> Any:
    """In turn: one asks something else, as with a miss where the others have a hit; one raises."""
    team, found = Team.of(timeout=LONG), []
    found += [lost(lambda: team.barrier("miss" if rank == 1 else "hit"))[:2], lost(lambda: team.barrier("x"))[:2]]
    team = Team.of(timeout=LONG)

    def work() -> None:
        with team.staying():
            team.barrier("before")
            if rank == size - 1:
                raise InvalidInput("cannot go on")
            team.barrier("after")

    return [*found, lost(work)[:2]]


def gone(rank: int, size: int) -> Any:
    """Between two questions rank 1 is killed, and rank 2 comes to nothing any more though it is there."""
    return _left_by({1: signal.SIGKILL, 2: signal.SIGSTOP}, 0, rank)


def keeper_dies(rank: int, size: int) -> Any:
    """The rank that keeps the store is killed."""
    return _left_by({0: signal.SIGKILL}, 1, rank)


def keeper_freezes(rank: int, size: int) -> Any:
    """The rank that keeps the store comes to nothing any more."""
    return _left_by({0: signal.SIGSTOP}, 1, rank)


def _left_by(ends: dict[int, signal.Signals], last: int, rank: int) -> Any:
    """What the last one meets when it has ended the others."""
    pids, team = Team.of(timeout=LONG).gather("before", os.getpid()), Team.of(timeout=SHORT)
    if rank in ends:
        signal.pause()
    for other, end in ends.items():
        os.kill(pids[other], end)
    return lost(lambda: team.barrier("after"))
