"""How a call is served: by what `hot` keeps for its key, else by what is chosen and bound now. One loop for all ops."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch

from moecache import devices, dispatch, feedback
from moecache.dispatch.policy import Ask
from moecache.kernels.contract import Bound, failing
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.errors import MoecacheError
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Choice


class Served(NamedTuple):
    """What `hot` keeps.

    Attributes:
        run: runs it for a call and its outputs.
        what: the config, or two by turns.
        problem: what the call asked.
        asks: whether a captured graph of the same call is served another one, so that a hit must ask for a capture.
    """

    run: Bound
    what: Config | Alternatives
    problem: Problem
    asks: bool


class Asked(Protocol):
    """What a miss has to know of an op: a built-in one or a wrapped one."""

    @property
    def lost(self) -> bool:
        """Whether a call is lost once a config has raised: its tensors are half written."""

    def check(self, call: Any, variant: str) -> None:
        """Raise for arguments that no kernel may see."""

    def question(self, call: Any, posted: int) -> Ask:
        """What the call asks; `posted` is the routing bucket that its layer left, or a constant of feedback.py."""

    def bind(self, what: Config | Alternatives, call: Any, out: Any) -> Bound:
        """What runs a config for calls like this one."""

    def again(self, what: Config | Alternatives, call: Any, out: Any) -> Any:
        """The result of the call with another config, after one has raised."""


def serve(
    asked: Asked, key: tuple[Any, ...], call: Any, out: Any, device: int, slot: feedback.Post | None = None
) -> Any:
    """Run what `hot` holds for the key, or what is chosen now, into `out`.

    A key begins with the routing bucket that an earlier call of the layer left in `slot`, else a constant of
    feedback.py, and the variant. It holds all on which machine code and launches depend. Everything runs on `device`,
    −1 for the CPU, and on its current stream.
    """
    if devices.several is not False and devices.away(device):
        with torch.cuda.device(device):
            return serve(asked, key, call, out, device, slot)
    served = dispatch.dispatcher().hot.get(key)
    if served is None or served.asks:
        served = _ask(asked, key, call, out, served, slot, device)
    try:
        return served.run(call, out)
    except (MoecacheError, NotImplementedError):
        raise
    except Exception as error:
        return _rescue(asked, key[0], call, out, served.what, error)


def _ask(
    asked: Asked, key: tuple[Any, ...], call: Any, out: Any, served: Any, slot: feedback.Post | None, device: int
) -> Served:
    """What serves a call where `hot` keeps nothing, or what a capture is not served; two by turns only captures."""
    if slot is not None and feedback.read(slot, device) == feedback.ANY:
        key = (feedback.ANY, *key[1:])
        served = dispatch.dispatcher().hot.get(key)
    return _miss(asked, key, call, out) if served is None else served


def _miss(asked: Asked, key: tuple[Any, ...], call: Any, out: Any) -> Served:
    began = time.perf_counter()
    active, variant, captured = dispatch.dispatcher(), key[1], key[0] == feedback.ANY
    asked.check(call, variant)
    ask = asked.question(call, key[0])
    problem, index = ask.problem, ask.place.index
    in_graphs: Config | Alternatives | None = None

    def bound(choice: Choice) -> Served:
        nonlocal in_graphs
        what, asks = _for_graphs(call, choice) if captured else choice.config, False
        if not captured and (problem.routing or choice.alternatives):
            open_ = active.in_graphs(ask.op, problem.any_routing, variant, index)
            in_graphs = _for_graphs(call, open_)
            asks = bool(problem.routing) and not (in_graphs == what and active.lasts(open_))
        return Served(_bound(asked, what, call, out), what, problem, asks)

    served: Served = active.choose(
        ask.op, problem, topk_ids=ask.topk_ids, variant=variant, index=index, key=key, began=began, prepare=bound
    )
    if in_graphs not in (None, served.what):
        _load(asked, in_graphs, call, out)
    return served


def _bound(asked: Asked, what: Config | Alternatives, call: Any, out: Any) -> Bound:
    """What runs a config; what raises, if it cannot be bound: the default serves then, as where a launch raises."""
    try:
        return asked.bind(what, call, out)
    except MoecacheError:
        raise
    except Exception as error:
        return failing(error)


def _for_graphs(call: Any, choice: Choice) -> Config | Alternatives:
    """What a captured call gets. One that posts to nobody has few pairs, and shares its answer with eager calls."""
    posts = getattr(call, "posted", None) is not None
    return choice.alternatives if choice.alternatives and posts else choice.config


def _load(asked: Asked, what: Any, call: Any, out: Any) -> None:
    """Launch once what a graph of this call is served: a capture cannot load kernels, and an eager call of the same
    shape is all that it needs before it."""
    try:
        asked.bind(what, call, out)(call, out)
    except Exception as error:
        with suppress(Exception):  # if the call is at fault, its own launch says so
            _rescue(asked, feedback.ANY, call, out, what, error)


def _rescue(asked: Asked, posted: int, call: Any, out: Any, what: Config | Alternatives, error: Exception) -> Any:
    """What the default computes where `what` raised, if it can."""

    def run(other: Config) -> Any:
        return asked.again(other, call, out)

    ask = asked.question(call, posted)
    what, error = _at_fault(what, error, run)
    result = dispatch.dispatcher().rescue(ask, what, error, run)
    if asked.lost:
        raise error
    return result


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
