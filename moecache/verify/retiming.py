"""Whether the winners of a cache file still win: a sample is timed here again, each winner beside its rivals.

The tuner does it, with its clock, its checks and its subprocesses, on those few candidates; what it finds goes into a
store in memory, so that the file under verification is only read.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from moecache.devices import Place
from moecache.dispatch import Dispatcher
from moecache.dispatch.policy import Ask, refused
from moecache.kernels import registry as ops
from moecache.kernels.contract import Op
from moecache.schemas.config import Config
from moecache.schemas.errors import DeviceLost, MoecacheError
from moecache.schemas.problem import Problem
from moecache.schemas.rule import better
from moecache.schemas.timing import Environment, Timing, Winner
from moecache.store import Store
from moecache.text import micros
from moecache.tuning.candidates import Only
from moecache.verify.usable import place_of, unjudged

State = Literal["wins", "ties", "loses", "fails"]


@dataclass(frozen=True)
class Side:
    """One config, as it was stored and as it is now. µs; None where there is no such time."""

    config: Config
    stored_us: float | None
    us: float | None


@dataclass(frozen=True)
class Retimed:
    """A stored winner timed again, beside the default of today and the stored runner-up, if there is one.

    Attributes:
        here: whether it was stored in this environment.
        loss: by how much the fastest rival is faster, winner / rival − 1; 0 for a winner that wins, inf for one that
            fails.
        reason: who is faster, or what became of the winner.
    """

    stored: Winner
    here: bool
    winner: Side
    default: Side
    runner_up: Side | None
    state: State
    loss: float
    reason: str
    noise: float | None = None  # of the winner now, median absolute deviation / median

    @property
    def problem(self) -> Problem:
        return self.stored.problem

    @property
    def ratio(self) -> float | None:
        """Time now / time stored."""
        return self.winner.us / self.stored.median_us if self.winner.us else None


@dataclass(frozen=True)
class Drift:
    """What a sample says of a file.

    Attributes:
        eligible: the winners that could be timed here; `rows` are of those.
        skipped: why others were not timed, and how many.
    """

    seed: int
    tolerance: float
    eligible: int
    rows: tuple[Retimed, ...]
    skipped: dict[str, int]

    @property
    def geomean(self) -> float | None:
        """Geometric mean of now / stored."""
        logs = [math.log(row.ratio) for row in self.rows if row.ratio]
        return math.exp(sum(logs) / len(logs)) if logs else None

    @property
    def share(self) -> float | None:
        """Of the winners that were timed, the share that still wins or ties."""
        return sum(row.state in ("wins", "ties") for row in self.rows) / len(self.rows) if self.rows else None

    @property
    def findings(self) -> list[str]:
        """Winners that cannot be used any more, or lose by more than the tolerance."""
        return [
            f"{row.problem.id} {row.winner.config.name}: {row.reason}"
            for row in self.rows
            if row.state in ("loses", "fails") and row.loss > self.tolerance
        ]


def retime(
    store: Store,
    serving: Dispatcher,
    *,
    count: int,
    seed: int = 0,
    tolerance: float = 0.05,
    tell: Callable[[str], None] = lambda text: None,
) -> Drift:
    """Time up to `count` winners of this machine's devices again, those of known ops and the present kernels.

    Args:
        serving: keeps what is measured: give one whose store is in memory.
        seed: which winners; equal files and seeds give equal samples.
        tolerance: a winner that loses by more is a finding.
        tell: told what is being timed.
    """
    skipped: Counter[str] = Counter()
    eligible = _eligible(store, serving, skipped)
    drawn, rows = spread(eligible, count, seed), list[Retimed]()
    for number, winner in enumerate(drawn):
        problem = winner.problem
        tell(f"[{number + 1}/{len(drawn)}] {problem.op} tokens={problem.tokens} routing={problem.routing or '-'}")
        try:
            rows.append(_retimed(store, serving, winner))
        except DeviceLost as lost:  # nothing that follows could be timed
            skipped[str(lost)] += len(drawn) - number
            break
        except (MoecacheError, RuntimeError, MemoryError, OSError) as error:
            skipped[str(error).replace(problem.key, "it")] += 1
    return Drift(seed, tolerance, len(eligible), tuple(rows), {why: n for why, n in skipped.items() if n})


def spread(pool: Sequence[Winner], count: int, seed: int) -> list[Winner]:
    """`count` of them: the next is of the op, then of the token and routing buckets, that were drawn least."""
    rest, found, drawn = sorted(pool, key=lambda w: w.problem.key), list[Winner](), Counter[tuple[Any, ...]]()
    random.Random(seed).shuffle(rest)

    def traits(winner: Winner) -> tuple[tuple[Any, ...], ...]:
        p = winner.problem
        return (p.op,), (p.op, p.tokens), (p.op, p.routing)

    def often(winner: Winner) -> tuple[int, int]:
        op, tokens, routing = (drawn[trait] for trait in traits(winner))
        return op, tokens + routing

    while rest and len(found) < count:
        found.append(min(rest, key=often))
        rest.remove(found[-1])
        drawn.update(traits(found[-1]))
    return found


def _eligible(store: Store, serving: Dispatcher, skipped: "Counter[str]") -> list[Winner]:
    """The winners that can be timed here, one a problem; why others cannot is counted in `skipped`."""
    chosen: dict[str, Winner] = {}
    place = place_of(serving.places)
    for winner in store.winners():
        p = winner.problem
        if why := _unfit(winner, place(p)):
            skipped[why] += 1
            continue
        here, other = place(p).environment, chosen.get(p.key)
        skipped["the same problem is stored of another environment too"] += other is not None
        if other is None or _rank(winner, here) > _rank(other, here):
            chosen[p.key] = winner
    return list(chosen.values())


def _rank(winner: Winner, here: Environment) -> tuple[bool, str]:
    return winner.environment == here, winner.measured_at


def _unfit(winner: Winner, place: Place) -> str:
    """Why a winner cannot be timed here, in words that many share; '' when it can."""
    problem = winner.problem
    if place.backend is None:
        return f"{problem.vendor} {problem.arch} with {problem.units} units is not here"
    if why := unjudged(problem):
        return why
    op = ops.get(problem.op)
    if getattr(op, "collective", False):
        return f"{problem.op} is measured by all ranks together"
    fits = not refused(Ask(op, problem, place), winner.config)
    return "" if fits else "its config may not serve any more"


def _retimed(store: Store, serving: Dispatcher, winner: Winner) -> Retimed:
    """Time a winner beside its stored runner-up and the default of today.

    Raises:
        MoecacheError: it could not be timed, which says nothing against it.
    """
    problem, op = winner.problem, ops.get(winner.problem.op)
    place = serving.places.of_problem(problem)
    stored = store.timings(problem, environment=winner.environment.id, status="ok", today=True)
    rivals = [t.config for t in stored if t.config != winner.config and not refused(Ask(op, problem, place), t.config)]
    default, runner_up = op.space(problem, place.device)[0], rivals[0] if rivals else None
    few = Only(op, tuple(dict.fromkeys([winner.config, default, *rivals[:1]])))
    try:
        timings = serving.measure(cast(Op, few), problem)
    except DeviceLost as lost:
        timings = [each for each in lost.timings if isinstance(each, Timing)]
        if winner.config not in {each.config for each in timings}:
            raise
    # a file behind the user's may have brought an incumbent to the race: that is not asked here
    now, before = {t.config: t for t in timings if t.config in few.configs}, {t.config: t for t in stored}
    if winner.config not in now:
        raise MoecacheError("the budget did not reach it")

    def side(config: Config) -> Side:
        return Side(config, *(times[config].median_us if config in times else None for times in (before, now)))

    usable = [t for t in now.values() if t.config != winner.config and t.median_us is not None]
    sides = side(winner.config), side(default), side(runner_up) if runner_up else None
    verdict, noise = _verdict(now[winner.config], usable), _noise(now[winner.config])
    return Retimed(winner, winner.environment == place.environment, *sides, *verdict, noise)


def _noise(timing: Timing) -> float | None:
    """Median absolute deviation / median; None where nothing was timed."""
    return timing.mad_us / timing.median_us if timing.median_us and timing.mad_us is not None else None


def _verdict(mine: Timing, rivals: Sequence[Timing]) -> tuple[State, float, str]:
    """(state, loss, reason) of a winner beside usable rivals, by the rule that decides winners: it loses to what is
    proved faster."""
    if mine.median_us is None:
        return "fails", math.inf, f"{mine.status}: {mine.reason}"
    if not rivals:
        return "wins", 0.0, ""
    mine_is, *others = (row.entry for row in (mine, *rivals))
    holds = not any(better(other, mine_is) for other in others)
    best = min(rivals, key=lambda rival: rival.median_us or math.inf)
    loss = mine.median_us / (best.median_us or math.inf) - 1
    reason = f"now {micros(mine.median_us)} µs, {micros(best.median_us)} with {best.config.name}" if loss > 0 else ""
    return "wins" if loss <= 0 else "ties" if holds else "loses", max(0.0, loss), reason
