"""Whether the winners of a cache file still win: some are timed here again, each beside its rivals.

The tuner does it, with its clock, its checks and its subprocesses, on those few candidates; what it finds goes into a
store in memory, so that the file under verification is only read.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from moecache.devices import Place
from moecache.dispatch import Dispatcher
from moecache.dispatch.policy import Ask, refused
from moecache.kernels import registry as ops
from moecache.kernels.contract import Op
from moecache.schemas.errors import DeviceLost, MoecacheError
from moecache.schemas.rule import better
from moecache.schemas.timing import Timing, Winner
from moecache.store import Store
from moecache.text import micros, percent
from moecache.tuning.candidates import Only
from moecache.verify.usable import unjudged

TOLERANCE = 0.05  # a winner may be so much slower than another: the next run may say the opposite of less


@dataclass(frozen=True)
class Retimed:
    """A stored winner timed again, beside the default of today and the stored runner-up, if there is one."""

    stored: Winner
    now: Timing
    rivals: tuple[Timing, ...]  # usable ones, the fastest first

    @property
    def lost(self) -> bool:
        """Whether it cannot be used any more, or one of the others is proved faster by more than TOLERANCE."""
        if self.now.median_us is None:
            return True
        slow, fast = self.now.entry, [rival.entry for rival in self.rivals]
        return any(better(each, slow) and slow.us / each.us - 1 > TOLERANCE for each in fast)

    def __str__(self) -> str:
        told = f"{self.stored.problem.id} {self.stored.config.name}: {micros(self.stored.median_us)} µs stored, now "
        if (us := self.now.median_us) is None:
            return f"{told}{self.now.status}: {self.now.reason}"
        best = self.rivals[0].entry if self.rivals else None
        beside = "" if best is None else f", {micros(best.us)} with {best.name} ({percent(us / best.us - 1, '+')} %)"
        return f"{told}{micros(us)}{beside}"


def retime(
    store: Store, serving: Dispatcher, *, count: int, tell: Callable[[str], None] = lambda text: None
) -> tuple[list[Retimed], "Counter[str]"]:
    """Time up to `count` winners of this machine's devices again, those of known ops and the present kernels. Beside
    them, why others were not timed, with their number. Equal files give equal samples.

    Args:
        serving: keeps what is measured: give one whose store is in memory.
        tell: told what is being timed.
    """
    skipped, rows = Counter[str](), list[Retimed]()
    eligible = dict[str, Winner]()
    for winner in store.winners():
        if why := _unfit(winner, serving.places.of_problem(winner.problem)):
            skipped[why] += 1
        else:
            eligible[winner.problem.key] = winner
    drawn = random.Random(0).sample(sorted(eligible.values(), key=lambda w: w.problem.key), min(count, len(eligible)))
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
    return rows, skipped


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
    few = Only(op, tuple(dict.fromkeys([winner.config, op.space(problem, place.device)[0], *rivals[:1]])))
    try:
        timings = serving.measure(cast(Op, few), problem)
    except DeviceLost as lost:
        timings = [each for each in lost.timings if isinstance(each, Timing)]
    # a file behind the user's may have brought an incumbent to the race: that is not asked here
    now = {t.config: t for t in timings if t.config in few.configs}
    if winner.config not in now:
        raise MoecacheError("the budget did not reach it")
    mine = now.pop(winner.config)
    return Retimed(winner, mine, tuple(sorted((t for t in now.values() if t.median_us), key=lambda t: t.entry)))
