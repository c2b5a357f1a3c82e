"""Why a problem is answered as it is: the tier, what else was timed, and which fields make it a miss."""

from dataclasses import dataclass

from moecache import text
from moecache.devices import Place
from moecache.dispatch import nearest
from moecache.dispatch.lookup import Lookup
from moecache.dispatch.nearest import Difference
from moecache.kernels.contract import Op
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Choice, Timing

WHO = "captured graphs, and calls whose routing nobody knows,"


@dataclass(frozen=True)
class Explanation:
    """Everything that a person needs to understand one answer, or to doubt it.

    Attributes:
        problem: what was asked.
        choice: the answer; None if this process does not know the op and nothing is stored.
        timings: every stored timing of the problem with its file: usable ones by time, then the unusable.
        nearest: for a miss, the stored problem that differs in the fewest fields; None on a hit or an empty cache.
        differs: the fields in which `nearest` differs, in the order of the key.
        notes: what else a reader should know.
    """

    problem: Problem
    choice: Choice | None
    timings: tuple[tuple[Timing, str], ...] = ()
    nearest: Problem | None = None
    differs: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What `moecache explain` prints."""
        chosen = None if self.choice is None else self.choice.config
        return "\n".join([*text.facts(self.facts()), *text.timings(self.timings, chosen)])

    def facts(self) -> list[tuple[str, str]]:
        """The answer and why; for a miss, how the nearest stored problem differs."""
        asked, choice = self.problem, self.choice
        facts = [
            ("problem", f"{asked.id}: {text.layer(asked)}"),
            ("", f"tokens={asked.tokens} routing={asked.routing or '-'} {text.dims(asked)}"),
            ("answer", choice.config.name if choice else "none: nobody can be asked here what fits it"),
        ]
        if choice:
            facts += [("tier", choice.tier), ("why", choice.reason)]
            facts += [("from", choice.source)] if choice.source else []
        return facts + self._near() + [("note", told) for told in self.notes]

    def _near(self) -> list[tuple[str, str]]:
        if self.nearest == self.problem:
            return [("stored", "timings of this very problem, none of which is served")]
        if self.nearest is not None:
            names = ["differs in", *[""] * len(self.differs)]
            told = [f"{each.field}: asked {each.asked or '-'}, stored {each.stored or '-'}" for each in self.differs]
            nearest = ("nearest", f"{self.nearest.id}: {text.layer(self.nearest)}")
            return [nearest, *zip(names, told, strict=False)]
        if self.choice and self.choice.tier not in ("measured", "unverified"):
            return [("nearest", "nothing is stored as measured of this op")]
        return []


def explain(
    problem: Problem, op: Op | str, choice: Choice | None, graphs: Choice | None, place: Place, lookup: Lookup
) -> Explanation:
    """Put together what is known.

    Args:
        op: its op, or why this process cannot ask it.
        choice: what answers; None for nothing.
        graphs: what a captured graph is served, as its replays may have any routing; None if nothing need be said.
    """
    every = lookup.timings(problem, today=False)
    timings = sorted(every, key=lambda pair: (pair[0].median_us is None, pair[0].median_us or 0.0))
    notes = []
    if isinstance(op, str):
        notes.append(f"{op}: nobody was asked whether a config still fits")
    elif problem.source != op.source:
        now = f", now {op.source}" if op.source else ""
        notes.append(f"it was asked of other code (source {problem.source or '?'}{now}): no call asks it any more")
    if gone := sum(not text.ran_today(row) for row, _ in timings):
        notes.append(f"{gone} of the timings ran code that has changed since: `moecache warm` measures anew")
    if place.backend is None:
        notes.append(f"this machine has no {problem.arch} with {problem.units} units")
    if graphs is not None and choice is not None:
        which = "the same config" if graphs.config == choice.config else graphs.config.name
        who = "calls whose routing nobody knows" if graphs.alternatives else WHO
        notes.append(f"{who} get {which}: {graphs.reason}")
    if choice is not None and choice.tier in ("measured", "unverified"):
        return Explanation(problem, choice, tuple(timings), notes=tuple(notes))
    won = lookup.tiers.winners(place.environment, op=problem.op).values()  # whatever their device
    closest = nearest.closest(problem, [winner.problem for winner, *_ in won])
    found, differs = closest or (None, [])
    return Explanation(problem, choice, tuple(timings), found, tuple(differs), tuple(notes))
