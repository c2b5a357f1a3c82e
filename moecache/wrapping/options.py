"""What `wrap` is given, checked when it is called: a wrong name shows where it stands, not in the middle of a call."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Required, TypedDict

from pydantic import ValidationError

from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput, in_words
from moecache.schemas.problem import Problem
from moecache.wrapping.sources import plain
from moecache.wrapping.wrapped import Dims

Given = Mapping[str, Any] | Config


class Options(TypedDict, total=False):
    """The named arguments of `wrap`, which says what they mean."""

    op: Required[str]
    configs: Required[Sequence[Given]]
    key: Required[Callable[..., Dims]]
    apply: Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any] | None
    reference: Callable[..., Any] | None
    tolerance: float | None
    fits: Callable[[Problem, Config, Device], str | bool] | None
    cost: Callable[[Problem, Config, Device], float] | None
    mutates: Sequence[str]
    writes: Sequence[str]
    soft_dims: Sequence[str]
    version: str


def check(op: Any, functions: Mapping[str, Any], names: Mapping[str, Any], tolerance: Any, version: Any) -> None:
    """Everything but the configs.

    Args:
        functions: `fn`, `key` and those that may be None, by their names.
        names: `mutates`, `writes` and `soft_dims`.

    Raises:
        InvalidInput: what is wrong, with the argument's name and what is allowed.
    """
    if not isinstance(op, str) or not op or word(op) != op:
        raise InvalidInput(f"op={op!r} is no name; allowed are letters, digits and _ . : + -, as in 'my_gemm'")
    for name, function in functions.items():
        if not callable(function) and (function is not None or name in ("fn", "key")):
            raise InvalidInput(f"{name}={function!r} of op {op!r} cannot be called; give a function")
    fn = functions["fn"]
    if inspect.iscoroutinefunction(plain(fn)) or inspect.isgeneratorfunction(plain(fn)):
        raise InvalidInput(f"op {op!r}: a call of {_called(fn)} only promises to work; wrap what does the work")
    if not isinstance(version, str):
        raise InvalidInput(f"version={version!r} of op {op!r} is no text; write for example version='2'")
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and tolerance >= 0):
        raise InvalidInput(f"tolerance={tolerance!r} of op {op!r} must be a number, 0 or more")
    for name, given in names.items():
        if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(x, str) for x in given):
            raise InvalidInput(f"{name}={given!r} of op {op!r} is no list of names; write for example {name}=['out']")
        if len(set(given)) < len(given):
            raise InvalidInput(f"{name}={given!r} of op {op!r} names one thing twice")
    if both := set(names["mutates"]) & set(names["writes"]):
        raise InvalidInput(f"{sorted(both)} of op {op!r} stand in mutates and in writes; allowed is one of them")
    if functions["apply"] is None:  # else that function alone knows what a call has
        _fitting(op, functions["fn"], functions["key"], [*names["mutates"], *names["writes"]])


def _fitting(op: str, fn: Any, key: Any, written: Sequence[str]) -> None:
    """`fn` takes a config and has the arguments that are written; `key` can be called as `fn` is."""
    try:
        parameters = inspect.signature(plain(fn)).parameters
    except (ValueError, TypeError):  # C functions have no signature
        return
    kinds = {p.kind for p in parameters.values()}
    allowed = [name for name, p in parameters.items() if name != "config" and p.kind not in _ANY]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        if "config" not in parameters:
            told = f"op {op!r}: {_called(fn)} has no argument 'config'; add it, or give apply=…"
            raise InvalidInput(f"{told} (it has {', '.join(allowed) or 'none'})")
        if wrong := [name for name in written if name not in allowed]:
            raise InvalidInput(
                f"op {op!r} writes {wrong}; arguments of {_called(fn)} are {', '.join(allowed) or 'none'}"
            )
    _same_call(op, fn, key, [parameters[name] for name in allowed])


_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _same_call(op: str, fn: Any, key: Any, parameters: Sequence[inspect.Parameter]) -> None:
    """Whether some call of `fn` is one of `key`: with all arguments or those without a default, by place or by name."""
    try:
        takes = inspect.signature(key)
    except (ValueError, TypeError):
        return
    needed = [p for p in parameters if p.default is p.empty]
    for given in (needed, parameters):
        placed = [p.name for p in given if p.kind is not p.KEYWORD_ONLY]
        for args in (placed, []):
            try:
                takes.bind(*args, **{p.name: None for p in given if p.name not in args})
            except TypeError:
                continue
            return
    has = ", ".join(p.name for p in parameters) or "none"
    raise InvalidInput(f"key of op {op!r} takes {takes}, and a call of {_called(fn)} has {has}; they must fit")


def _called(fn: Any) -> str:
    return getattr(plain(fn), "__qualname__", repr(fn))


def parsed(configs: Sequence[Given], variant: str) -> dict[Config, Any]:
    """Every config with the object that the user gave, in the user's order."""
    found: dict[Config, Any] = {}
    if not isinstance(configs, Iterable):
        raise InvalidInput(f"configs={configs!r} is no sequence; write for example [{{'block': 64}}, {{'block': 128}}]")
    for given in configs:
        if not isinstance(given, Mapping | Config):
            raise InvalidInput(f"config {given!r} is no mapping; write for example {{'block': 64}}")
        try:
            config = given if isinstance(given, Config) else _config(given, variant)
        except (ValidationError, InvalidInput) as error:
            raise InvalidInput(f"config {given!r}: values must be int, str or bool: {in_words(error)}") from None
        if config in found:
            raise InvalidInput(f"config {config.name} is given twice")
        found[config] = given
    if not found:
        raise InvalidInput("configs is empty; give at least one, the default first")
    return found


def _config(given: Mapping[str, Any], variant: str) -> Config:
    params = tuple((name, value) for name, value in given.items() if name != "variant")
    return Config(variant=given.get("variant", word(variant)), params=params)


def word(text: str) -> str:
    """Text that can stand in a key."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.:+-") else "_" for c in text)
