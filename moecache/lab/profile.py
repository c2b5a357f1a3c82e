"""Teaches the cost model one layer on this device: times a designed sample of calls, fits, keeps what was learnt.

Afterwards the fitted model answers those problems of the layer that nobody has tuned. Nothing is stored as a
measurement, as the sample tries few configs of each call.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from moecache.lab.regret import regrets
from moecache.predict.calls import cell
from moecache.predict.learned import Learned
from moecache.predict.parameters import VERSION
from moecache.predict.products import Array, candidates
from moecache.predict.ranking import DTYPES, FITTED, Smoothed, alike_configs, fitted_to, given, smoothed
from moecache.predict.work import Cell, Work
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem
from moecache.tuning.candidates import Only
from moecache.tuning.run import Budget
from moecache.tuning.timing import Clock
from moecache.tuning.tuner import tune
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
class Profiled:
    """What a profile found. Regrets are of the sample, in per cent: (mean, maximum).

    Attributes:
        device: name of the device.
        layer: what was learnt of, see `predict.learned.layer_of`.
        calls: number of calls that were timed.
        timings: number of configs that were timed, over all calls.
        left: number of calls that the budget did not reach.
        before: regret of what ships.
        after: regret of the fit. The config of each call is chosen by a fit to the other calls.
        seconds: how long it took.
    """

    device: str
    layer: str
    calls: int
    timings: int
    left: int
    before: tuple[float, float]
    after: tuple[float, float]
    seconds: float

    def facts(self) -> list[tuple[str, str]]:
        """In words."""
        left = f"; {self.left} calls left out, the budget was spent" if self.left else ""
        told = "regret {:.2f} %, at most {:.2f} %"
        return [
            ("device", self.device),
            ("layer", self.layer),
            ("timed", f"{self.timings} configs of {self.calls} calls in {self.seconds:.0f} s{left}"),
            ("before", told.format(*self.before)),
            ("now", f"{told.format(*self.after)}, each call by a fit to the others"),
        ]


@dataclass(frozen=True)
class _Call:
    problem: Problem
    topk_ids: torch.Tensor  # on the CPU
    cell: Cell
    configs: list[Config]
    works: list[Work]


def profile(
    layer: Layer,
    *,
    tokens: Sequence[int] = TOKENS,
    op: Op | None = None,
    budget: float = SECONDS,
    clock: Clock | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Profiled:
    """Time a sample of a layer's calls on this device, fit the cost model to it, and keep it in the user's cache file.

    Args:
        tokens: token counts of the sample.
        op: the op to profile; default: fused_moe.
        budget: seconds for all of it.
        clock: replaces the device's clock, for tests.
        progress: called with a line of text for each step.

    Raises:
        InvalidInput: the cost model does not know the op or its dtype on this device; the mode is not tune; a graph is
            being captured; the budget was too short.
    """
    serving, began = dispatcher(), time.perf_counter()
    place, op = serving.places.first(0), op or ops.get("fused_moe")
    if serving.settings.mode != "tune":
        raise InvalidInput(f"cannot profile: mode={serving.settings.mode}")
    calls = _calls(op, layer, tokens, place.device)
    sample = _timed(op, calls, serving, place, clock, began + TIMING * budget, progress)
    if len(sample) < LEAST:
        raise InvalidInput(f"{len(sample)} of {len(calls)} calls timed within {budget:g} s; {LEAST} are needed")
    progress(f"fitting {len(sample)} calls")
    cells, works, us = _table(sample)
    about = {"model": layer.model, "moecache": __version__, **place.environment.model_dump()}
    about |= {"calls": str(len(cells)), "timings": str(timings := int(np.isfinite(us).sum()))}
    found = learn(op.name, cells, works, us, place.device, about, given(place.device).parameters)
    kept = op.name, place.device, found.layer, VERSION, found.model_dump_json()
    serving.lookup.tiers.write(lambda store: store.learn(*kept))
    serving.reload()
    before = given(place.device).times(cells, candidates(works))
    after, left = _by_others(op.name, cells, works, us, place.device), len(calls) - len(cells)
    scores, spent = (_regret(before, us), _regret(after, us)), time.perf_counter() - began
    return Profiled(place.device.name, found.layer, len(cells), timings, left, *scores, spent)


# --- the sample ---


def _calls(op: Op, layer: Layer, tokens: Sequence[int], device: Device) -> list[_Call]:
    """The calls to time, each with the configs to time. The routing that teaches most comes first. None comes twice."""
    found: dict[tuple[int, tuple[int, ...]], _Call] = {}
    problems = op.problems(layer, tokens, device)
    if not problems:
        why = op.left_out(layer, tokens, device)
        raise InvalidInput(f"{op.name} has no problem of {layer.model} on {device.name}{why and ': '}{why}")
    for generator in ROUTINGS:
        for problem in problems:
            space = op.space(problem, device)
            gated, works = problem.dim("gated", 1), [op.work(problem, config, device) for config in space]
            if not gated or not fitted_to(problem) or any(work.up is None for work in works):
                kind = (problem.dim("quant", "") or problem.dtype) + ("" if gated else " without a gate")
                raise InvalidInput(
                    f"cannot profile {op.name} in {kind} on {device.name}: the cost model is fitted to GPU kernels of "
                    f"{', '.join(FITTED)} in {', '.join(DTYPES)} with a gate alone"
                )
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
    apart = 1 - alike_configs(among, among)
    while len(chosen) < min(count, len(space)):
        distance = apart[:, chosen].min(axis=1)
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
    progress: Callable[[str], None],
) -> Sample:
    """Time as many calls as the deadline allows, one after the other. Meanwhile the kernels of later calls compile."""
    assert place.backend is not None
    helpers, found = serving.helpers(place), []
    with shared_inputs.sharing(), contextlib.ExitStack() as ending:
        if helpers is not None:
            ending.callback(helpers.drop)
            for call in calls:
                for config in call.configs:
                    helpers.compile(op.sources(call.problem, config, place.device), place.device)
        for done, call in enumerate(calls):
            left = deadline - time.perf_counter()
            if left <= 0:
                break
            progress(f"{done + 1} of {len(calls)}: {call.problem.tokens} tokens, routing {call.problem.routing}")
            only = cast(Op, Only(op, tuple(call.configs)))
            where = call.topk_ids.to(place.torch_device), place.backend, place.device, place.environment
            budget = Budget(left / (len(calls) - done), len(call.configs))
            tuned = tune(only, call.problem, *where, budget=budget, workers=helpers, clock=clock, progress=progress)
            us = {t.config.name: t.median_us for t in tuned.timings if t.status == "ok" and t.median_us is not None}
            if len(us) > 1:
                found.append((call, us))
    return found


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


def _by_others(op: str, cells: Sequence[Cell], works: Sequence[Work], us: Array, device: Device) -> Array:
    """µs [cells, configs] that fits to the other folds predict."""
    found, among, rows = np.empty(us.shape), candidates(works), np.arange(len(cells))
    for fold in range(min(FOLDS, len(cells))):
        timed, asked = rows[rows % FOLDS != fold], rows[rows % FOLDS == fold]
        part: Learned = learn(op, [cells[at] for at in timed], works, us[timed], device, {}, given(device).parameters)
        found[asked] = smoothed(part, device).times([cells[at] for at in asked], among)
    return found


def _regret(predicted: Array, us: Array) -> tuple[float, float]:
    lost = 100 * regrets(us, np.where(np.isfinite(us), predicted, np.inf).argmin(axis=1))
    return round(float(lost.mean()), 2), round(float(lost.max()), 2)
