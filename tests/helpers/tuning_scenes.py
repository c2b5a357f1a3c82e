"""An op whose candidates are collectives, some of which misbehave on one rank alone, and ranks that tune it. Also ranks
of which one alone measures an ordinary op."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import LONG, SHORT, lost
from toy import B, Toy, ToyClock

from moecache.backends.cpu import CpuBackend
from moecache.dispatch import Dispatcher, using
from moecache.kernels import registry
from moecache.schemas.config import Config, config
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing
from moecache.settings import Settings
from moecache.store import Store
from moecache.team import Team
from moecache.tuning.run import Budget
from moecache.tuning.tuner import tune
from moecache.warmup import warmup

STEADY, TURNS, LAME = config("steady"), config("turns"), config("lame")  # what their samples are: see OwnClock
WRONG, RAISE, HANG, TIRED = config("wrong"), config("raise"), config("hang"), config("tired")
END = config("end")


class Meeting(Toy):
    """Adds up a tensor over the ranks. All candidates do it right, but on rank 1 for what its variant says."""

    collective = True

    def __init__(self, rank: int, size: int, *configs: Config) -> None:
        super().__init__("meeting", times=dict.fromkeys(configs, 10.0), costs={})
        self.rank, self.size, self.order, self.end = rank, size, list[str](), threading.Event()

    def launch(self, config: Config, args: Any, out: torch.Tensor) -> torch.Tensor:
        self.order.append(config.variant)
        if config == END:
            return self.ending(out)
        dist.all_reduce(out.copy_(args["x"]))
        if self.rank == 1:
            time.sleep(self.nap if config == STEADY else 0)
            if config == RAISE or (config == TIRED and self.order.count("tired") == 8):  # the end of a sample
                raise ValueError("cannot do that here")
            if config == HANG:
                self.end.wait()
            out += config == WRONG
        return out

    def ending(self, out: torch.Tensor) -> torch.Tensor:
        """Rank 1 dies, rank 2 comes to nothing any more, and rank 0 shall not wait for long."""
        if self.rank:
            os.kill(os.getpid(), signal.SIGKILL if self.rank == 1 else signal.SIGSTOP)
        self.team.timeout = SHORT
        return out

    def reference(self, args: Any) -> torch.Tensor:
        return args["x"] * self.size


class OwnClock:
    """Samples by candidate and rank, each behind a real call."""

    def __init__(self, op: Meeting) -> None:
        self.op = op

    def copies(self, set_bytes: int) -> int:
        return 3 - self.op.rank

    def steps(self, calls: Sequence[Callable[[], Any]]) -> Iterator[float]:
        own = yield 1.0 + self.op.rank
        assert own == self.op.size, "all decide by the slowest"
        variant, other = calls[0].args[0].args[0].variant, self.op.rank == 1
        us = cycle(
            {"turns": [30.0, 10.0] if other else [10.0, 30.0], "lame": [40.0 if other else 5.0]}.get(variant, [20.0])
        )

        def sample() -> float:
            for call in calls:
                call()
            return next(us)

        return sample


class Replaying(CpuBackend):
    """A CPU whose graphs are the calls themselves."""

    def graph(self, call: Callable[[], object]) -> Callable[[], None]:
        return lambda: (call(), None)[1]


def said(timings: Sequence[Timing]) -> list[Any]:
    return [t.model_dump(mode="json") for t in timings]


def faults(rank: int, size: int) -> Any:
    """What fails on one rank alone fails on all, whenever it does."""
    op, team = Meeting(rank, size, STEADY, WRONG, RAISE, HANG, TIRED, LAME, TURNS), Team.of(timeout=LONG)
    ids, backend = torch.zeros(16, 2, dtype=torch.int32), CpuBackend()
    rows = tune(
        op, op.problem(), ids, backend, backend.device(), Environment(device_name="test"), team=team,
        clock=OwnClock(op), budget=Budget(seconds=LONG + rank, call_seconds=1.0 if rank else LONG),
    ).timings  # fmt: skip
    return {"rows": said(rows), "order": op.order}


def shared_file(rank: int, size: int) -> Any:
    """Through a dispatcher, all with one file; then with one each, what only one of them has to measure."""
    folder, team = Path(os.environ["FOLDER"]), Team.of(timeout=LONG)
    op = Meeting(rank, size, STEADY, RAISE, LAME, TURNS)
    found: dict[str, Any] = {}
    with using(Settings(db=folder / "one.sqlite"), backend=CpuBackend(), clock=OwnClock(op), team=team) as serving:
        before = serving.choose(op, op.problem()) if rank else None  # a call of one rank waits for nobody
        found["called"] = before and before.reason
        found["rows"] = said(serving.measure(op, op.problem()))
        found["choice"] = serving.choose(op, op.problem()).config.variant
        found["same"] = team.same(serving.digest(["meeting"]))
        found["refused"] = lost(lambda: serving.measure(op, op.problem(8), seconds=1 - rank))[:2]
    registry.register(op)
    first, second = op.problem(32), op.problem(64)
    with using(Settings(db=folder / f"{rank}.sqlite"), clock=OwnClock(op), team=team):
        found["alone"] = [row.measured for row in warmup([first], budget="60s")]
    if not rank:
        (folder / "0.sqlite").unlink()
    op.order.clear()
    with using(Settings(db=folder / f"{rank}.sqlite"), clock=OwnClock(op), team=team):
        found["warm"] = [[row.config.variant, row.measured] for row in warmup([second, first], budget=f"{60 + rank}s")]
    found["order"] = op.order
    return found


def real_clock(rank: int, size: int) -> Any:
    """By the device's own clock, which makes as many calls as seem good: on all ranks as many."""
    op, team, found = Meeting(rank, size, STEADY, TURNS), Team.of(timeout=LONG), []
    for backend in (CpuBackend(), Replaying()):
        ids = torch.zeros(16, 2, dtype=torch.int32)
        rows = tune(
            op, op.problem(), ids, backend, backend.device(), Environment(device_name="test"), team=team,
            budget=Budget(seconds=0.2, memory_bytes=1000 * (1 + rank)),
        ).timings  # fmt: skip
        found.append(said(rows))
    return {"rows": found, "order": op.order}


def slow(rank: int, size: int) -> Any:
    """Rank 1 is late with one candidate, in a call and by the device's own clock, which the other does not see."""
    op, team = Meeting(rank, size, STEADY, TURNS), Team.of(timeout=LONG)
    op.nap = 0.02
    with using(Settings(db=Path(os.environ["FOLDER"]) / f"{rank}.sqlite"), backend=CpuBackend(), team=team) as serving:
        rows = said(serving.measure(op, op.problem(), seconds=1.0 + rank))
        choice = serving.choose(op, op.problem()).config.variant
        return {"rows": rows, "choice": choice, "same": team.same(serving.digest(["meeting"]))}


def ends(rank: int, size: int) -> Any:
    """Rank 1 dies in the middle and rank 2 hangs. Started again, with the same files, all go on without what did it."""
    folder, op, team = Path(os.environ["FOLDER"]), Meeting(rank, size, STEADY, END), Team.of(timeout=LONG)
    op.team = team
    serving = Dispatcher(Settings(db=folder / f"{rank}.sqlite"), CpuBackend(), OwnClock(op), team)
    if "AGAIN" not in os.environ:
        return lost(lambda: serving.measure(op, op.problem()))
    found = {"rows": said(serving.measure(op, op.problem())), "same": team.same(serving.digest(["meeting"]))}
    return found | {"sound": serving.lookup.tiers.user.check(), "notes": len(list(folder.glob("*.trying-*")))}


class Deadly(Toy):
    """An ordinary op, one of whose candidates ends its process."""

    def launch(self, config: Config, args: Any, out: torch.Tensor) -> torch.Tensor:
        if config == B:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().launch(config, args, out)


def one_measures(rank: int, size: int) -> Any:
    """Rank 0 measures two problems and dies at it; the others wait. Started again, with the same file, all are served
    alike."""
    op, team = Deadly(), Team.of(timeout=LONG if "AGAIN" in os.environ else SHORT)
    registry.register(op)
    chosen = Settings(db=Path(os.environ["FOLDER"]) / "one.sqlite")
    op.unfit = {B: "not for so few tokens"} if "FIRST" in os.environ else {}
    if not rank:
        with using(chosen, clock=ToyClock(op)):
            first = warmup([op.problem(32)], budget="60s")[0].measured
            op.unfit = {}
            warmup([op.problem(64)], budget="60s")
    if why := lost(lambda: team.barrier("warm-up"))[1]:
        return why
    with using(chosen, mode="replay") as serving:
        team.same(serving.digest([op.name]))
        choices = [serving.choose(op, op.problem(tokens)) for tokens in (32, 64)]
        team.same(" ".join(choice.config.name for choice in choices), "choices")
        return {"measured": first if not rank else 0, "choices": [[c.config.name, c.tier] for c in choices]}


def cold(rank: int, size: int) -> Any:
    """Each has a file of its own, and that of rank 1 is empty, until it takes what the other one has."""
    folder, team, op = Path(os.environ["FOLDER"]), Team.of(timeout=LONG), Toy()
    registry.register(op)
    mine = folder / f"{rank}.sqlite"
    with using(Settings(db=mine), clock=ToyClock(op)):
        if not rank:
            warmup([op.problem(32)], budget="60s")
    team.barrier("warm-up")
    with using(Settings(db=mine), mode="replay") as serving:
        found: dict[str, Any] = {"differ": lost(lambda: team.same(serving.digest([op.name])))}
        found["before"] = serving.choose(op, op.problem(32)).tier
        if rank:
            with Store.open(mine) as own, Store.open(folder / "0.sqlite", readonly=True) as other:
                own.merge(other)
        serving.reload()
        found["same"] = team.same(serving.digest([op.name]))
        choice = serving.choose(op, op.problem(32))
        return found | {"after": [team.same(choice.config.name, "choice"), choice.tier]}


def raises(rank: int, size: int) -> Any:
    """Rank 1 cannot make inputs."""
    op, team = Meeting(rank, size, STEADY, TURNS), Team.of(timeout=LONG)

    def inputs(problem: Problem, topk_ids: torch.Tensor, seed: int) -> Any:
        raise MemoryError("no room for inputs")

    if rank == 1:
        op.inputs = inputs
    serving = Dispatcher(Settings(db=Path(os.environ["FOLDER"]) / f"{rank}.sqlite"), CpuBackend(), OwnClock(op), team)
    try:
        return lost(lambda: serving.measure(op, op.problem()))[:2]
    except MemoryError as error:
        return ["MemoryError", str(error)]
