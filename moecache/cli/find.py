"""Which cache files a command reads, what wins in them, and which stored problems a person means."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from moecache.cli.options import whole
from moecache.schemas.errors import InvalidInput, StoreError
from moecache.schemas.problem import Problem, problem_from_key, token_bucket
from moecache.schemas.timing import Prediction, Winner
from moecache.settings import MEMORY, PREBUILT, Settings
from moecache.store import Store
from moecache.text import changed

Wanted = dict[str, Any]  # a field of a problem, or `environment` -> values of which it has one
NUMBERS = {name for name, field in Problem.model_fields.items() if field.annotation is int}
FIELDS = (*(name for name in Problem.model_fields if name != "dims"), "environment")
LISTED = 12  # values in a message


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


def winners(stores: Sequence[Store], **filters: Any) -> list[tuple[Winner, str]]:
    """Winners with the name of their file."""
    found = [(winner, str(store.path)) for store in stores for winner in store.winners(**filters)]
    return sorted(found, key=lambda pair: _order(pair[0].problem))


def predictions(stores: Sequence[Store], **filters: Any) -> list[tuple[Prediction, str]]:
    """Stored predictions with the name of their file; none for an environment, as they have none."""
    if filters.pop("environment", None):
        return []
    found = [(row, str(store.path)) for store in stores for row in store.predictions(**filters)]
    return sorted(found, key=lambda pair: _order(pair[0].problem))


def _order(p: Problem) -> tuple[object, ...]:
    """Layer by layer, then from few tokens to many."""
    layer = (p.op, p.vendor, p.arch, p.units, p.experts, p.topk, p.dtype)
    return (*layer, p.source, p.tokens, p.routing, p.dims)


def wanted(given: Sequence[str] | None) -> Wanted:
    """`tokens=16,256 arch=sm_90` as filters; a number of tokens stands for its bucket, `-` for nothing, as in a list.

    Raises:
        typer.BadParameter: a field that no problem has or that comes twice, no value, or no number where one belongs.
    """
    found: Wanted = {}
    try:
        for part in given or ():
            name, _, values = part.partition("=")
            each = [value.strip() for value in values.split(",")]
            if name not in FIELDS or not all(each):
                raise InvalidInput(f"{part!r} is no FIELD=VALUES, like tokens=16,256; fields are {', '.join(FIELDS)}")
            if name in found:
                raise InvalidInput(f"{name} comes twice; write {name}=A,B for several values")
            found[name] = [whole(v) if name in NUMBERS else "" if v == "-" else v for v in each]
        if "tokens" in found:
            found["tokens"] = [whole(token_bucket(v)) for v in found["tokens"]]
    except InvalidInput as error:
        raise typer.BadParameter(str(error), param_hint="FIELD=VALUES") from None
    return found


def nothing(stores: Sequence[Store], wanted: Wanted) -> InvalidInput:
    """The error for filters that match nothing: which value is not stored, and which are."""
    told = []
    for name, values in wanted.items():
        held = sorted(set().union(*(store.held(name) for store in stores)))
        if not set(values) & set(held):
            stored = ", ".join(str(value) or "-" for value in held[:LISTED]) or "none"
            stored += f" and {len(held) - LISTED} more" if len(held) > LISTED else ""
            told.append(f"no {name} {', '.join(str(value) or '-' for value in values)}, stored are {stored}")
    files = ", ".join(str(store.path) for store in stores) or "no cache file"
    gone = sum(store.stats()["other_code"] for store in stores)
    told += [changed(gone)] if gone else []
    otherwise = "nothing has all of these at once" if len(wanted) > 1 else "nothing stored of it is a winner"
    return InvalidInput(f"nothing matches in {files}: {'; '.join(told) or otherwise}")


def asked(stores: Sequence[Store], text: str) -> list[Problem]:
    """The problem of a whole key, stored or not; else those stored whose id begins so, or that have these fields.

    Raises:
        InvalidInput: there is none, or the key is none.
    """
    required = {name for name, field in Problem.model_fields.items() if field.is_required()}
    if required <= {part.partition("=")[0] for part in text.split()}:
        return [problem_from_key(text)]
    fields = wanted(text.split()) if "=" in text else {}
    for rows in [row for store in stores for row in store.timings(**fields)], predictions(stores, **fields):
        every = [row[0].problem if isinstance(row, tuple) else row.problem for row in rows]
        if found := [each for each in dict.fromkeys(every) if fields or (text and each.id.startswith(text))]:
            return found
    raise nothing(stores, fields) if fields else InvalidInput(f"no id begins with {text!r}; `moecache ls` lists them")
