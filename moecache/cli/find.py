"""Which cache files a command reads, what wins in them, and which stored problems a person means: by filters in the
words of a warm-up too, by ids, by keys, and by some fields of a key."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moecache.cli import show
from moecache.schemas.config import Config
from moecache.schemas.errors import InvalidInput, StoreError
from moecache.schemas.prediction import Prediction
from moecache.schemas.problem import Problem, problem_from_key, token_bucket
from moecache.schemas.timing import Environment, Tier, Winner
from moecache.settings import MEMORY, PREBUILT, Settings
from moecache.store import Store
from moecache.text import changed

Wanted = dict[str, Any]  # a field of a problem, or `environment` -> values of which it has one
GENERATOR = re.compile(r"uniform|zipf|hot1|dir\d+(\.\d+)?")  # of routing, as `warm` takes them
LISTED = 12  # values in a message
MOST = 1 << 18  # tokens · experts that are drawn to see where a generator falls


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
    from moecache.devices import Places

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
    return {(each.config, each.environment, file) for each, file, _ in winners(stores, key=problem.key)}


def as_stored(stores: Sequence[Store], **wanted: Sequence[Any] | None) -> Wanted:
    """Filters in stored values, without those that are not given: token counts as their buckets, generators of routing
    as the buckets that they fall in; notes say so."""
    found = {name: list(values) for name, values in wanted.items() if values}
    if "tokens" in found:
        found["tokens"] = list(dict.fromkeys(map(_bucket, found["tokens"])))
    if "routing" in found:
        found["routing"] = [bucket for word in found["routing"] for bucket in _buckets(stores, str(word))]
    for name, values in found.items():
        if name not in Problem.model_fields:
            continue
        held = {each for store in stores for (each,) in store.held(name)}
        lacking = [value for value in values if value not in held]
        if lacking and len(lacking) < len(values):  # where all lack, nothing matches, which is an error
            show.note(f"no {name} {', '.join(map(str, lacking))} is stored")
    return found


def _bucket(tokens: Any) -> Any:
    bucket = token_bucket(tokens) if isinstance(tokens, int) else tokens
    if bucket != tokens:
        show.note(f"tokens {tokens} belong to the bucket of {bucket}")
    return bucket


def _buckets(stores: Sequence[Store], word: str) -> list[str]:
    if not GENERATOR.fullmatch(word):
        return [word]
    from moecache import routing

    shapes = set().union(*(store.held("tokens", "experts", "topk") for store in stores))
    found = set()
    for tokens, experts, topk in sorted(shapes):
        if topk <= experts <= MOST:
            drawn = routing.draw(word, max(1, min(tokens, MOST // experts)), experts, topk)
            found.add(routing.bucket(routing.histogram(drawn, experts)))
    show.note(f"routing {word} falls in {', '.join(sorted(found)) or 'no bucket'} at the stored sizes")
    return sorted(found)


def nothing(stores: Sequence[Store], wanted: Wanted) -> InvalidInput:
    """The error for filters that match nothing: which value is not stored, and which are."""
    told = []
    for name, values in wanted.items():
        held = set().union(*(store.held(name) for store in stores))
        there = [each for (each,) in sorted(held)]
        if not set(values) & set(there):
            told.append(f"no {name} {', '.join(map(str, values))}, stored are {_list(there)}")
    files = ", ".join(str(store.path) for store in stores) or "no cache file"
    gone = sum(store.stats()["other_code"] for store in stores)
    told += [changed(gone)] if gone else []
    return InvalidInput(f"nothing matches in {files}: {'; '.join(told) or 'nothing has all of these at once'}")


def _list(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) or "-" for value in values[:LISTED])
    return (shown or "none") + (f" and {len(values) - LISTED} more" if len(values) > LISTED else "")


def asked(stores: Sequence[Store], text: str) -> list[Problem]:
    """The problem of a whole key, stored or not; for anything shorter the stored ones that it points at.

    Raises:
        InvalidInput: see `meant`; of what looks like a whole key it names what is missing.
    """
    given = {part.partition("=")[0] for part in text.split()}
    if not given >= {name for name, field in Problem.model_fields.items() if field.is_required()}:
        try:
            return meant(stores, text)
        except InvalidInput:
            if not (text.startswith("op=") and "experts=" in text):
                raise
    return [problem_from_key(text)]


def meant(stores: Sequence[Store], text: str) -> list[Problem]:
    """The stored problems that `text` means: by the beginning of an id or key, or by some fields. Those that are only
    predicted count where no measured one is meant.

    Raises:
        InvalidInput: there is none.
    """
    fields = _fields(stores, text)
    for stored in (store.timings for store in stores), (store.predictions for store in stores):
        there = {row.problem.key: row.problem for rows in stored for row in rows()}
        if text in there:
            return [there[text]]
        if found := [each for each in there.values() if (_has(each, fields) if fields else _begins(each, text))]:
            return found
    if fields:
        raise nothing(stores, {name: values for name, values in fields.items() if name in Problem.model_fields})
    raise InvalidInput(f"{text!r} is neither id nor key of a stored problem; `moecache ls` lists them")


def _fields(stores: Sequence[Store], text: str) -> Wanted:
    """`tokens=256 block_m=16` as filters, dims with or without their prefix; nothing where it is not all fields of a
    key."""
    pairs = [part.partition("=")[::2] for part in text.split()]
    if any(name not in Problem.model_fields for name, _ in pairs):
        dims = {name for store in stores for timing in store.timings() for name, _ in timing.problem.dims}
        pairs = [(f"dims.{name}" if name in dims else name, value) for name, value in pairs]
    names = {*Problem.model_fields, *(name for name, _ in pairs if name.startswith("dims."))} - {"dims"}
    if not pairs or any(name not in names or not value for name, value in pairs):
        return {}
    numbers = {name for name, field in Problem.model_fields.items() if field.annotation is int}
    return as_stored(stores, **{n: [int(v) if n in numbers and v.isdecimal() else v] for n, v in pairs})


def _begins(problem: Problem, text: str) -> bool:
    return bool(text) and (problem.id.startswith(text) or problem.key.startswith(text))


def _has(problem: Problem, fields: Wanted) -> bool:
    have = dict(part.split("=", 1) for part in problem.key.split())
    return all(have.get(name, "") in map(str, values) for name, values in fields.items())
