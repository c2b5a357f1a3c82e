"""The store as other rooms see it: the user's file, the read-only files behind it, and which of them answers."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from moecache.forks import Lock
from moecache.schemas.device import Device, same_product
from moecache.schemas.errors import StoreError
from moecache.schemas.timing import PASSING, Environment, Tier, Timing, Winner
from moecache.store.cachefile import Store
from moecache.store.database import NoFile
from moecache.store.rows import Rows
from moecache.store.schema import age

__all__ = ["Answer", "Answers", "Store", "Tiers"]

T = TypeVar("T")
Answer = tuple[Winner, Tier, str]  # the text names the file that the winner came from
Rank = tuple[bool, bool, int, bool]  # another environment, product, number of the file, other name: lowest first


class _Stored(NamedTuple):
    """A winner as it is stored."""

    rank: Rank
    source: str
    rows: Rows
    row: tuple[Any, ...]

    @property
    def order(self) -> tuple[Rank, float]:
        """The lowest answers; of equal ones the latest."""
        return self.rank, -age(self.row[self.rows.names.index("measured_at")])


class Answers:
    """The best stored answer to each problem, by its key.

    A row is validated when its key is first asked for. If it is not valid, the next best row answers. After the last
    row there is none.
    """

    def __init__(self, stored: dict[str, list[_Stored]]) -> None:
        self._stored = stored
        self._known: dict[str, Answer | None] = {}  # no more keys than are stored or were put
        self._alike: dict[frozenset[str], dict[str, dict[str, None]]] = {}

    def get(self, key: str) -> Answer | None:
        """The best answer to the problem of this key."""
        if key not in self._known and key in self._stored:
            self._known[key] = self._best(key)
        return self._known.get(key)

    def put(self, key: str, answer: Answer | None) -> None:
        """Have this answer, or none, in place of what is stored."""
        self._known[key] = answer
        for free, groups in self._alike.items():
            groups.setdefault(_rest(key, free), {})[key] = None

    def values(self) -> list[Answer]:
        """All answers, in the order of keys. Validates every row."""
        found = [answer for key in self.keys() if (answer := self.get(key))]
        return sorted(found, key=lambda answer: answer[0].problem.key)

    def keys(self) -> list[str]:
        """Every key, also of rows that were not validated and may be invalid."""
        return list({**self._stored, **self._known})

    def alike(self, key: str, free: frozenset[str]) -> list[Answer]:
        """Answers whose keys differ from this one only in `free` fields. The first question sorts all keys, so that
        later ones take the same time however much is stored."""
        if free not in self._alike:
            groups: dict[str, dict[str, None]] = {}
            for each in self.keys():
                groups.setdefault(_rest(each, free), {})[each] = None
            self._alike[free] = groups
        near = self._alike[free].get(_rest(key, free), ())
        return [answer for each in near if (answer := self.get(each))]

    def _best(self, key: str) -> Answer | None:
        for rank, source, rows, row in sorted(self._stored[key], key=attrgetter("order")):
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


class Tiers:
    """The user's file, and the files behind it in the order in which they are asked. Only the user's file is written.

    A file that cannot be used never stops the process. It is left out, with one warning. If it is the user's, what is
    measured from then on lives in memory.
    """

    def __init__(self, user: Store, shipped: Sequence[Store]) -> None:
        self.user, self.shipped = user, list(shipped)
        self._lock = Lock()

    @classmethod
    def open(cls, user: Path | None, shipped: Sequence[Path] = (), *, writes: bool = True) -> Self:
        """The files at these paths. `user=None` keeps in memory what is measured. Unless it `writes`, the user's file
        is neither made nor changed, and need not be there."""
        behind = [store for path in shipped if (store := _opened(path, "is left out", shipped=True))]
        if user is None or not writes:
            return cls((user and _opened(user, "is left out", readonly=True)) or Store.memory(), behind)
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
        stored: dict[str, list[_Stored]] = {}
        for number, (rows, source) in enumerate(self.each(lambda store: store.winner_rows(**filters))):
            key, place = rows.names.index("key"), rows.names.index("environment")
            # where flags differ, other code ran, for example in an interpreter: no such row answers
            there = {id: each for id, each in rows.environments.items() if each.flags == environment.flags}
            ranks = {id: _rank(number, each, environment) for id, each in there.items()}
            for row in rows.rows:
                if row[place] in ranks:
                    stored.setdefault(row[key], []).append(_Stored(ranks[row[place]], source, rows, row))
        return Answers(stored)

    def each(self, ask: Callable[[Store], T]) -> Iterator[tuple[T, str]]:
        """What every file answers, with its name, the user's file first. One that can no longer be read is left out."""
        for store in (self.user, *self.shipped):
            try:
                found = ask(store)
            except StoreError as error:
                _warn(f"{error}; it is left out")
            else:
                yield found, str(store.path or "memory")

    def put(self, timings: Sequence[Timing]) -> None:
        """Write timings."""
        self.write(lambda store: store.put(timings))

    def unfinished(self, environment: Environment) -> dict[str, set[str]]:
        """Problems that a warm-up measures although they may have a winner, by key, each with names of configs.

        These are the wanted problems, without names, and problems with configs that failed in this environment for a
        reason that may be gone, or whose code has changed.
        """
        found: dict[str, set[str]] = {problem.key: set() for problem, _ in self.user.wanted()}
        for row in self.user.timings(status=PASSING, environment=environment.id):
            if row.passing:
                found.setdefault(row.problem.key, set()).add(row.config.name)
        for key, name in self.user.stale(environment):
            found.setdefault(key, set()).add(name)
        return found

    def learned(self, op: str, device: Device) -> list[tuple[str, str]]:
        """(layer, what the cost model learnt) of an op on such a device; what the first file has comes first."""
        return [row for rows, _ in self.each(lambda store: store.learned(op, device)) for row in rows]

    def close(self) -> None:
        for store in (self.user, *self.shipped):
            store.close()

    def write(self, action: Callable[[Store], None]) -> None:
        """Do it with the user's file, or with memory once that file can no longer be written."""
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
        if not (isinstance(error, NoFile) and how.get("readonly")):
            _warn(f"{error}; it {otherwise}")
        return None


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)
