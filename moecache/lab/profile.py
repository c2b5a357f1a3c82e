"""Teaches the cost model one layer on this device: times a designed sample of calls, fits, keeps what was learnt.

Afterwards the fitted model answers those problems of the layer that nobody has tuned. Nothing is stored as a
measurement, as the sample tries few configs of each call.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from moecache import routing as routings
from moecache.devices import Place
from moecache.dispatch import Dispatcher, dispatcher
from moecache.kernels import registry as ops
from moecache.kernels import shared_inputs
from moecache.kernels.contract import Op
from moecache.lab.fitting import learn
from moecache.models import Model, read_model
from moecache.predict.calls import cell
from moecache.predict.learned import Learned
from moecache.predict.parameters import VERSION
from moecache.predict.products import Array, candidates
from moecache.predict.ranking import fitted_to, given
from moecache.predict.smoothing import Smoothed, apart, smoothed
from moecache.predict.work import Cell, Work
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem
from moecache.settings import duration
from moecache.text import Column, Table
from moecache.tuning.candidates import Only
from moecache.tuning.timing import Clock
from moecache.tuning.tuner import Budget, Workers, compiling, tune
from moecache.version import __version__

TOKENS = (1, 16, 64, 256, 1024, 4096)
ROUTINGS = ("uniform", "zipf", "dir2")  # the one that teaches most comes first: the budget may end before the last
CONFIGS = 12  # timed for each call
LIKELY = 2 / 3  # share of these with the lowest predicted times; the others differ from those and each other
FOLDS = 5  # of the cross validation
LEAST = 4  # number of calls that must be timed
SECONDS = 120.0
TIMING = 0.9  # share of the budget; the rest is for the fits


@dataclass(frozen=True)
class Regret:
    """How much slower the chosen configs are than the best timed ones, in per cent."""

    mean: float
    max: float


@dataclass(frozen=True)
class Profiled:
    """What a profile found.

    Attributes:
        learned: the fitted model, as the cache file keeps it.
        device: where it was timed.
        calls: number of calls that were timed.
        timings: number of configs that were timed, over all calls.
        left: number of calls that the budget did not reach.
        before: regret on the sample, of what was known before.
        after: regret on the sample, of the fit. The config of each call is chosen by a fit to the other calls.
        seconds: how long it took.
    """

    learned: Learned
    device: Device
    calls: int
    timings: int
    left: int
    before: Regret
    after: Regret
    seconds: float


@dataclass(frozen=True)
class _Call:
    problem: Problem
    topk_ids: torch.Tensor  # on the CPU
    cell: Cell
    configs: list[Config]
    works: list[Work]


def profile(
    what: Model | Layer | Path | str,
    *,
    tokens: Sequence[int] = TOKENS,
    routing: Sequence[str] = ROUTINGS,
    tp: int = 1,
    ep: int = 1,
    dtype: str | None = None,
    op: Op | None = None,
    budget: float | str = SECONDS,
    device: int = 0,
    clock: Clock | None = None,
    progress: Callable[[str], None] | None = None,
) -> Profiled:
    """Time a sample of a layer's calls on this device, fit the cost model to it, and keep it in the user's cache file.

    Args:
        what: a layer; or a model, its config.json or its folder, whose first kind of layer is taken.
        tokens, routing: token counts and names of routings (see `routing.draw`) of the sample.
        tp, ep, dtype: as in `models.read_model`.
        op: the op to profile; default: fused_moe.
        budget: seconds for all of it, or a text like `120s`.
        device: number of the GPU.
        clock: replaces the device's clock, for tests.
        progress: called with a line of text for each step.

    Raises:
        InvalidInput: the cost model does not know the op or its dtype on this device; the mode is not tune; a graph is
            being captured; the budget was too short; see also `read_model`.
    """
    serving, tell, began = dispatcher(), progress or _silent, time.perf_counter()
    place = serving.places.first(device)
    if place.capturing() or serving.settings.mode != "tune":
        why = "a graph is being captured" if place.capturing() else f"mode={serving.settings.mode}"
        raise InvalidInput(f"cannot profile: {why}")
    model = read_model(what, tp=tp, ep=ep, dtype=dtype) if isinstance(what, str | Path) else what
    layer = model.layers[0] if isinstance(model, Model) else model
    op = op or ops.get("fused_moe")
    seconds = duration(budget) if isinstance(budget, str) else budget
    calls = _calls(op, layer, tokens, routing, place.device)
    sample = _timed(op, calls, serving, place, clock, began + TIMING * seconds, tell)
    if len(sample) < LEAST:
        raise InvalidInput(f"{len(sample)} of {len(calls)} calls timed within {seconds:g} s; {LEAST} are needed")
    tell(f"fitting {len(sample)} calls")
    found = _learned(op, sample, place, layer.model)
    serving.lookup.tiers.learn(op.name, place.device, found.layer, VERSION, found.model_dump_json())
    serving.reload()
    before, after = _regrets(op, sample, place.device)
    count = sum(len(us) for _, us in sample)
    spent = time.perf_counter() - began
    return Profiled(found, place.device, len(sample), count, len(calls) - len(sample), before, after, spent)


# --- the sample ---


def _calls(op: Op, layer: Layer, tokens: Sequence[int], generators: Sequence[str], device: Device) -> list[_Call]:
    """The calls to time, each with the configs to time. The routing that teaches most comes first. None comes twice."""
    found: dict[tuple[int, tuple[int, ...]], _Call] = {}
    problems = op.problems(layer, tokens, device)
    if not problems:
        why = op.left_out(layer, tokens, device)
        raise InvalidInput(f"{op.name} has no problem of {layer.model} on {device.name}{why and ': '}{why}")
    for generator in generators:
        for problem in problems:
            space = op.space(problem, device)
            gated, works = problem.dim("gated", 1), [op.work(problem, config, device) for config in space]
            if not gated or not fitted_to(problem) or any(work.up is None for work in works):
                kind = (problem.dim("quant", "") or problem.dtype) + ("" if gated else " without a gate")
                raise InvalidInput(f"the cost model does not know {op.name} in {kind} on {device.name}")
            ids = routings.draw(generator, problem.tokens, problem.experts, problem.topk)
            counts = routings.histogram(ids, problem.experts)
            here = problem.experts / problem.dim("global", problem.experts)
            asked = cell(problem, [max(1, round(count * here)) if count else 0 for count in counts])
            key = (problem.tokens, tuple(sorted(asked.counts)))
            full = problem.model_copy(update={"routing": routings.bucket(counts)})
            if key not in found:
                found[key] = _Call(full, ids, asked, *design(space, works, asked, given(device)))
    return list(found.values())


def design(
    space: Sequence[Config], works: Sequence[Work], asked: Cell, model: Smoothed, count: int = CONFIGS
) -> tuple[list[Config], list[Work]]:
    """The configs of a search space that are worth timing for a call, and their work: some that may be the best, some
    unlike them."""
    among = candidates(works)
    order = np.argsort(model.times([asked], among)[0], kind="stable")
    chosen = [int(place) for place in order[: max(1, round(LIKELY * count))]]
    strange = apart(among)
    while len(chosen) < min(count, len(space)):
        distance = strange[:, chosen].min(axis=1)
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return [space[place] for place in chosen], [works[place] for place in chosen]


Sample = list[tuple[_Call, dict[str, float]]]  # µs by name of the config


def _timed(
    op: Op,
    calls: Sequence[_Call],
    serving: Dispatcher,
    place: Place,
    clock: Clock | None,
    deadline: float,
    tell: Callable[[str], None],
) -> Sample:
    """Time as many calls as the deadline allows, one after the other. Meanwhile the kernels of later calls compile."""
    assert place.backend is not None
    helpers, found = serving.helpers(place), []
    with shared_inputs.sharing(), _compiled(helpers, op, calls, place.device):
        for done, call in enumerate(calls):
            left = deadline - time.perf_counter()
            if left <= 0:
                break
            tell(f"{done + 1} of {len(calls)}: {call.problem.tokens} tokens, routing {call.problem.routing}")
            only = cast(Op, Only(op, tuple(call.configs)))
            where = call.topk_ids.to(place.torch_device), place.backend, place.device, place.environment
            budget = Budget(left / (len(calls) - done), len(call.configs))
            tuned = tune(only, call.problem, *where, budget=budget, workers=helpers, clock=clock, progress=tell)
            us = {t.config.name: t.median_us for t in tuned.timings if t.status == "ok" and t.median_us is not None}
            if len(us) > 1:
                found.append((call, us))
    return found


@contextlib.contextmanager
def _compiled(helpers: Workers | None, op: Op, calls: Sequence[_Call], device: Device) -> Iterator[None]:
    """Within the block the kernels of all calls are compiled, in order."""
    if helpers is None:
        yield
        return
    for call in calls:
        for config in call.configs:
            compiling(helpers, op, call.problem, config, device)
    try:
        yield
    finally:
        helpers.drop()


# --- the fit ---


def _table(sample: Sample) -> tuple[list[Cell], list[Work], Array]:
    """Cells, works of the configs, and µs [cells, configs]."""
    named = {
        config.name: work
        for call, us in sample
        for config, work in zip(call.configs, call.works, strict=True)
        if config.name in us
    }
    rows = [[us.get(name, np.nan) for name in named] for _, us in sample]
    return [call.cell for call, _ in sample], list(named.values()), np.array(rows)


def _learned(op: Op, sample: Sample, place: Place, model: str) -> Learned:
    cells, works, us = _table(sample)
    about = {"model": model, "moecache": __version__, **place.environment.model_dump()}
    about |= {"calls": str(len(cells)), "timings": str(int(np.isfinite(us).sum()))}
    return learn(op.name, cells, works, us, place.device, about, given(place.device).parameters)


def _regrets(op: Op, sample: Sample, device: Device) -> tuple[Regret, Regret]:
    """Regret of what was known before, and of fits to the other folds."""
    cells, works, us = _table(sample)
    among, before = candidates(works), given(device)
    after = np.full(us.shape, np.inf)
    for timed, asked in _folds(len(cells)):
        part = learn(op.name, [cells[at] for at in timed], works, us[timed], device, {}, before.parameters)
        after[asked] = smoothed(part, device).times([cells[at] for at in asked], among)
    return _regret(before.times(cells, among), us), _regret(after, us)


def _folds(count: int) -> Iterator[tuple[list[int], list[int]]]:
    """(timed, asked) rows, every row asked once."""
    for fold in range(min(FOLDS, count)):
        asked = list(range(fold, count, FOLDS))
        yield [at for at in range(count) if at not in asked], asked


def _regret(predicted: Array, us: Array) -> Regret:
    chosen = np.where(np.isfinite(us), predicted, np.inf).argmin(axis=1)
    lost = us[np.arange(len(us)), chosen] / np.nanmin(us, axis=1) - 1
    return Regret(round(100 * float(lost.mean()), 2), round(100 * float(lost.max()), 2))


# --- in words ---


def facts(found: Profiled) -> list[tuple[str, str]]:
    """What was timed, what it is worth, and what was fitted for all kernels."""
    p, left = found.learned.parameters, f"; {found.left} calls left out, the budget was spent" if found.left else ""
    return [
        ("device", found.device.name),
        ("layer", f"{found.learned.about['model']}, {found.learned.layer}"),
        ("timed", f"{found.timings} configs of {found.calls} calls in {found.seconds:.0f} s{left}"),
        ("before", f"regret {found.before.mean:.2f} %, at most {found.before.max:.2f} %"),
        ("now", f"regret {found.after.mean:.2f} %, at most {found.after.max:.2f} %, each call by a fit to the others"),
        ("bandwidth", f"{p.bandwidth:.3f} of {found.device.bandwidth_gbs:g} GB/s"),
        ("reread", f"{p.reread:.2f}"),
        ("early", f"{p.early:.2f}"),
    ]


def kernels(found: Profiled) -> Table:
    """What was fitted for each kernel."""
    p = found.learned.parameters
    fields = list(type(next(iter(p.kernels.values()))).model_fields)
    columns = [Column("kernel"), *(Column(name, right=True) for name in fields)]
    rows = [[name, *(f"{getattr(kernel, field):.3g}" for field in fields)] for name, kernel in p.kernels.items()]
    return Table(columns, rows)


def _silent(message: str) -> None:
    """Nobody wants to know."""
