"""What the fitted model leaves over at timed calls, carried to others: the more, the more alike calls and configs are.

A Gaussian process over calls x configs. Leftovers are relative to their call: whole calls are not corrected.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from moecache.costmodel import model
from moecache.costmodel.fitting import weights
from moecache.costmodel.parameters import Parameters
from moecache.costmodel.work import Array, Candidates, Cell
from moecache.schemas.device import Device

REACH = 2.0  # octaves of what Cell.features says over which leftovers are alike
SIMILAR = 3.0  # octaves of tile sizes over which they are alike
APART = 2.0  # of a flag that is set on one side alone, in units of the same
OWN = 0.7  # share of a leftover that only this config has
LEFTOVER, NOISE = 0.05, 0.03  # relative size of leftovers, and of what is not worth carrying in the best's
SIZES = ("m", "n", "k", "group", "warps", "stages")
TURNS = 60  # of the solver at most
EXACT = 1e-5


class Smoothed:
    """The model, corrected by what it left over at timed calls.

    Args:
        features: [calls, 3] of the timed calls, as Cell has them. among: the timed configs.
        solved: [calls, configs] what `leftovers` found.
    """

    def __init__(self, p: Parameters, device: Device, features: Array, among: Candidates, solved: Array) -> None:
        self.parameters, self.device = p, device
        self._features, self._among, self._solved = features, among, solved
        self._last: Candidates | None = None

    def times(self, cells: Sequence[Cell], among: Candidates) -> Array:
        """[cells, configs] µs."""
        if among is not self._last:  # a search space is asked again and again
            self._last, self._alike = among, self._solved @ _alike_configs(self._among, among)
        left: Array = _alike_cells(features(cells), self._features) @ self._alike
        return model.times(self.parameters, self.device, cells, among) * np.exp(left)


def features(cells: Sequence[Cell]) -> Array:
    """[cells, 3] where calls lie."""
    return np.array([each.features for each in cells])


def leftovers(p: Parameters, device: Device, cells: Sequence[Cell], among: Candidates, us: Array) -> Array:
    """[cells, configs] weights of the timings [cells, configs] in µs, NaN where there is none, in what is left over."""
    w = weights(us)
    seen = w > 0
    error = np.where(seen, np.log(np.where(seen, us, 1.0)) - np.log(model.times(p, device, cells, among)), 0.0)
    left = np.where(seen, error - (w * error).sum(axis=1, keepdims=True), 0.0)
    calls, configs = _alike_cells(features(cells), features(cells)), _alike_configs(among, among)
    trust = np.sqrt(w / w.max(axis=1, keepdims=True))  # a slow config's leftover is not worth as much
    noise = (NOISE / LEFTOVER) ** 2
    solved: Array = trust * _solve(lambda x: trust * (calls @ (trust * x) @ configs) + noise * x, trust * left)
    return solved


def apart(among: Candidates) -> Array:
    """[configs, configs] how little two configs have in common: 0 for the same, 1 for others."""
    return 1 - _alike_configs(among, among)


def _solve(product: Callable[[Array], Array], target: Array) -> Array:
    """x with product(x) = target, for a symmetric positive product: conjugate gradients."""
    x, rest = np.zeros_like(target), target
    step, size = rest, (rest * rest).sum()
    enough = EXACT**2 * size
    for _ in range(TURNS):
        if size <= enough:
            break
        image = product(step)
        length = size / (step * image).sum()
        x, rest = x + length * step, rest - length * image
        size, last = (rest * rest).sum(), size
        step = rest + size / last * step
    return x


def _alike_cells(a: Array, b: Array) -> Array:
    return _bell(a / REACH, b / REACH)


def _alike_configs(a: Candidates, b: Candidates) -> Array:
    same = [np.array(mine)[:, None] == np.array(other) for mine, other in zip(a.kernels, b.kernels, strict=True)]
    equal = np.array(a.names)[:, None] == np.array(b.names)
    return np.asarray(((1 - OWN) * _bell(_places(a), _places(b)) + OWN * equal) * same[0] * same[1])


def _places(among: Candidates) -> Array:
    """[configs, places] where the two tiles of each config lie; halved, as both usually change together."""
    found = []
    for part in (among.up, among.down):
        found += [np.log2(part[name][0]) / SIMILAR for name in SIZES]
        found += [np.log2(part["m"][0] / part["low"][0]) / SIMILAR]
        found += [APART * part["swap"][0], APART * (part["parts"][0] - 1)]
    apart = [APART * flag[0] for flag in among.flags.values()]
    return np.stack([*(each / math.sqrt(2) for each in found), *apart], axis=1)


def _bell(a: Array, b: Array) -> Array:
    return np.asarray(np.exp(-0.5 * ((a[:, None] - b[None]) ** 2).sum(axis=-1)))
