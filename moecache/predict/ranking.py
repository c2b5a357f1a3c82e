"""Predicted µs of a search space, the same way for every op.

Grouped products take, in this order, what was fitted to the layer here, which the user's cache file keeps, what the
package ships for the architecture, what was fitted to another layer here, and the device's constants. What a fitted
model leaves over at timed calls is carried to others: the more, the more alike calls and
configs are, as in a Gaussian process over calls x configs. Leftovers are relative to their call: whole calls are not
corrected.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from moecache.predict.calls import call
from moecache.predict.learned import Learned, layer_of, parse, shipped
from moecache.predict.model import times
from moecache.predict.parameters import Parameters, zero_shot
from moecache.predict.products import Array, Candidates, candidates
from moecache.predict.rates import alone_us
from moecache.predict.work import Cell, Tile, Work
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem
from moecache.schemas.timing import By

FITTED = ("fused_moe",)  # ops whose timings stand behind fitted parameters
DTYPES = ("bf16", "fp16")  # and theirs
NAMES: dict[By, str] = {
    "fitted": "the cost model, fitted to timings here",
    "shipped": "the cost model, with its shipped parameters",
    "constants": "the cost model, with the device's constants",
    "cost": "the cost that it was wrapped with",
}

REACH = 2.0  # octaves of `features` over which leftovers are alike
SIMILAR = 3.0  # octaves of tile sizes over which they are alike
APART = 2.0  # of a flag that is set on one side alone, in units of the same
ALONE = 0.7  # share of a leftover that only this config has
SIZES = ("m", "n", "k", "group", "warps", "stages")


class Smoothed:
    """The model, corrected by what it left over at timed calls.

    Args:
        features: [calls, 3] of the timed calls. among: the timed configs.
        solved: [calls, configs] what `leftovers` found.
    """

    def __init__(self, p: Parameters, device: Device, features: Array, among: Candidates, solved: Array) -> None:
        self.parameters, self.device = p, device
        self._features, self._among, self._solved = features, among, solved
        self._last: Candidates | None = None

    def timed(self, among: Candidates) -> bool:
        """Whether timings of all kernels of these configs stand behind the model."""
        known, asked = ({*each.kernels[0], *each.kernels[1]} for each in (self._among, among))
        return asked <= known

    def times(self, cells: Sequence[Cell], among: Candidates) -> Array:
        """[cells, configs] µs."""
        if among is not self._last:  # a search space is asked again and again
            self._last, self._alike = among, self._solved @ alike_configs(self._among, among)
        left: Array = alike_cells(features(cells), self._features) @ self._alike
        return times(self.parameters, self.device, cells, among) * np.exp(left)


def smoothed(found: Learned, device: Device) -> Smoothed:
    """What was learnt, on a device of that kind."""
    calls, left = np.array(found.calls), np.array(found.leftovers)
    return Smoothed(found.parameters, device, calls, candidates(found.works), left)


def features(cells: Sequence[Cell]) -> Array:
    """[cells, 3] where calls lie, in octaves: rows of an active expert, and how much there is of `up` and of `down`,
    active experts times columns. Layers of other shapes are near where these are."""
    sizes = [(sum(c.counts), np.count_nonzero(c.counts), c.wide, c.hidden) for c in cells]
    rows, active, wide, hidden = np.array(sizes, dtype=float).T
    return np.stack([np.log2(rows / active), np.log2(active * wide / 2), np.log2(active * hidden)], axis=1)


def alike_cells(a: Array, b: Array) -> Array:
    return _bell(a / REACH, b / REACH)


def alike_configs(a: Candidates, b: Candidates) -> Array:
    same = [np.array(mine)[:, None] == np.array(other) for mine, other in zip(a.kernels, b.kernels, strict=True)]
    known = {work: place for place, work in enumerate(dict.fromkeys([*a.works, *b.works]))}
    equal = np.array([known[work] for work in a.works])[:, None] == np.array([known[work] for work in b.works])
    return np.asarray(((1 - ALONE) * _bell(_places(a), _places(b)) + ALONE * equal) * same[0] * same[1])


def _places(among: Candidates) -> Array:
    """[configs, places] where the two tiles of each config lie; halved, as both usually change together."""
    found = []
    for part in among.tiles:
        found += [np.log2(part[name][0]) / SIMILAR for name in SIZES]
        found += [np.log2(part["m"][0] / part["low"][0]) / SIMILAR]
        found += [APART * part["swap"][0], APART * (part["parts"][0] - 1)]
    apart = [APART * among.around[flag][0] for flag in ("early", "atomic")]
    return np.stack([*(each / math.sqrt(2) for each in found), *apart], axis=1)


def _bell(a: Array, b: Array) -> Array:
    return np.asarray(np.exp(-0.5 * ((a[:, None] - b[None]) ** 2).sum(axis=-1)))


class Working(Protocol):
    """What a ranking asks of an op."""

    name: str

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        """What a config makes a device do for a problem."""


@dataclass(frozen=True)
class Ranking:
    """µs of every config in their order, not finite where nothing is predicted; and whose parameters predicted them."""

    us: tuple[float, ...]
    by: By

    @property
    def best(self) -> int | None:
        """The place of the lowest time; None where nothing is predicted."""
        finite = [place for place, us in enumerate(self.us) if math.isfinite(us)]
        return min(finite, key=self.us.__getitem__, default=None)


def rank(
    op: Working, problem: Problem, configs: Sequence[Config], device: Device, kept: Sequence[tuple[str, str]] = ()
) -> Ranking:
    """Predict the time of every config for one problem; takes milliseconds.

    Args:
        kept: (layer, what was learnt) of this op on such devices, from the cache files.
    """
    works = tuple(op.work(problem, config, device) for config in configs)
    return _ranked(works, problem, device, tuple(kept))


def fitted_to(problem: Problem) -> bool:
    """Whether fitted parameters saw timings of such problems: elsewhere they are as good as constants."""
    return problem.op in FITTED and problem.dtype in DTYPES and not problem.dim("quant", "")


def given(device: Device) -> Smoothed:
    """The model before anything is learnt here."""
    return _shipped(device) or _constant(device)


@lru_cache(maxsize=256)
def _ranked(works: tuple[Work, ...], problem: Problem, device: Device, kept: tuple[tuple[str, str], ...]) -> Ranking:
    if all(work.us is not None for work in works):
        return Ranking(tuple(math.inf if work.us is None else work.us for work in works), "cost")
    if all(work.up is None for work in works):
        return Ranking(tuple(alone_us(work, device) for work in works), "constants")
    try:
        among, asked = candidates(works), call(problem)
    except InvalidInput:  # no tokens, or no draw gives distinct experts
        return Ranking((math.inf,) * len(works), "constants")
    fitting = (found for found in _fitted(layer_of(asked), device, kept) if found[0].timed(among))
    model, by = next(fitting, (_constant(device), "constants"))
    return Ranking(tuple(model.times([asked], among)[0].tolist()), by)


def _fitted(layer: str, device: Device, kept: Sequence[tuple[str, str]]) -> Iterator[tuple[Smoothed, By]]:
    """What may predict before the constants, the best first: a layer's own, what the package brings, another's."""
    found = [(name == layer, model) for name, text in kept if (model := _kept(text, device))]
    yield from ((model, "fitted") for own, model in found if own)
    if (brought := _shipped(device)) is not None:
        yield brought, "shipped"
    yield from ((model, "fitted") for own, model in found if not own)


@lru_cache(maxsize=8)
def _kept(text: str, device: Device) -> Smoothed | None:
    found = parse(text)
    return None if found is None else smoothed(found, device)


@lru_cache(maxsize=8)
def _constant(device: Device) -> Smoothed:
    """The model without leftovers."""
    nothing = candidates([Work(Tile("none", 1, 16, 16))])
    return Smoothed(zero_shot(device), device, np.zeros((0, 3)), nothing, np.zeros((0, 1)))


@lru_cache(maxsize=8)
def _shipped(device: Device) -> Smoothed | None:
    found = shipped(device.arch)
    return None if found is None else smoothed(found, device)
