"""Whether a cache file is sound, and whether this moecache could still use what is in it."""

from collections.abc import Callable
from dataclasses import dataclass

from moecache.devices import Place, Places
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
    findings, unjudged = list(store.check()), dict[tuple[str, str], int]()
    for w in store.winners():
        if w.margin is not None and w.margin < 0:
            gain = f"it wins and gains {100 * w.margin:.1f} % over the default"
            findings.append(f"{w.problem.id} {w.config.name}: {gain}")
    place = place_of(Places())
    rows: list[Timing | Prediction] = [*store.timings(status="ok"), *store.predictions()]
    for stored in rows:
        problem = stored.problem
        wrong, why = _judged(stored, place(problem))
        if wrong:
            findings.append(f"{problem.id} {stored.config.name}: {wrong}")
        elif why:
            what = "timings" if isinstance(stored, Timing) else "predictions"
            unjudged[why, what] = unjudged.get((why, what), 0) + 1
    notes = [f"{why}: {count} {what} not judged" for (why, what), count in unjudged.items()]
    return Findings(findings, notes)


def place_of(places: Places) -> Callable[[Problem], Place]:
    """Where problems run; an absent driver is asked once, not once a problem."""
    known: dict[tuple[str, str, int], Place] = {}

    def of(problem: Problem) -> Place:
        kind = (problem.vendor, problem.arch, problem.units)
        if kind not in known:
            known[kind] = places.of_problem(problem)
        return known[kind]

    return of


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


def _judged(stored: Timing | Prediction, place: Place) -> tuple[str, str]:
    """(why the config may not serve, why that cannot be said); both '' when it may."""
    problem = stored.problem
    if why := unjudged(problem, stored.code if isinstance(stored, Timing) else None):
        return "", why
    if place.backend is None and problem.vendor != "cpu" and by_arch(problem.arch) is None:
        return "", f"nothing is known of the limits of {problem.arch}"
    return refused(Ask(ops.get(problem.op), problem, place), stored.config), ""
