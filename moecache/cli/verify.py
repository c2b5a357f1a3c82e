"""Whether a cache file is sound, and whether this moecache could still use what is in it."""

from dataclasses import dataclass

from moecache.dispatch.policy import Ask, refused
from moecache.kernels import registry as ops
from moecache.kernels.code import present
from moecache.place import Place, Places
from moecache.schemas.device import by_arch
from moecache.schemas.prediction import Prediction
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Timing
from moecache.store import Store


@dataclass(frozen=True)
class Verdict:
    """What is wrong, and what could not be judged here, in words."""

    findings: list[str]
    notes: list[str]


def verify(store: Store) -> Verdict:
    """Integrity first; then every config that could win must be known, and fit its problem and device."""
    findings, unjudged = list(store.check()), dict[tuple[str, str], int]()
    findings += [
        f"{w.problem.id} {w.config.name}: it wins and gains {100 * w.margin:.1f} % over the default"
        for w in store.winners() if w.margin is not None and w.margin < 0
    ]  # fmt: skip
    places = Places()
    seen: dict[tuple[str, str, int], Place] = {}  # an absent driver is asked once, not once a timing
    rows: list[Timing | Prediction] = [*store.timings(status="ok"), *store.predictions()]
    for stored in rows:
        problem = stored.problem
        kind = (problem.vendor, problem.arch, problem.units)
        if kind not in seen:
            seen[kind] = places.of_problem(problem)
        wrong, why = _judged(stored, seen[kind])
        if wrong:
            findings.append(f"{problem.id} {stored.config.name}: {wrong}")
        elif why:
            what = "timings" if isinstance(stored, Timing) else "predictions"
            unjudged[why, what] = unjudged.get((why, what), 0) + 1
    notes = [f"{why}: {count} {what} not judged" for (why, what), count in unjudged.items()]
    if undated := store.stats()["undated"]:
        notes.append(f"{undated} timings have no date, or one that lies ahead: they count as the oldest")
    return Verdict(findings, notes)


def _judged(stored: Timing | Prediction, place: Place) -> tuple[str, str]:
    """(why the config may not serve, why that cannot be said); both '' when it may."""
    problem = stored.problem
    if problem.op not in ops.names():
        return "", f"{problem.op} is not built in, so only the program that wraps it knows its configs"
    if why := ops.unaskable(problem):
        return "", why
    op = ops.get(problem.op)
    if problem.source != op.source or (isinstance(stored, Timing) and stored.code not in present()):
        return "", f"{problem.op} was measured with code that has changed since"
    if place.backend is None and not _limits_known(problem):
        return "", f"nothing is known of the limits of {problem.arch}"
    return refused(Ask(op, problem, place), stored.config), ""


def _limits_known(problem: Problem) -> bool:
    return problem.vendor == "cpu" or by_arch(problem.arch) is not None
