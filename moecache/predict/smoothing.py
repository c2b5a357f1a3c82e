"""What the fitted model leaves over at timed calls, carried to others: the more, the more alike calls and configs are.

A Gaussian process over calls x configs. Leftovers are relative to their call: whole calls are not corrected.
"""

import math
from collections.abc import Sequence

import numpy as np

from moecache.predict import model
from moecache.predict.learned import Learned
from moecache.predict.parameters import Parameters
from moecache.predict.products import Array, Candidates, candidates
from moecache.predict.work import Cell
from moecache.schemas.device import Device

REACH = 2.0  # octaves of `features` over which leftovers are alike
SIMILAR = 3.0  # octaves of tile sizes over which they are alike
APART = 2.0  # of a flag that is set on one side alone, in units of the same
OWN = 0.7  # share of a leftover that only this config has
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
        return model.times(self.parameters, self.device, cells, among) * np.exp(left)


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


def apart(among: Candidates) -> Array:
    """[configs, configs] how little two configs have in common: 0 for the same, 1 for others."""
    return 1 - alike_configs(among, among)


def alike_cells(a: Array, b: Array) -> Array:
    return _bell(a / REACH, b / REACH)


def alike_configs(a: Candidates, b: Candidates) -> Array:
    same = [np.array(mine)[:, None] == np.array(other) for mine, other in zip(a.kernels, b.kernels, strict=True)]
    known = {work: place for place, work in enumerate(dict.fromkeys([*a.works, *b.works]))}
    equal = np.array([known[work] for work in a.works])[:, None] == np.array([known[work] for work in b.works])
    return np.asarray(((1 - OWN) * _bell(_places(a), _places(b)) + OWN * equal) * same[0] * same[1])


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
