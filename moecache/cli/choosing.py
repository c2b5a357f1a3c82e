"""Which stored problems a person means: filters in the words of a warm-up too, ids, keys, and some fields of a key."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moecache.cli import show
from moecache.schemas.errors import InvalidInput, MoecacheError
from moecache.schemas.problem import Problem, problem_from_key, token_bucket
from moecache.store import Store
from moecache.text import changed

if TYPE_CHECKING:
    from moecache.dispatch import Dispatcher
    from moecache.dispatch.explain import Explanation

Wanted = dict[str, Any]  # a field of a problem, or `environment` -> values of which it has one
GENERATOR = re.compile(r"uniform|zipf|hot1|dir\d+(\.\d+)?")  # of routing, as `warm` takes them
LISTED = 12  # values in a message
MOST = 1 << 18  # tokens · experts that are drawn to see where a generator falls


def as_stored(stores: Sequence[Store], wanted: Mapping[str, Sequence[Any]]) -> Wanted:
    """The same filters in stored values: token counts as their buckets, generators of routing as the buckets that they
    fall in; notes say so."""
    found = {name: list(values) for name, values in wanted.items()}
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
    """The stored problem that `text` means, by the beginning of its id or key, or all that have some fields. Those that
    are only predicted count where no measured one is meant.

    Raises:
        InvalidInput: it points at none, or is the beginning of several, which the message lists.
    """
    fields = _fields(stores, text)
    stored = {timing.problem.key: timing.problem for store in stores for timing in store.timings()}
    if not (found := _found(stored, text, fields)):
        stored = {row.problem.key: row.problem for store in stores for row in store.predictions()}
        found = _found(stored, text, fields)
    if not found and fields:
        plain = {name: values for name, values in fields.items() if "." not in name and name in Problem.model_fields}
        raise nothing(stores, plain)
    if not found:
        raise InvalidInput(f"{text!r} is neither id nor key of a stored problem; `moecache ls` lists them")
    if len(found) == 1 or (fields and _has(found[0], fields)):
        return found
    listed = "; ".join(f"{problem.id} ({_telling(problem, found)})" for problem in found[:4])
    more = "; …" if len(found) > 4 else ""
    raise InvalidInput(f"{text!r} stands for {len(found)} problems, write more of it: {listed}{more}")


def _found(stored: Mapping[str, Problem], text: str, fields: Wanted) -> list[Problem]:
    if text in stored:
        return [stored[text]]
    if having := [problem for problem in stored.values() if fields and _has(problem, fields)]:
        return having
    return [each for each in stored.values() if text and (each.id.startswith(text) or each.key.startswith(text))]


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
    return as_stored(stores, {n: [int(v) if n in numbers and v.isdecimal() else v] for n, v in pairs})


def _has(problem: Problem, fields: Wanted) -> bool:
    have = dict(part.split("=", 1) for part in problem.key.split())
    return all(have.get(name, "") in map(str, values) for name, values in fields.items())


def explained(serving: "Dispatcher", problem: Problem) -> "Explanation":
    """What a problem is answered.

    Raises:
        InvalidInput: a key that somebody wrote lacks what its op asks of it, or says what the op never does.
    """
    try:
        return serving.explain(problem)
    except MoecacheError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        told = f"op {problem.op} knows no problem {problem.key}: {error!r}"
        raise InvalidInput(f"{told}; keys with all that it asks stand in `moecache show`") from None


def _telling(problem: Problem, others: Iterable[Problem]) -> str:
    """The fields of a key in which the problems differ."""
    shared = set.intersection(*(set(other.key.split()) for other in others))
    return " ".join(field for field in problem.key.split() if field not in shared)
