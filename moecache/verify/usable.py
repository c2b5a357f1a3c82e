"""Whether a cache file is sound, and whether this moecache could still use what is in it."""

from collections import Counter
from dataclasses import dataclass

from moecache.devices import Places
from moecache.dispatch.policy import Ask, refused
from moecache.kernels import registry as ops
from moecache.kernels.code import present
from moecache.schemas.device import by_arch
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Prediction, Timing
from moecache.store import Store


@dataclass(frozen=True)
class Findings:
    """What is wrong, and what could not be judged here, in words."""

    wrong: list[str]
    notes: list[str]


def verify(store: Store) -> Findings:
    """Integrity first; then every config that could win must be known, and fit its problem and device."""
    findings, skipped = list(store.check()), Counter[tuple[str, str]]()
    for w in store.winners():
        if w.margin is not None and w.margin < 0:
            gain = f"it wins and gains {100 * w.margin:.1f} % over the default"
            findings.append(f"{w.problem.id} {w.config.name}: {gain}")
    places = Places()
    rows: list[Timing | Prediction] = [*store.timings(status="ok"), *store.predictions()]
    for stored in rows:
        problem, place = stored.problem, places.of_problem(stored.problem)
        why = unjudged(problem, stored.code if isinstance(stored, Timing) else None)
        if not why and place.backend is None and problem.vendor != "cpu" and by_arch(problem.arch) is None:
            why = f"nothing is known of the limits of {problem.arch}"
        if why:
            skipped[why, "timings" if isinstance(stored, Timing) else "predictions"] += 1
        elif wrong := refused(Ask(ops.get(problem.op), problem, place), stored.config):
            findings.append(f"{problem.id} {stored.config.name}: {wrong}")
    notes = [f"{why}: {count} {what} not judged" for (why, what), count in skipped.items()]
    return Findings(findings, notes)


def unjudged(problem: Problem, code: str | None = None) -> str:
    """Why nobody here can say whether a config still serves a problem; '' when that can be said.

    Args:
        code: that a timing of it ran.
    """
    if not ops.known(problem.op):
        return f"{problem.op} is not built in, so only the program that wraps it knows its configs"
    if why := ops.unaskable(problem):
        return why
    told = code is None or code in present(problem.op, problem.source)
    changed = problem.source != ops.get(problem.op).source or not told
    return f"{problem.op} was measured with code that has changed since" if changed else ""
