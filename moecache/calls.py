"""How a call of a public op is served: the answer that is kept for its key, else the one that is chosen now."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from moecache import checks, dispatch, place, posting, routing
from moecache.dispatch.any_routing import any_routing
from moecache.kernels import registry as ops
from moecache.kernels.contract import Args, Op
from moecache.place import Place
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.errors import MoecacheError
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Choice


class Public(NamedTuple):
    """What a miss has to know of a public op.

    Attributes:
        op: SORT, FUSED_MOE or GROUPED_GEMM.
        check: raises for arguments that no kernel may see.
        made: makes the arguments, of types that its annotations say.
        values: raises for what tensors of them hold, of which it waits.
        at: names an argument that is a tensor on the device of the call.
        choices: gives the routing to tune on, [T, k], from the arguments, without waiting.
        experts: those that it may name.
    """

    op: Any
    check: Callable[[Args], None]
    made: Callable[..., Args]
    values: Callable[[Args], None]
    at: str
    choices: Callable[[Args], torch.Tensor]
    experts: Callable[[Args], int]


class _Eager(NamedTuple):
    """What `hot` keeps where a captured graph of the same call is served another config, or may be."""

    config: Config


def serve(public: Public, args: Args, key: tuple[Any, ...], out: Any, slot: posting.Post | None = None) -> Any:
    """Launch what `hot` holds for the key, or what is chosen now; `out` is made where it is None.

    A key begins with the routing bucket that an earlier call of the layer left in `slot`, else posting.UNKNOWN or ANY,
    and the variant. A Config answers whether or not a graph is captured, so that most hits need not ask. Everything
    runs on the device of the tensors and on its current stream, whatever device is current.
    """
    if place.several is not False and place.away(index := args[public.at].get_device()):
        with torch.cuda.device(index):
            return serve(public, args, key, out, slot)
    chosen = dispatch.dispatcher().hot.get(key)
    if type(chosen) is not Config:
        chosen = _choose(public, args, key, chosen, out, slot)
        if type(chosen) is Alternatives:
            return _launch(public.op, chosen, args, out)
    try:
        return public.op.launch(chosen, args, public.op.outputs(args) if out is None else out)
    except (MoecacheError, NotImplementedError):
        raise
    except Exception as error:
        return _rescue(public, args, *_problem(public, args, key)[:2], chosen, error, out)


def _choose(
    public: Public, args: Args, key: tuple[Any, ...], kept: Any, out: Any, slot: posting.Post | None
) -> Config | Alternatives:
    """What serves a call for which `hot` keeps no Config, and nothing at all at a miss; two by turns only captures."""
    if slot is not None and posting.read(slot, args[public.at]) == posting.ANY:
        key = (posting.ANY, *key[1:])
        kept = dispatch.dispatcher().hot.get(key)
    if kept is None:
        return _miss(public, args, key, out)
    return kept.config if isinstance(kept, _Eager) else kept


def _rescue(
    public: Public, args: Args, problem: Problem, where: Place, what: Config | Alternatives, error: Exception, out: Any
) -> Any:
    """What the default computes where `what` raised, if it can."""

    def run(other: Config) -> Any:
        return _launch(public.op, other, args, out)

    what, error = _at_fault(what, error, run)
    return dispatch.dispatcher().rescue(public.op, problem, where, what, error, run)


def _problem(public: Public, args: Args, key: tuple[Any, ...]) -> tuple[Problem, Place, torch.Tensor | None]:
    """What a call asks: with the posted routing, else the exact one if it may be read, else for any.

    Also where, and the routing to tune on, which is only made where tuning is possible.
    """
    active, posted = dispatch.dispatcher(), key[0]
    where = active.places.of_tensor(args[public.at])
    may_read = active.settings.mode == "tune" and not where.capturing()
    ids, bucket = public.choices(args) if may_read else None, ""
    if posted >= 0:
        bucket = routing.bucket_name(posted)
    elif posted == posting.UNKNOWN and ids is not None:
        ids = ids.cpu()  # to count them there a GPU would load kernels, and more for what tuning asks of them
        bucket = routing.bucket(routing.histogram(ids, public.experts(args)))
    return public.op.problem(args, where.device, bucket), where, ids


def _miss(public: Public, args: Args, key: tuple[Any, ...], out: Any) -> Config | Alternatives:
    began = time.perf_counter()
    active, variant = dispatch.dispatcher(), key[1]
    _check(public, args, variant)
    problem, where, ids = _problem(public, args, key)
    captured = key[0] == posting.ANY

    def prepare(answer: Choice) -> Config | Alternatives | _Eager:
        if problem.routing:
            return _Eager(answer.config)
        return _in_graphs(args, answer) if captured else answer.config

    choice = active.choose(
        public.op, problem, topk_ids=ids, variant=variant, index=where.index, key=key, began=began, prepare=prepare
    )
    if captured:
        return _in_graphs(args, choice)
    if problem.routing or choice.alternatives:
        _load_captured(public, args, key, problem, where, choice.config, out)
    return choice.config


def _check(public: Public, args: Args, variant: str) -> None:
    """Types, shapes, and values where they may be read: in mode=tune, and with the setting debug."""
    checks.types(public.made, args)
    checks.types(_check, {"variant": variant})
    public.check(args)
    if _reads() and not dispatch.dispatcher().places.of_tensor(args[public.at]).capturing():
        public.values(args)


def check_on_cpu(values: Callable[[Args], None], of: torch.Tensor, args: Args) -> None:
    """Values of a tensor on the CPU, where nothing waits, in every call: each may bring others."""
    if not of.is_cuda and _reads():
        values(args)


def _reads() -> bool:
    """Whether what tensors hold is checked at all."""
    settings = dispatch.dispatcher().settings
    return settings.mode == "tune" or settings.debug


def _in_graphs(args: Args, choice: Choice) -> Config | Alternatives:
    """What a captured call gets. One that posts to nobody has few pairs, and shares its answer with eager calls."""
    posts = args.get("posted") is not None
    return choice.alternatives if choice.alternatives and posts else choice.config


def _load_captured(
    public: Public, args: Args, key: tuple[Any, ...], problem: Problem, where: Place, served: Config, out: Any
) -> None:
    """Launch once what a graph of this call is served: a capture cannot load kernels, and an eager call of the same
    shape is all that it needs before it. Where that is what the call itself is served, hits need not ask."""
    asked, active = any_routing(problem), dispatch.dispatcher()
    kept, choice = active.hot.get(key), active.peek(public.op, asked, variant=key[1], index=where.index)
    what = _in_graphs(args, choice)
    if what == served:
        if kept == _Eager(served) and active.lasts(choice):
            active.replace(key, kept, served)
        return
    try:
        _launch(public.op, what, args, out)
    except Exception as error:
        with suppress(Exception):  # if the call is at fault, its own launch says so
            _rescue(public, args, asked, where, what, error, out)


def _launch(op: Op, what: Config | Alternatives, args: Args, out: Any) -> Any:
    """Run a config, or the one of two that owns the call's routing, into `out`; made where it is None."""
    out = op.outputs(args) if out is None else out
    if isinstance(what, Config):
        return op.launch(what, args, out)
    return ops.alternating(op.name).launch(what, args, out)


def _at_fault(
    what: Config | Alternatives, error: Exception, run: Callable[[Config], Any]
) -> tuple[Config | Alternatives, Exception]:
    """What raised, and its error: of two configs the one that raises alone too, both if none does."""
    for config in () if isinstance(what, Config) else (what.first, what.second):
        try:
            run(config)
        except Exception as own:
            return config, own
    return what, error
