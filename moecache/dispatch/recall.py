"""What is stored of each problem: one bulk load for each (op, place), plain dicts from there on."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from moecache.place import Place
from moecache.schemas.errors import StoreError
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Timing
from moecache.settings import MEMORY, Settings
from moecache.store import Answer, Answers, Store, Tiers, default_path


class Recall:
    """The tiers of one process behind dicts. Callers hold the dispatcher's lock."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pid = os.getpid()
        self._tiers: Tiers | None = None
        self._inherited: list[Tiers] = []
        self._known: dict[tuple[str, str, str, str], Answers] = {}

    @property
    def tiers(self) -> Tiers:
        """The files, opened at first use, and again in a forked child: SQLite forbids the parent's there."""
        if self._tiers is not None and self._pid != os.getpid():
            self._inherited.append(self._tiers)  # kept, never closed: closing would drop the parent's locks
            self._tiers = None
        if self._tiers is None:
            self._pid = os.getpid()
            user = self._settings.db or default_path()
            self._tiers = Tiers.open(None if user == MEMORY else user, self._settings.shipped())
        return self._tiers

    def known(self, op: str, place: Place) -> Answers:
        """The winners of an op on a kind of device, from all files; read once."""
        slot = (op, place.device.vendor, place.device.arch, place.environment.id)
        if slot not in self._known:
            self._known[slot] = self._load(op, place)
        return self._known[slot]

    def _load(self, op: str, place: Place, **filters: Any) -> Answers:
        device = place.device
        return self.tiers.winners(place.environment, op=op, vendor=device.vendor, arch=device.arch, **filters)

    def near(self, problem: Problem, place: Place) -> list[Answer]:
        """The winners of the same experts, top-k and source. Chosen by the text of the key, as validating a
        row takes 30 µs and a file may hold thousands."""
        known = self.known(problem.op, place)
        shared = f" experts={problem.experts} topk={problem.topk} "
        source = f" source={problem.source} " if problem.source else " "
        keys = [key for key in known.keys_as_stored() if shared in f"{key} " and source in f"{key} "]
        return [known[key] for key in keys if key != problem.key and key in known]

    def timings(self, problem: Problem) -> list[tuple[Timing, str]]:
        """Every stored timing of a problem with its file, the user's file first."""
        stores = [self.tiers.user, *self.tiers.shipped]
        return [(row, str(store.path or "memory")) for store in stores for row in _read(store, problem)]

    def problems(self, op: str, place: Place) -> list[Problem]:
        """Every stored problem of an op that has a winner, whatever its device."""
        return [winner.problem for winner, _, _ in self.tiers.winners(place.environment, op=op).values()]

    def put(self, timings: Sequence[Timing], place: Place) -> None:
        """Write timings of one problem, which is no longer wanted, and read its winner back."""
        self.tiers.put(timings)
        for problem in {t.problem for t in timings}:
            self.tiers.unwant([problem])
            fresh, known = self._load(problem.op, place, key=problem.key), self.known(problem.op, place)
            known.pop(problem.key, None)
            if problem.key in fresh:
                known[problem.key] = fresh[problem.key]

    def want(self, problems: Iterable[Problem]) -> None:
        """Note problems for the next warm-up."""
        for problem in problems:
            self.tiers.want(problem)

    def digest(self, names: Iterable[str], place: Place) -> str:
        """sha256 over problem, config and tier of every winner that could be served here."""
        digest = hashlib.sha256()
        for name in sorted(names):
            for key, (winner, tier, _) in sorted(self.known(name, place).items()):
                digest.update(f"{key}\t{winner.config.name}\t{tier}\n".encode())
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files; the next use opens and reads them again."""
        self._known.clear()
        if self._tiers is not None and self._pid == os.getpid():
            self._tiers.close()
        self._tiers = None


def _read(store: Store, problem: Problem) -> list[Timing]:
    """Its timings; a file that can no longer be read has none."""
    try:
        return store.timings(problem)
    except StoreError as error:
        warnings.warn(f"{error}; it is left out", RuntimeWarning, stacklevel=2)
        return []
