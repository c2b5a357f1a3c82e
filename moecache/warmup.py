"""Warm-up: measures the problems of a model's layers before calls meet them. It can be resumed and has one budget."""

import contextlib
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from moecache import checks
from moecache import routing as routings
from moecache.devices import Place
from moecache.dispatch import Dispatcher, dispatcher, ranks
from moecache.kernels import registry as ops
from moecache.kernels import shared_inputs
from moecache.kernels.contract import Op
from moecache.models import Model, read_model
from moecache.schemas.errors import DeviceLost, InvalidInput, MoecacheError, TeamLost
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem
from moecache.schemas.warm import MOST_TOKENS, ROUTING, SPENT, TOKENS, LeftOut, Progress, WarmRow
from moecache.settings import seconds
from moecache.tuning.candidates import shortlist
from moecache.tuning.run import Budget

__all__ = ["ROUTING", "SPENT", "TOKENS", "LeftOut", "Progress", "WarmRow", "left_out", "problems", "warmup"]

ONLY_IF_NAMED = ("grouped_gemm",)  # `fused_moe` does not call it, so only engines that call it themselves need it
WANTED, STORED = "wanted", "stored"
What = Model | Layer | Path | str | Iterable[Layer | Problem]


@dataclass(frozen=True)
class _Task:
    op: Op
    problem: Problem
    topk_ids: torch.Tensor | None  # on the CPU; None draws from the problem's routing bucket


def warmup(
    what: What = WANTED,
    *,
    tokens: Sequence[int] = TOKENS,
    routing: Sequence[str] = ROUTING,
    tp: int = 1,
    ep: int = 1,
    dtype: str | None = None,
    ops: Sequence[str] | None = None,
    budget: float | str | None = None,
    wanted: bool = False,
    again: bool = False,
    device: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> list[WarmRow]:
    """Measure every problem that has no measured choice in this environment; one row says what each is served with.

    Each problem is stored when it is done, so an interrupted run goes on where it stopped. Nothing is measured twice,
    nor in mode=replay or mode=off. Of several ranks let one warm up, then call `dispatcher().reload()` on all after a
    barrier. If an op's candidates are collectives, all ranks warm it up together, within `using(team=…)`.

    Args:
        what: a model's config.json or its folder; a model (see `models.read_model`, `models.model_of`); layers;
            problems; `wanted`, problems that calls met without a measured choice; or `stored`, all problems of this
            device in the user's file, which are measured again.
        tokens: token counts, 1 to 131072; each stands for its bucket, a power of two.
        routing: names of routings to draw (see `routing.draw`), for problems that name no routing bucket.
        tp, ep, dtype: as in `models.read_model`.
        ops: names; default: every op of this process except `grouped_gemm`. If an op has no problem of the layers, it
            raises if it was named, else a warning says why (see `left_out`).
        budget: seconds for the whole run, or a text like `60s`; default: 30 s for each problem, and few need as much.
        wanted, again: also warm the wanted problems; also measure what is stored already.
        device: number of the GPU.
        progress: called before each problem, with news while it is tuned, and at the end.

    Raises:
        InvalidInput: see `read_model`; an unknown op, routing or duration; a graph is being captured.
        DeviceLost: a candidate hung or broke the device; what was measured until then is stored.
    """
    _check(warmup, locals())
    limit = None if budget is None else seconds(budget)
    serving = dispatcher()
    place = serving.places.first(device)
    if place.capturing():
        raise InvalidInput("a graph is being captured: warm up before capturing")
    asked, left = _planned(_items(what, tp, ep, dtype), _counts(tokens), ops, place)
    for each in left:
        if each.nothing and ops is not None:
            raise InvalidInput(str(each))
        if each.nothing:
            warnings.warn(str(each), RuntimeWarning, stacklevel=3)
    if what == STORED:
        again, asked = True, _stored(serving, place, ops)
    if wanted or what == WANTED:
        asked += _wanted(serving, place)
    meets = serving.team.size > 1 and any(getattr(op, "collective", False) for op in _named(ops))
    return _Run(serving, place, limit, progress).all(_tasks(asked, routing), again, meets)


def problems(
    what: What,
    *,
    tokens: Sequence[int] = TOKENS,
    routing: Sequence[str] = ROUTING,
    tp: int = 1,
    ep: int = 1,
    dtype: str | None = None,
    ops: Sequence[str] | None = None,
    device: int = 0,
) -> list[Problem]:
    """The problems that `warmup` would measure, with the same arguments. It does not say what is left out."""
    _check(problems, locals())
    place, items = dispatcher().places.first(device), _items(what, tp, ep, dtype)
    return [task.problem for task in _tasks(_planned(items, _counts(tokens), ops, place)[0], routing)]


def left_out(
    what: What,
    *,
    tokens: Sequence[int] = TOKENS,
    tp: int = 1,
    ep: int = 1,
    dtype: str | None = None,
    ops: Sequence[str] | None = None,
    device: int = 0,
) -> list[LeftOut]:
    """The ops that `warmup` would leave out, in full or in part, and why. Arguments and errors: see `warmup`."""
    _check(left_out, locals())
    place = dispatcher().places.first(device)
    return _planned(_items(what, tp, ep, dtype), _counts(tokens), ops, place)[1]


def _check(fn: Callable[..., Any], given: dict[str, Any]) -> None:
    """Raise InvalidInput for an argument of a wrong type; `what` and `tokens` are looked at later."""
    checks.types(fn, {name: value for name, value in given.items() if name not in ("what", "tokens")})


def _items(what: What, tp: int, ep: int, dtype: str | None) -> list[Layer | Problem]:
    if isinstance(what, str) and what in (WANTED, STORED):
        return []
    if isinstance(what, str | Path):
        what = read_model(what, tp=tp, ep=ep, dtype=dtype)
    elif (tp, ep, dtype) != (1, 1, None):
        raise InvalidInput(
            f"tp={tp}, ep={ep} and dtype={dtype} are for a config.json alone: layers, problems and a model that was "
            f"read have them already"
        )
    if isinstance(what, Model | Layer):
        return list(what.layers) if isinstance(what, Model) else [what]
    items = list(what) if isinstance(what, Iterable) else [what]
    for item in items:
        if not isinstance(item, Layer | Problem):
            raise InvalidInput(f"{item!r} is no layer and no problem; give those, a model, or its config.json")
    return items


def _counts(tokens: Sequence[int]) -> list[int]:
    """Token counts that calls may have.

    Raises:
        InvalidInput: others.
    """
    wanted = f"a sequence of whole numbers from 1 to {MOST_TOKENS} is allowed, like [1, 16, 256]"
    if isinstance(tokens, str | bytes | torch.Tensor) or not isinstance(tokens, Iterable):
        raise InvalidInput(f"tokens={tokens!r:.200}; {wanted}")
    counts = list(tokens)
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_TOKENS:
            raise InvalidInput(f"tokens has {count!r}; {wanted}")
    return counts


def _named(names: Sequence[str] | None) -> list[Op]:
    every = [name for name in ops.names() if name not in ONLY_IF_NAMED] if names is None else names
    return [ops.get(name) for name in every]


def _planned(
    items: Sequence[Layer | Problem],
    tokens: Sequence[int],
    names: Sequence[str] | None,
    place: Place,
) -> tuple[list[tuple[Op, Problem]], list[LeftOut]]:
    """What is to be measured, and what is left out."""
    layers = [item for item in items if isinstance(item, Layer)]
    asked, left = list[tuple[Op, Problem]](), list[LeftOut]()
    for op in _named(names) if layers else []:
        found = [problem for layer in layers for problem in op.problems(layer, tokens, place.device)]
        asked += [(op, problem) for problem in found]
        why = dict.fromkeys(filter(None, (op.left_out(layer, tokens, place.device) for layer in layers)))
        if why and (names is not None or ops.built_in(op.name)):
            left.append(LeftOut(op.name, "; ".join(why), not found))
    given = [item for item in items if isinstance(item, Problem)]
    return asked + [(ops.get(each.op), each) for each in given if names is None or each.op in names], left


def _wanted(serving: Dispatcher, place: Place) -> list[tuple[Op, Problem]]:
    """Wanted problems of this device that a call can still ask; those of older kernels are dropped."""
    serving.flush()
    wanted = [problem for problem, _ in serving.lookup.tiers.user.wanted() if problem.op in ops.names()]
    stale = [problem for problem in wanted if problem.source != ops.get(problem.op).source]
    if stale and serving.settings.mode == "tune":
        serving.lookup.tiers.write(lambda store: store.unwant(stale))
    return _asked(wanted, serving, place)


def _stored(serving: Dispatcher, place: Place, names: Sequence[str] | None) -> list[tuple[Op, Problem]]:
    """What the user's file has timed on such a device, of the kernels of today."""
    known = list(ops.names() if names is None else names)
    timed = dict.fromkeys(row.problem for row in serving.lookup.tiers.user.timings(op=known))
    return _asked(timed, serving, place)


def _asked(problems: Iterable[Problem], serving: Dispatcher, place: Place) -> list[tuple[Op, Problem]]:
    """Those that a call can still ask on this device, with their op."""
    found = [(ops.get(each.op), each) for each in problems if serving.places.of_problem(each, place.index) is place]
    return [(op, problem) for op, problem in found if problem.source == op.source]


def _tasks(asked: Iterable[tuple[Op, Problem]], generators: Sequence[str]) -> list[_Task]:
    """One task a key; a problem without a routing bucket becomes one for each that the generators reach, but where
    ranks meet, none of which knows the routing of all."""
    tasks: dict[str, _Task] = {}
    drawn = cache(_drawn)  # the ops of a layer share its draws
    for op, problem in asked:
        if problem.routing or getattr(op, "collective", False):
            tasks.setdefault(problem.key, _Task(op, problem, None))
            continue
        for generator in generators:
            ids, bucket = drawn(generator, problem.tokens, problem.experts, problem.topk)
            full = problem.model_copy(update={"routing": bucket})
            tasks.setdefault(full.key, _Task(op, full, ids))
    return list(tasks.values())


def _drawn(generator: str, tokens: int, experts: int, topk: int) -> tuple[torch.Tensor, str]:
    ids = routings.draw(generator, tokens, experts, min(topk, experts))
    ids = ids[:, torch.arange(topk) % ids.shape[1]]  # a call may ask for more than there are: then they come again
    return ids, routings.bucket(routings.histogram(ids, experts))


class _Run:
    """One warm-up: its clock, its budget and its progress."""

    def __init__(
        self, serving: Dispatcher, place: Place, budget: float | None, tell: Callable[[Progress], None] | None
    ) -> None:
        self._serving, self._place, self._budget, self._tell = serving, place, budget, tell
        self._start = time.perf_counter()
        self._measured, self._measuring = 0, 0.0  # problems, and seconds spent on them

    def all(self, tasks: Sequence[_Task], again: bool, meets: bool) -> list[WarmRow]:
        """One row a task. What is known already costs nothing, so the budget is spread over the rest; with `again`
        nothing counts as known. With `meets` all ranks are here."""
        unfinished = self._serving.lookup.unfinished(self._place)
        known = [] if again else [t for t in tasks if t.problem.key not in unfinished and self._known(t)]
        rows = {task.problem.key: self._row(task, 0, "") for task in known}
        todo = [task for task in tasks if task.problem.key not in rows]
        todo = self._in_step(todo) if meets else todo
        with shared_inputs.sharing(), self._compiling(todo):
            for done, task in enumerate(todo):
                rows[task.problem.key] = self._one(task, done, len(todo))
        if todo:
            self._news(len(todo), len(todo), todo[-1].problem, "done")
        return [rows[task.problem.key] for task in tasks]

    def _in_step(self, todo: Sequence[_Task]) -> list[_Task]:
        """What ranks measure together goes first, so nobody comes late to it; what one of them lacks all measure."""
        own = {task.problem.key: task for task in todo if ranks.team_of(task.op, self._serving.team).size > 1}
        every = ranks.problems(self._serving.team, [task.problem for task in own.values()])
        first = [own.get(each.key) or _Task(ops.get(each.op), each, None) for each in every]
        return [*first, *(task for task in todo if task.problem.key not in own)]

    @contextlib.contextmanager
    def _compiling(self, todo: Sequence[_Task]) -> Iterator[None]:
        """Within the block the candidates of all problems compile, in order, while the first are measured."""
        place, serving = self._place, self._serving
        helpers = serving.helpers(place) if todo and serving.settings.mode == "tune" else None
        if helpers is None:
            yield
            return
        for problem, op in {task.problem.any_routing: task.op for task in todo}.items():
            with contextlib.suppress(InvalidInput):  # measuring says so
                for config in shortlist(op, problem, place.device, Budget.candidates, None):
                    helpers.compile(op.sources(problem, config, place.device), place.device)
        try:
            yield
        finally:
            helpers.drop()

    def _known(self, task: _Task) -> bool:
        """Whether it has a measured choice. It asks only if something is stored."""
        if self._serving.lookup.known(task.op.name, self._place).get(task.problem.key) is None:
            return False
        return self._serving.peek(task.op, task.problem, index=self._place.index).tier == "measured"

    def _one(self, task: _Task, done: int, total: int) -> WarmRow:
        tell = partial(self._news, done, total, task.problem)
        tell("")
        team = ranks.team_of(task.op, self._serving.team)
        seconds = team.agree(f"seconds for {task.problem.key}", self._share(total - done), min)
        if seconds <= 0:
            return self._row(task, 0, SPENT)
        began = time.perf_counter()
        try:
            ids = None if task.topk_ids is None else task.topk_ids.to(self._place.torch_device)
            timings = self._serving.measure(
                task.op, task.problem, ids, seconds=seconds, index=self._place.index, progress=tell
            )
        except (DeviceLost, TeamLost):
            raise  # nothing that follows could be measured
        except (MoecacheError, RuntimeError, MemoryError, OSError) as error:
            return self._row(task, 0, str(error))
        self._measured += 1
        self._measuring += time.perf_counter() - began
        return self._row(task, len(timings), "")

    def _share(self, left: int) -> float:
        """Seconds for the next of `left` problems."""
        if self._budget is None:
            return Budget.seconds
        return min(Budget.seconds, (self._budget - (time.perf_counter() - self._start)) / left)

    def _row(self, task: _Task, measured: int, problem: str) -> WarmRow:
        choice = self._serving.peek(task.op, task.problem, index=self._place.index)
        winner = self._serving.lookup.known(task.op.name, self._place).get(task.problem.key)
        known: tuple[float | None, ...] = (None, None, None, None)
        if winner and (timed := winner[0]).config == choice.config:
            known = timed.median_us, timed.default_us, timed.margin, timed.mad_us / timed.median_us
        us, default_us, margin, noise = known
        reason = f"{choice.reason}; not measured: {problem}" if problem else choice.reason
        return WarmRow(task.problem, choice.config, us, default_us, margin, choice.tier, measured, reason, noise)

    def _news(self, done: int, total: int, problem: Problem, text: str) -> None:
        if self._tell is not None:
            each = self._measuring / self._measured if self._measured else None
            remaining = None if each is None else each * (total - done)
            elapsed = time.perf_counter() - self._start
            self._tell(Progress(done, total, problem, text, elapsed, remaining))


class _Callable(types.ModuleType):
    """This module: importing it puts it in the place of the function, as `moecache.warmup`."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[WarmRow]:
        return warmup(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
