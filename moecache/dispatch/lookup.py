"""What is stored of each problem: one bulk load for each (op, place), plain dicts from there on."""

from collections.abc import Collection, Sequence
from typing import Any

from moecache import routing
from moecache.devices import Place
from moecache.dispatch import log
from moecache.dispatch.any_routing import ByRouting
from moecache.dispatch.bounded import Bounded
from moecache.dispatch.nearest import free_fields
from moecache.schemas.problem import Problem
from moecache.schemas.rule import Entry, believed
from moecache.schemas.timing import Prediction, Timing
from moecache.settings import Settings
from moecache.store import Answer, Answers, Tiers


class Lookup:
    """The tiers of one process behind dicts. Callers hold the dispatcher's lock."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tiers: Tiers | None = None
        self._known: dict[tuple[str, str, str, str], Answers] = {}
        self._failed: dict[str, set[str]] = Bounded()  # problem key -> configs that failed in this process
        self._groups: dict[tuple[str, str], ByRouting] = Bounded()  # by key with its routing left open, and environment

    @property
    def tiers(self) -> Tiers:
        """The files, opened at first use."""
        if self._tiers is None:
            user, writes = self._settings.user_file(), self._settings.mode == "tune"
            self._tiers = Tiers.open(user, self._settings.shipped(), writes=writes)
        return self._tiers

    @property
    def starts_empty(self) -> bool:
        """Whether the user's file is yet to be made, which takes half a second where sqlite-utils finds pandas."""
        try:
            user = self._settings.user_file()
            return self._tiers is None and (user is None or not user.exists())
        except OSError:  # its folder may not be searched
            return False

    def known(self, op: str, place: Place) -> Answers:
        """The winners of an op on a kind of device, from all files; read once."""
        slot = (op, place.device.vendor, place.device.arch, place.environment.id)
        if slot not in self._known:
            self._known[slot] = self._load(op, place)
        return self._known[slot]

    def _load(self, op: str, place: Place, **filters: Any) -> Answers:
        device = place.device
        return self.tiers.winners(place.environment, op=op, vendor=device.vendor, arch=device.arch, **filters)

    def near(self, problem: Problem, place: Place, soft_dims: Collection[str] = ()) -> list[Answer]:
        """The winners of problems that differ from this one in `nearest.free_fields` alone."""
        alike = self.known(problem.op, place).alike(problem.key, free_fields(soft_dims))
        return [near for near in alike if near[0].problem != problem]

    def timings(self, problem: Problem, today: bool = True) -> list[tuple[Timing, str]]:
        """Every stored timing of a problem with its file, the user's file first; not `today`: also those that ran other
        code than today's, which decide nothing."""
        every = self.tiers.each(lambda store: store.timings(problem, today=today))
        return [(row, file) for rows, file in every for row in rows]

    def predictions(self, problem: Problem | None, **filters: Any) -> list[tuple[Prediction, str]]:
        """Every stored prediction of a problem, or of all, with its file, the user's file first."""
        every = self.tiers.each(lambda store: store.predictions(problem, **filters))
        return [(row, file) for rows, file in every for row in rows]

    def by_routing(self, problem: Problem, place: Place) -> ByRouting:
        """What is known of the problems that differ from this one in their routing alone; read once."""
        slot = (problem.any_routing.key, place.environment.id)
        if slot not in self._groups:
            self._groups[slot] = self._by_routing(problem, place)
        return self._groups[slot]

    def _by_routing(self, problem: Problem, place: Place) -> ByRouting:
        stored = self.known(problem.op, place).alike(problem.key, frozenset({"routing"}))
        winners = {a[0].problem.routing: a for a in sorted(stored, key=lambda a: a[0].problem.routing)}
        found, bad = ByRouting(winners, {name: {} for name in winners}, {}, frozenset()), set()
        if not winners:
            return found
        keys = [problem.model_copy(update={"routing": name}).key for name in ("", *routing.NAMES)]
        timed: dict[str, list[Entry]] = {}
        for rows, file in self.tiers.each(lambda store: store.timings(key=keys, today=True)):
            for row in rows:
                bucket = row.problem.routing
                winner, _, source = winners.get(bucket, (None, "", ""))
                counts = winner is not None and (winner.environment, source) == (row.environment, file)
                if row.status != "ok":
                    if self.blamed(row) and (counts or row.environment == place.environment):
                        bad.add(row.config.name)
                elif counts and row.median_us is not None:
                    timed.setdefault(bucket, []).append(row.entry)
                    found.configs[row.config.name] = row.config
        found.times.update({bucket: believed(each) for bucket, each in timed.items()})
        return found._replace(bad=frozenset(bad))

    def put(self, timings: Sequence[Timing], place: Place, writes: bool = True) -> None:
        """Write timings of one problem, which is no longer wanted, and read its winner back. Of a failure that an
        earlier process met, too, it is counted. Another rank has written them unless this one `writes`."""
        log.timed(timings)
        rows = [row if row.status == "ok" else self._counted(row) for row in timings]
        if writes:
            self.tiers.put(rows)
        self._groups.clear()
        problems = {t.problem for t in timings}
        self.tiers.write(lambda store: store.unwant([*problems, *(each.any_routing for each in problems)]))
        for problem in problems:
            fresh = self._load(problem.op, place, key=problem.key).get(problem.key)
            self.known(problem.op, place).put(problem.key, fresh)

    def _counted(self, row: Timing) -> Timing:
        here = self._failed.setdefault(row.problem.key, set())
        same: dict[str, Any] = {"config": row.config.name, "environment": row.environment.id}
        rows = self.tiers.user.timings(row.problem, today=True, **same)
        before = [max(1, each.n) for each in rows if each.status != "ok"]
        again = row.config.name not in here
        here.add(row.config.name)
        return row.model_copy(update={"n": sum(before) + again})

    def failed(self, problem: Problem) -> set[str]:
        """Names of the configs that failed in this process."""
        return self._failed.get(problem.key, set())

    def blamed(self, row: Timing) -> bool:
        """Whether a failure stands against its config now: what an earlier process had no memory or device for may do,
        what hung or crashed is no risk to take in a call."""
        if row.config.name in self.failed(row.problem):
            return True
        return not row.passing or row.status in ("timeout", "crashed")

    def unfinished(self, place: Place) -> set[str]:
        """Keys of problems that a warm-up takes although they may have a winner; what failed in this process waits for
        the next."""
        found = self.tiers.unfinished(place.environment)
        return {key for key, names in found.items() if not names or names - self._failed.get(key, set())}

    def close(self) -> None:
        """Close the files; the next use opens and reads them again."""
        self._known.clear()
        self._groups.clear()
        if self._tiers is not None:
            self._tiers.close()
        self._tiers = None
