"""The store as other rooms see it: the user's file, the read-only files behind it, and which of them answers."""

import warnings
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

from moecache.forks import Lock
from moecache.schemas.device import Device, same_product
from moecache.schemas.errors import StoreError
from moecache.schemas.problem import Problem
from moecache.schemas.timing import PASSING, Environment, Tier, Timing, Winner
from moecache.store.cachefile import Store
from moecache.store.rows import Rows
from moecache.store.schema import age

__all__ = ["Answer", "Answers", "Store", "Tiers"]

Answer = tuple[Winner, Tier, str]  # the text names the file that the winner came from
Rank = tuple[bool, bool, int, bool]  # another environment, product, number of the file, other name: lowest first


class _Stored(NamedTuple):
    """A winner as it is stored."""

    rank: Rank
    source: str
    rows: Rows
    row: tuple[Any, ...]


class Answers(MutableMapping[str, Answer]):
    """Maps the key of a problem to its best stored answer.

    A row is validated when its key is first asked for. If it is not valid, the next best row answers. After the last
    row the key is missing. To walk over all answers, or to count them, validates all.
    """

    def __init__(self, stored: Iterable[tuple[str, _Stored]]) -> None:
        self._stored: dict[str, list[_Stored]] = {}
        for key, each in stored:
            self._stored.setdefault(key, []).append(each)
        self._known: dict[str, Answer | None] = {}  # no more keys than are stored or were set
        self._alike: dict[frozenset[str], dict[str, dict[str, None]]] = {}

    def __getitem__(self, key: str) -> Answer:
        if key not in self._known:
            if key not in self._stored:
                raise KeyError(key)
            self._known[key] = self._best(key)
        answer = self._known[key]
        if answer is None:
            raise KeyError(key)
        return answer

    def __setitem__(self, key: str, answer: Answer) -> None:
        self._known[key] = answer
        for free, groups in self._alike.items():
            groups.setdefault(_rest(key, free), {})[key] = None

    def alike(self, key: str, free: frozenset[str]) -> list[str]:
        """Keys, as stored, that differ from this one only in `free` fields. The first question sorts all keys, so that
        later ones take the same time however much is stored."""
        if free not in self._alike:
            groups: dict[str, dict[str, None]] = {}
            for each in self.keys_as_stored():
                groups.setdefault(_rest(each, free), {})[each] = None
            self._alike[free] = groups
        return list(self._alike[free].get(_rest(key, free), ()))

    def __delitem__(self, key: str) -> None:
        self[key]
        self._known[key] = None

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.keys_as_stored() if key in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keys_as_stored(self) -> list[str]:
        """Every key, also of rows that were not validated and may be invalid."""
        return list(dict.fromkeys(chain(self._stored, self._known)))

    def _best(self, key: str) -> Answer | None:
        found = self._stored.get(key, [])
        if len(found) > 1:
            found = sorted(found, key=lambda each: (each.rank, -age(each.row[each.rows.names.index("measured_at")])))
        for rank, source, rows, row in found:
            winner = rows.value(Winner, row)
            if winner is not None:
                return winner, "unverified" if rank[0] else "measured", source
        return None


def _rest(key: str, free: frozenset[str]) -> str:
    """A key without these fields."""
    # a file may hold a key that is no text
    return " ".join(part for part in str(key).split(" ") if part.partition("=")[0] not in free)


def _rank(number: int, there: Environment, here: Environment) -> Rank:
    one = same_product(there.device_name, here.device_name)
    return there != here, not one, number, there.device_name != here.device_name


def _stored(number: int, source: str, rows: Rows, here: Environment) -> Iterator[tuple[str, _Stored]]:
    """The winners of a file by the key of their problem; `number` is the file's place among the files."""
    if not rows.rows:
        return
    key, place = rows.names.index("key"), rows.names.index("environment")
    # where flags differ, other code ran, for example in an interpreter: no such row answers
    there = {id: each for id, each in rows.environments.items() if each.flags == here.flags}
    ranks = {id: _rank(number, each, here) for id, each in there.items()}
    for row in rows.rows:
        if row[place] in ranks:
            yield row[key], _Stored(ranks[row[place]], source, rows, row)


class Tiers:
    """The user's file, and the files behind it in the order in which they are asked. Only the user's file is written.

    A file that cannot be used never stops the process. It is left out, with one warning. If it is the user's, what is
    measured from then on lives in memory.
    """

    def __init__(self, user: Store, shipped: Sequence[Store]) -> None:
        self.user, self.shipped = user, list(shipped)
        self._lock = Lock()

    @classmethod
    def open(cls, user: Path | None, shipped: Sequence[Path] = ()) -> Self:
        """The files at these paths. `user=None` keeps in memory what is measured."""
        behind = [store for path in shipped if (store := _opened(path, "is left out", shipped=True))]
        if user is None:
            return cls(Store.memory(), behind)
        front = _opened(user, "is not written; what is measured now is lost at exit")
        if front is not None and not front.readonly:
            return cls(front, behind)
        if front is not None:
            _warn(f"cache file {user} has additions by a later moecache, so it is only read: upgrade moecache")
        else:
            with suppress(StoreError):
                front = Store.open(user, readonly=True)
        return cls(Store.memory(), [front, *behind] if front else behind)

    def winners(self, environment: Environment, **filters: Any) -> Answers:
        """The best answer to each problem. Filters are those of `Store.winners`.

        An answer that was measured in this environment goes before one of another. Then the order is: the same
        product, the first file, the same device name, the latest.
        """
        found: list[tuple[str, _Stored]] = []
        for number, store in enumerate([self.user, *self.shipped]):
            try:
                rows = store.winner_rows(**filters)
            except StoreError as error:
                _warn(f"{error}; it is left out")
            else:
                found += _stored(number, str(store.path or "memory"), rows, environment)
        return Answers(found)

    def put(self, timings: Sequence[Timing]) -> None:
        """Write timings to the user's file, or to memory once that file can no longer be written."""
        self._write(lambda store: store.put(timings))

    def want(self, problem: Problem) -> None:
        self._write(lambda store: store.want(problem))

    def unwant(self, problems: Iterable[Problem]) -> None:
        forgotten = list(problems)
        self._write(lambda store: store.unwant(forgotten))

    def wanted(self) -> list[tuple[Problem, int]]:
        """The wanted problems in the user's file with how often calls met them, the most frequent first."""
        return self.user.wanted()

    def unfinished(self, environment: Environment) -> dict[str, set[str]]:
        """Problems that a warm-up measures although they may have a winner, by key, each with names of configs.

        These are the wanted problems, without names, and problems with configs that failed in this environment for a
        reason that may be gone, or whose code has changed.
        """
        found: dict[str, set[str]] = {problem.key: set() for problem, _ in self.wanted()}
        for row in self.user.timings(status=PASSING, environment=environment.id):
            if row.passing:
                found.setdefault(row.problem.key, set()).add(row.config.name)
        for key, name in self.user.stale(environment):
            found.setdefault(key, set()).add(name)
        return found

    def learn(self, op: str, device: Device, layer: str, version: int, model: str) -> None:
        """Keep in the user's file what the cost model learnt of a layer of an op on a kind of device."""
        self._write(lambda store: store.learn(op, device, layer, version, model))

    def learned(self, op: str, device: Device) -> list[tuple[str, str]]:
        """(layer, what was learnt) of an op on such a device; rows of the first file come first."""
        found = []
        for store in (self.user, *self.shipped):
            try:
                found += store.learned(op, device)
            except StoreError as error:
                _warn(f"{error}; it is left out")
        return found

    def close(self) -> None:
        for store in (self.user, *self.shipped):
            store.close()

    def _write(self, action: Callable[[Store], None]) -> None:
        store = self.user
        try:
            action(store)
        except StoreError as error:
            with self._lock:
                if self.user is store:
                    _warn(f"{error}; from here on what is measured is lost at exit")
                    self.shipped.insert(0, store)
                    self.user = Store.memory()
            action(self.user)


def _opened(path: Path, otherwise: str, **how: bool) -> Store | None:
    try:
        return Store.open(path, **how)
    except StoreError as error:
        _warn(f"{error}; it {otherwise}")
        return None


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)
