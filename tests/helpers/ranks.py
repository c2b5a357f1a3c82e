"""Ranks of torch.distributed over gloo, each a forked process: `ranks.py SCENE SIZE` prints what became of each.

A scene is a function of a process group's rank and size: what it returns is a line of JSON, else its error is.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import programs
import torch.distributed as dist

from moecache.schemas.errors import InvalidInput, MoecacheError
from moecache.team import Team

ROOT = Path(__file__).parents[2]
SHORT = 1.0  # seconds that a team waits for who never comes
LONG = 300.0  # for who comes: however slow the machine is


def ranks(scene: str, size: int) -> list[Any]:
    """What the ranks of a scene said, None of those that did not live to say anything."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOECACHE_")}
    done = programs.run(__file__, scene, str(size), cwd=ROOT, env=kept | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def lost(work: Callable[[], Any]) -> list[Any]:
    """The error of work that raises one of ours, and the seconds until then."""
    began = time.monotonic()
    try:
        work()
    except MoecacheError as error:
        return [type(error).__name__, str(error), time.monotonic() - began]
    return ["nothing", "", 0.0]


# --- scenes ---


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
    """Rank 1 is killed between two questions, and rank 2 comes to nothing any more though it is there."""
    return _without({1: signal.SIGKILL, 2: signal.SIGSTOP}.get(rank))


def keeper_dies(rank: int, size: int) -> Any:
    """The rank that keeps the store is killed."""
    return _without(None if rank else signal.SIGKILL)


def keeper_freezes(rank: int, size: int) -> Any:
    """The rank that keeps the store stays where it is."""
    return _without(None if rank else signal.SIGSTOP)


def _without(end: signal.Signals | None) -> Any:
    patient, team = Team.of(timeout=LONG), Team.of(timeout=SHORT)

    def work() -> None:
        patient.barrier("before")
        if end is not None:
            os.kill(os.getpid(), end)
        team.barrier("after")

    return lost(work)


KEPT_BY_RANK_0 = (keeper_dies, keeper_freezes)  # else by the parent, as by torchrun
FROZEN = {gone: 2, keeper_freezes: 0}  # the rank that is ended when all others have


def main(name: str, size: int) -> None:
    scene, pipes = globals()[name], [os.pipe() for _ in range(size)]
    out = [os.pipe() for _ in range(size)]
    pids = []
    for rank in range(size):
        pids.append(os.fork())
        if not pids[-1]:
            os.close(out[rank][0])
            return _rank(scene, rank, size, pipes, out[rank][1])
    store = None if scene in KEPT_BY_RANK_0 else _store(pipes)
    frozen = [pids[FROZEN[scene]]] if scene in FROZEN else []
    for pid in [pid for pid in pids if pid not in frozen]:
        os.waitpid(pid, 0)
    for pid in frozen:
        os.kill(pid, signal.SIGKILL)
    said = []
    for reading, writing in out:
        os.close(writing)
        said.append(os.fdopen(reading).read())
    print(json.dumps([json.loads(text) if text else None for text in said]))
    del store


def _store(pipes: list[tuple[int, int]]) -> Any:
    """A store that all ranks find."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _, writing in pipes:
        os.write(writing, f"{store.port}\n".encode())
    return store


def _rank(scene: Callable[[int, int], Any], rank: int, size: int, pipes: list[tuple[int, int]], out: int) -> None:
    kept = _store(pipes) if scene in KEPT_BY_RANK_0 and rank == 0 else None
    port = int(os.read(pipes[rank][0], 16))
    store = kept or dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    os.write(out, json.dumps(scene(rank, size)).encode())
    os.close(out)
    os._exit(0)  # not through gloo's own end, which would wait for ranks that are no more


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
