"""Warm-up: measures what a model's layers will ask, before they ask it; resumable, within one budget."""

import sys
import time
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moecache import routing as routings
from moecache.dispatch import Dispatcher, dispatcher
from moecache.kernels import op as ops
from moecache.kernels.op import Op
from moecache.models import read_model
from moecache.place import Place
from moecache.schemas.config import Config
from moecache.schemas.errors import DeviceLost, InvalidInput, MoecacheError
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Tier
from moecache.settings import duration

TOKENS = (1, 16, 256, 4096)
WANTED = "wanted"
SPENT = "the budget is spent"  # the one reason for which a run may end without having measured all


@dataclass(frozen=True)
class WarmRow:
    """What one problem is served with after the warm-up. Times in µs; None where nothing was measured.

    Attributes:
        margin: gain over the default, default / winner − 1.
        measured: candidates measured in this run; 0 when the answer was known, or could not be measured.
        reason: why this config, or why it is not measured.
    """

    problem: Problem
    config: Config
    us: float | None
    default_us: float | None
    margin: float | None
    tier: Tier
    measured: int
    reason: str


@dataclass(frozen=True)
class Progress:
    """Where a warm-up is. `remaining` is an estimate in seconds, None before anything was measured."""

    done: int
    total: int
    problem: Problem
    text: str
    elapsed: float
    remaining: float | None


@dataclass(frozen=True)
class _Task:
    op: Op
    problem: Problem
    topk_ids: torch.Tensor | None  # on the CPU; None draws from the problem's routing bucket


def warmup(
    what: Layer | Path | str | Iterable[Problem] = WANTED,
    *,
    tokens: Sequence[int] = TOKENS,
    routing: Sequence[str] = ("uniform",),
    tp: int = 1,
    ep: int = 1,
    dtype: str | None = None,
    ops: Sequence[str] | None = None,
    budget: float | str | None = None,
    wanted: bool = False,
    device: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> list[WarmRow]:
    """Measure every problem that has no measured choice in this environment; say what each is served with.

    Each problem is stored when it is done: an interrupted run goes on where it stopped, a second run measures
    nothing. In mode=replay and mode=off nothing is measured. Of several ranks let one warm up, then call
    `dispatcher().reload()` on all behind a barrier.

    Args:
        what: a layer, a model's config.json or its folder, problems, or `wanted`: the problems that calls have met
            without a measured choice.
        tokens: token counts; each stands for its power of two bucket.
        routing: generators (see `routing.draw`) for problems that name no routing bucket.
        tp, ep, dtype: as in `models.read_model`.
        ops: names; default: every op of this process.
        budget: seconds, or text like `60s`, for the whole run; default: the settings' budget for each problem.
        wanted: warm the wanted problems too.
        device: number of the GPU.
        progress: called before each problem, with news while it is tuned, and at the end.

    Raises:
        InvalidInput: see read_model; an unknown op, generator or duration; a graph is being captured.
    """
    serving = dispatcher()
    place = serving.places.first(device)
    if place.capturing():
        raise InvalidInput("a graph is being captured: warm up before capturing")
    asked = _asked(what, tokens, tp, ep, dtype, ops, place)
    if wanted or what == WANTED:
        asked += _wanted(serving, place)
    run = _Run(serving, place, duration(budget) if isinstance(budget, str) else budget, progress)
    return run.all(_tasks(asked, routing))


def problems(
    what: Layer | Path | str,
    *,
    tokens: Sequence[int] = TOKENS,
    routing: Sequence[str] = ("uniform",),
    tp: int = 1,
    ep: int = 1,
    dtype: str | None = None,
    ops: Sequence[str] | None = None,
    device: int = 0,
) -> list[Problem]:
    """The problems that `warmup` would measure; arguments and errors are those of `warmup`."""
    place = dispatcher().places.first(device)
    return [task.problem for task in _tasks(_asked(what, tokens, tp, ep, dtype, ops, place), routing)]


def _asked(
    what: Layer | Path | str | Iterable[Problem],
    tokens: Sequence[int],
    tp: int,
    ep: int,
    dtype: str | None,
    names: Sequence[str] | None,
    place: Place,
) -> list[tuple[Op, Problem]]:
    if what == WANTED:
        return []
    if isinstance(what, str | Path):
        what = read_model(what, tp=tp, ep=ep, dtype=dtype)
    if isinstance(what, Layer):
        chosen = [ops.get(name) for name in (ops.names() if names is None else names)]
        return [(op, problem) for op in chosen for problem in op.problems(what, tokens, place.device)]
    return [(ops.get(problem.op), problem) for problem in what if names is None or problem.op in names]


def _wanted(serving: Dispatcher, place: Place) -> list[tuple[Op, Problem]]:
    """Wanted problems of this device that a call can still ask; those of older kernels are dropped."""
    serving.flush()
    device, found, stale = place.device, [], []
    for problem, _ in serving.recall.tiers.wanted():
        if problem.op not in ops.names():
            continue
        op = ops.get(problem.op)
        if problem.source != op.source:
            stale.append(problem)
        elif (problem.vendor, problem.arch, problem.units) == (device.vendor, device.arch, device.units):
            found.append((op, problem))
    if stale and serving.settings.mode == "tune":
        serving.recall.tiers.unwant(stale)
    return found


def _tasks(asked: Iterable[tuple[Op, Problem]], generators: Sequence[str]) -> list[_Task]:
    """One task a key; a problem without a routing bucket becomes one for each that the generators reach."""
    tasks: dict[str, _Task] = {}
    for op, problem in asked:
        if problem.routing:
            tasks.setdefault(problem.key, _Task(op, problem, None))
            continue
        for generator in generators:
            ids = routings.draw(generator, problem.tokens, problem.experts, problem.topk)
            bucket = routings.bucket(routings.histogram(ids, problem.experts))
            full = problem.model_copy(update={"routing": bucket})
            tasks.setdefault(full.key, _Task(op, full, ids))
    return list(tasks.values())


class _Run:
    """One warm-up: its clock, its budget and its news."""

    def __init__(
        self, serving: Dispatcher, place: Place, budget: float | None, tell: Callable[[Progress], None] | None
    ) -> None:
        self._serving, self._place, self._budget, self._tell = serving, place, budget, tell
        self._start = time.perf_counter()
        self._measured, self._measuring = 0, 0.0  # problems, and seconds spent on them

    def all(self, tasks: Sequence[_Task]) -> list[WarmRow]:
        """One row a task. What is known already costs nothing, so the budget is spread over the rest."""
        known = [task for task in tasks if self._known(task)]
        rows = {task.problem.key: self._row(task, 0, "") for task in known}
        todo = [task for task in tasks if task.problem.key not in rows]
        for done, task in enumerate(todo):
            rows[task.problem.key] = self._one(task, done, len(todo))
        if todo:
            self._news(len(todo), len(todo), todo[-1].problem, "done")
        return [rows[task.problem.key] for task in tasks]

    def _known(self, task: _Task) -> bool:
        return self._serving.peek(task.op, task.problem, index=self._place.index).tier == "measured"

    def _one(self, task: _Task, done: int, total: int) -> WarmRow:
        def tell(text: str) -> None:
            self._news(done, total, task.problem, text)

        tell("")
        seconds = self._share(total - done)
        if seconds <= 0:
            return self._row(task, 0, SPENT)
        began = time.perf_counter()
        try:
            ids = None if task.topk_ids is None else task.topk_ids.to(self._place.torch_device)
            timings = self._serving.measure(
                task.op, task.problem, ids, seconds=seconds, index=self._place.index, progress=tell
            )
        except DeviceLost:
            raise  # nothing that follows could be measured
        except (MoecacheError, RuntimeError, MemoryError, OSError) as error:
            return self._row(task, 0, str(error))
        self._measured += 1
        self._measuring += time.perf_counter() - began
        return self._row(task, len(timings), "")

    def _share(self, left: int) -> float:
        """Seconds for the next of `left` problems."""
        each = self._serving.settings.budget
        if self._budget is None:
            return each
        return min(each, (self._budget - (time.perf_counter() - self._start)) / left)

    def _row(self, task: _Task, measured: int, problem: str) -> WarmRow:
        choice = self._serving.peek(task.op, task.problem, index=self._place.index)
        winner = self._serving.recall.known(task.op.name, self._place).get(task.problem.key)
        timed = winner[0] if winner and winner[0].config == choice.config else None
        return WarmRow(
            problem=task.problem,
            config=choice.config,
            us=timed.median_us if timed else None,
            default_us=timed.default_us if timed else None,
            margin=timed.margin if timed else None,
            tier=choice.tier,
            measured=measured,
            reason=f"{choice.reason}; not measured: {problem}" if problem else choice.reason,
        )

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
