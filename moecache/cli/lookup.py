"""Which cache files a command reads, what wins in them, and which stored problem a person means."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moecache.schemas.config import Config
from moecache.schemas.errors import InvalidInput, StoreError
from moecache.schemas.prediction import Prediction
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Tier, Winner
from moecache.settings import MEMORY, PREBUILT, Settings
from moecache.store import Store


def user(settings: Settings) -> Path:
    """The user's file, for commands that cannot do without.

    Raises:
        InvalidInput: the settings keep everything in memory.
    """
    if (path := settings.user_file()) is None:
        raise InvalidInput(f"MOECACHE_DB={MEMORY} names no file; give one with --db")
    return path


def writable(settings: Settings) -> Store:
    """The user's file, made where it is not there and proved to be writable, for commands that keep something in it; in
    memory where the settings say so.

    Raises:
        StoreError: nothing can be kept there.
    """
    path = settings.user_file()
    store = Store.memory() if path is None else Store.open(path)
    if store.readonly:
        store.close()
        raise StoreError(f"cache file {path} has additions by a later moecache, so it is only read: upgrade moecache")
    store.unwant([])  # an empty write, which a file that is open for reading alone refuses
    return store


def stores(settings: Settings, only: Path | None = None) -> list[Store]:
    """The files open for reading, those that do not exist yet left out; of a given file, that file alone.

    Raises:
        StoreError: the given or the user's file cannot be read. One behind them is left out with a warning.
    """
    if only is not None:
        return [Store.open(only, readonly=True)]
    found = []
    for file in settings.files():
        try:
            if file.role != "user" or file.path.exists():
                found.append(Store.open(file.path, readonly=True, shipped=file.role != "user"))
        except StoreError as error:
            if file.role == "user":
                raise
            warnings.warn(f"{error}; it is left out", RuntimeWarning, stacklevel=2)
    return found


def own(stores: Sequence[Store]) -> list[Store]:
    """Those that do not ship inside the package."""
    return [store for store in stores if store.path is None or store.path.parent != PREBUILT]


def winners(stores: Sequence[Store], tier: Tier | None = None, **filters: Any) -> list[tuple[Winner, str, Tier | None]]:
    """Winners with the name of their file and their tier, which is None unless one is asked for: to name this
    environment takes torch and a driver."""
    found = [(winner, str(store.path)) for store in stores for winner in store.winners(**filters)]
    found.sort(key=lambda pair: _order(pair[0].problem))
    if tier is None:
        return [(winner, file, None) for winner, file in found]
    present = here()
    return [(winner, file, tier) for winner, file in found if (winner.environment == present) == (tier == "measured")]


def here() -> Environment:
    """This machine's environment, of the device that a warm-up takes; imports torch."""
    from moecache.place import Places

    return Places().first().environment


def predictions(stores: Sequence[Store], **filters: Any) -> list[tuple[Prediction, str]]:
    """Stored predictions with the name of their file; none for an environment, as they have none."""
    if filters.pop("environment", None):
        return []
    found = [(row, str(store.path)) for store in stores for row in store.predictions(**filters)]
    return sorted(found, key=lambda pair: _order(pair[0].problem))


def _order(problem: Problem) -> tuple[object, ...]:
    """Layer by layer, then from few tokens to many."""
    p = problem
    layer = (p.op, p.vendor, p.arch, p.units, p.experts, p.topk, p.dtype)
    return (*layer, p.source, p.tokens, p.routing, p.dims)


def winning(stores: Sequence[Store], problem: Problem) -> set[tuple[Config, Environment, str]]:
    """The winners of one problem, each with its environment and file."""
    found = winners(stores, op=problem.op, tokens=problem.tokens, experts=problem.experts, topk=problem.topk)
    return {(each.config, each.environment, file) for each, file, _ in found if each.problem == problem}
