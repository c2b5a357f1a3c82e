"""`wrap`: any kernel launcher that takes a config becomes a tuned op, with the same signature and the same results."""

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import MethodType
from typing import Any, Generic, TypeVar, Unpack, overload

import torch

from moecache import devices, routing
from moecache.calls import serve
from moecache.dispatch import dispatcher
from moecache.dispatch.explain import Explanation
from moecache.dispatch.policy import Ask
from moecache.kernels import registry as ops
from moecache.kernels.contract import Bound
from moecache.kernels.own_mode import callers_mode
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem
from moecache.wrapping.options import Given, Options, check, parsed, word
from moecache.wrapping.sources import plain, source_of
from moecache.wrapping.wrapped import Call, Dims, WrappedOp, clone

Result = TypeVar("Result")


@overload
def wrap(fn: Callable[..., Result], **options: Unpack[Options]) -> "Wrapped[Result]": ...
@overload
def wrap(fn: None = None, **options: Unpack[Options]) -> Callable[[Callable[..., Result]], "Wrapped[Result]"]: ...
def wrap(
    fn: Callable[..., Any] | None = None,
    *,
    op: str,
    configs: Sequence[Given],
    key: Callable[..., Dims],
    apply: Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any] | None = None,
    reference: Callable[..., Any] | None = None,
    tolerance: float | None = None,
    fits: Callable[[Problem, Config, Device], str | bool] | None = None,
    cost: Callable[[Problem, Config, Device], float] | None = None,
    mutates: Sequence[str] = (),
    writes: Sequence[str] = (),
    soft_dims: Sequence[str] = (),
    version: str = "",
) -> Any:
    """A function with the signature of `fn`, without its config. It runs `fn` with the fastest config.

    Args:
        fn: launches a kernel. It takes its config as the keyword `config`, unless `apply` says how. Without `fn` this
            is a decorator: `@moecache.wrap(op=…, configs=…, key=…)`.
        op: the name in the cache file and the commands. No two functions of a process may share one.
        configs: mappings of name to int, str or bool (`variant` names a kernel variant), or Configs. The first is the
            static default: only a config that is proved faster replaces it.
        key: called with the arguments of a call. It returns a mapping that decides which config is fastest. Leave
            nothing out that changes the winner: sizes, layouts, flags. Some names are known: `tokens` (put into
            buckets, powers of two), `experts`, `topk`, `dtype`, and `routing` (the name of a routing bucket). In place
            of `routing`, `counts` is a list with the tokens of each expert. Each call turns it into a bucket, which
            takes about 10 µs for 128 experts. Any other name has an int, str, bool or dtype; True is 1.
        apply: `apply(fn, config, args, kwargs)` runs `fn` with one item of `configs`.
        reference: gives the right result, called like the wrapped function; default: `fn` with the first config.
        tolerance: the largest error, relative to the largest element. The default follows the `dtype` of the key: 1e-3
            for fp32, 1e-8 for fp64, else 2e-2. Integers must be equal.
        fits: says why a config cannot serve a problem on a device; '' or True means that it can. Default: all fit.
        cost: predicted µs, for calls that may not be measured. Without it such calls get the first config.
        mutates: arguments that `fn` reads and writes in place. While tuning, results are compared on fresh copies.
        writes: arguments that are outputs; `fn` writes every element, whatever was there before.
        soft_dims: dims in which a neighbour may differ (by a factor of 4 at most) and still lend its winner.
        version: replaces the hash of the source of `fn` and of what it calls from its own module.

    Raises:
        InvalidInput: a name that is taken or no word; no configs, or equal ones; an argument in `mutates`, `writes` or
            `key` that `fn` does not have; no function where one belongs; no `version`, and no source to read.
    """
    if fn is None:
        return functools.partial(wrap, **{name: value for name, value in locals().items() if name != "fn"})
    functions = {"fn": fn, "key": key, "apply": apply, "reference": reference, "fits": fits, "cost": cost}
    check(op, functions, {"mutates": mutates, "writes": writes, "soft_dims": soft_dims}, tolerance, version)
    given = parsed(configs, getattr(fn, "__name__", "kernel"))
    source = word(version) if version else source_of(fn, *([apply] if apply else []))
    names = tuple(mutates), tuple(writes), tuple(soft_dims)
    wrapped = WrappedOp(op, source, fn, given, apply, reference, tolerance, fits, cost, *names)
    _check_name(wrapped)
    ops.register(wrapped)
    return Wrapped(wrapped, key)


class Wrapped(Generic[Result]):
    """The wrapped function. `op` is what the tuner sees."""

    def __init__(self, op: WrappedOp, key: Callable[..., Dims]) -> None:
        functools.update_wrapper(self, plain(op.fn))
        with suppress(ValueError, TypeError):  # C functions have no signature
            whole = inspect.signature(plain(op.fn))
            self.__signature__ = whole.replace(parameters=[p for p in whole.parameters.values() if p.name != "config"])
        hints = {name: hint for name, hint in getattr(self, "__annotations__", {}).items() if name != "config"}
        self.__annotations__ = hints  # a new one: the function keeps its own
        self.op = op
        self._key = key

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        number = _device_number(args, kwargs)
        if devices.several is not False and devices.away(number):
            with torch.cuda.device(number):
                return self(*args, **kwargs)
        dims = self._key(*args, **kwargs)
        try:
            if "counts" in dims:
                dims = _bucketed(dims)
            key = (None, "", self, number, *dims.items())
            hash(key)
        except (TypeError, AttributeError):  # it is no mapping, or a value in it has no hash
            allowed = "names with int, str, bool or dtype, like {'tokens': 16}"
            raise InvalidInput(f"key of op {self.op.name!r} gave {dims!r}; allowed are {allowed}") from None
        return serve(self, key, (args, kwargs), None, number)  # type: ignore[no-any-return]

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """A function of a class is bound to its object, as any."""
        return self if instance is None else MethodType(self, instance)

    def problem(self, *args: Any, **kwargs: Any) -> Problem:
        """The problem of a call with these arguments."""
        return self.op.problem(_bucketed(self._key(*args, **kwargs)), _place(args, kwargs).device)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which config a call with these arguments gets, and why. Runs and tunes nothing."""
        return dispatcher().explain(self.problem(*args, **kwargs))

    # --- what a miss has to know: see moecache.calls.Asked ---

    @property
    def lost(self) -> bool:
        """Whether a call's tensors are half written once a config has raised."""
        return bool(self.op.mutates)

    def check(self, call: Call, variant: str) -> None:
        """Nothing: `fn` looks at its arguments itself."""

    def question(self, call: Call, posted: int | None) -> Ask:
        """The problem of a call; tuned on copies of its arguments, in its mode of torch."""
        args, kwargs = call
        where = _place(args, kwargs)
        op = replace(self.op, call=call, mode=callers_mode())
        return Ask(op, self.op.problem(_bucketed(self._key(*args, **kwargs)), where.device), where)

    def bind(self, what: Any, call: Call, out: None) -> Bound:
        """`fn` with a config."""
        run = self.op.bound(what)
        return lambda call, out: run(*call[0], **call[1])

    def again(self, what: Any, call: Call, out: None) -> Any:
        """The call with another config; on copies, if `fn` writes in place: do they show the config to be at fault?"""
        args, kwargs = clone(call, {}) if self.op.mutates else call
        return self.op.bound(what)(*args, **kwargs)


def _place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> devices.Place:
    """Where a call runs: on the GPU of its tensors, else on the CPU."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    first = tensors[0] if tensors else None
    return dispatcher().places.of_tensor(next((tensor for tensor in tensors if tensor.is_cuda), first))


def _device_number(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The GPU of a call's tensors; −1 for the CPU.

    It is a plain loop, as it is on the hot path. If there is only one GPU, it ends at the first tensor there.

    Raises:
        InvalidInput: the tensors are on two GPUs.
    """
    found = -1
    for values in (args, kwargs.values()):
        for value in values:
            if not isinstance(value, torch.Tensor) or (number := value.get_device()) < 0 or number == found:
                continue
            if found >= 0:
                raise InvalidInput(f"the tensors are on cuda:{found} and cuda:{number}; allowed is one GPU")
            if devices.several is False:
                return number
            found = number
    return found


def _bucketed(dims: Dims) -> Dims:
    """`counts` turned into `routing`."""
    if "counts" not in dims:
        return dims
    counts = dims["counts"]
    if isinstance(counts, torch.Tensor):
        raise InvalidInput("counts is a tensor: reading it may wait for the device; give a list, or routing=…")
    if any(count < 0 for count in counts):
        raise InvalidInput(f"counts={counts!r}; allowed are 0 and more: the tokens of each expert")
    rest = {name: value for name, value in dims.items() if name != "counts"}
    return {"experts": len(counts)} | rest | {"routing": routing.bucket(counts)}


def _check_name(op: WrappedOp) -> None:
    """Refuse a name that another function has. The same function (a reload, a notebook cell) replaces itself."""
    if op.name not in ops.names():
        return
    other = getattr(ops.get(op.name), "fn", None)
    theirs, ours = (f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', fn)}" for fn in (other, op.fn))
    if other is None or theirs != ours:
        raise InvalidInput(f"op name {op.name!r} is taken by {theirs if other else 'a built-in op'}; choose another")
