"""Fits the model to timings: its parameters and body factors, then what is left over, smoothed among similar calls.

Choosing wants the good configs told apart, so a timing counts less the slower it is beside the best of its call.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from moecache.costmodel import model
from moecache.costmodel.model import SHARED, Parameters
from moecache.costmodel.work import Array, Candidates, Cell, products
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput

SLOW = 0.08  # a config slower than the best by this share counts half
ACCURACY = 1 / 60  # relative, of the differences between the configs of a call
LEVEL = 0.3  # what the error that all configs of a call share counts beside: it does not change their order
TRUST = 0.7, 0.05  # how far parameters and body factors go from their start, natural log
ROUNDS = 20  # of the fit at most
STEP = 1e-4  # of its differences, natural log

REACH = 2.0  # octaves of tokens, active experts, … over which leftovers are alike
SIMILAR = 3.0  # octaves of tile sizes over which they are alike
OWN = 0.3  # share of a leftover that only this config has
LEFTOVER, NOISE = 0.05, 0.03  # relative size of leftovers and of one timing's error
SIZES = ("m", "n", "k", "group", "warps", "stages")


def weights(us: Array) -> Array:
    """[cells, configs] what each timing counts; those of a cell add up to 1, a missing one (NaN) counts 0."""
    seen = np.isfinite(us)
    if us.ndim != 2 or not seen.any(axis=1).all():
        raise InvalidInput(f"timings of shape {list(us.shape)}; allowed is [cells, configs] with one timing a cell")
    best = np.nanmin(us, axis=1, keepdims=True)
    if not (best > 0).all():
        raise InvalidInput(f"the fastest timing is {best.min():g} µs; allowed is more than 0")
    found = np.where(seen, 1 / (1 + (np.where(seen, us, best) / best - 1) / SLOW), 0.0)
    scaled: Array = found / found.sum(axis=1, keepdims=True)
    return scaled


def fit(
    cells: Sequence[Cell], among: Candidates, us: Array, device: Device, start: Parameters | None = None
) -> Parameters:
    """Parameters for timings [cells, configs] in µs, NaN where there is none.

    Args:
        start: from where, and near which; the constants of the device otherwise.
    """
    start = start or model.zero_shot(device, among.variants[0])
    fitting = _Fitting(cells, among, us, device)
    named = [getattr(start, name) for name in SHARED] + [start.bodies.get(name, 1.0) for name in fitting.bodies]
    spread = np.repeat(TRUST, (len(SHARED), len(fitting.bodies)))
    x = np.exp(_descend(fitting.residuals, fitting.slopes, np.log(named), spread))
    found = dict(zip([*SHARED, *fitting.bodies], (float(f"{value:.4g}") for value in x), strict=True))
    factors = start.bodies | {name: found[name] for name in fitting.bodies}
    return start.model_copy(update={name: found[name] for name in SHARED} | {"bodies": factors})


class _Fitting:
    """Weighted log errors of all timings as a function of log parameters and log factors."""

    def __init__(self, cells: Sequence[Cell], among: Candidates, us: Array, device: Device) -> None:
        self.bodies = sorted({*among.bodies[0], *among.bodies[1]})
        self._body = [np.array([self.bodies.index(name) for name in part]) for part in among.bodies]
        self._work, self._device = products(cells, among, device), device
        self._whole, self._other = model.whole(cells), model.other_us(cells, device)
        self._weights, self._log = weights(us), np.log(np.where(np.isfinite(us), us, 1.0))

    def _halves(self, x: Array) -> tuple[Array, Array]:
        """µs of `up`, and of `down` where it counts."""
        p, factors = dict(zip(SHARED, np.exp(x), strict=False)), np.exp(x[len(SHARED) :])
        up, down = (model.gemm(p, w, self._device, factors[b]).us for w, b in zip(self._work, self._body, strict=True))
        return up, self._whole * down

    def residuals(self, x: Array) -> Array:
        up, down = self._halves(x)
        return self._counted(np.log(up + down + self._other) - self._log)

    def _counted(self, error: Array) -> Array:
        """Errors [cells, configs] as the fit counts them: against the mean of their call, then these means."""
        mean = (self._weights * error).sum(axis=1, keepdims=True)
        return np.concatenate([np.ravel(np.sqrt(self._weights) * (error - mean)), LEVEL * np.ravel(mean)]) / ACCURACY

    def slopes(self, x: Array) -> Array:
        """Of the residuals: by differences for parameters; for a factor, the share of the time that it scales."""
        base, (up, down) = self.residuals(x), self._halves(x)
        columns = [(self.residuals(x + STEP * unit) - base) / STEP for unit in np.eye(len(x))[: len(SHARED)]]
        start, total = np.exp(x[SHARED.index("start_us")]), up + down + self._other
        first, second = (up - start) / total, (down - self._whole * start) / total
        for body in range(len(self.bodies)):
            share = first * (self._body[0] == body) + second * (self._body[1] == body)
            columns.append(self._counted(share))
        return np.stack(columns, axis=1)


def _descend(
    residuals: Callable[[Array], Array], slopes: Callable[[Array], Array], first: Array, spread: Array
) -> Array:
    """Least squares with a pull to `first`, by Levenberg's and Marquardt's method."""
    x, damping = first, 1e-2

    def errors(x: Array) -> Array:
        return np.concatenate([residuals(x), (x - first) / spread])

    error = errors(x)
    for _ in range(ROUNDS):
        slope = np.concatenate([slopes(x), np.diag(1 / spread)])
        normal, gradient = slope.T @ slope, slope.T @ error
        before = error @ error
        for _ in range(8):
            step = -np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            tried = errors(x + step)
            if tried @ tried < before:
                x, error, damping = x + step, tried, damping / 5
                break
            damping *= 4
        if before - error @ error < 1e-6 * before:
            break
    return x


class Smoothed:
    """The model, corrected by what it left over at timed calls: the more, the more alike calls and configs are.

    A Gaussian process over calls x configs. Leftovers are relative to their call: whole calls are not corrected.
    """

    def __init__(self, p: Parameters, device: Device, cells: Sequence[Cell], among: Candidates, us: Array) -> None:
        self.parameters, self.device, self._cells, self._among = p, device, cells, among
        w = weights(us)
        error = np.where(w > 0, np.log(np.where(w > 0, us, 1.0)) - np.log(model.times(p, device, cells, among)), 0.0)
        left = np.where(w > 0, error - (w * error).sum(axis=1, keepdims=True), 0.0)
        a, u = np.linalg.eigh(_alike_cells(cells, cells))
        b, v = np.linalg.eigh(_alike_configs(among, among))
        solved = u @ ((u.T @ left @ v) / (a[:, None] * b + (NOISE / LEFTOVER) ** 2)) @ v.T
        self._solved, self._last = solved, among
        self._alike = solved @ _alike_configs(among, among)  # kept: a search space is asked again and again

    def times(self, cells: Sequence[Cell], among: Candidates) -> Array:
        """[cells, configs] µs."""
        if among is not self._last:
            self._last, self._alike = among, self._solved @ _alike_configs(self._among, among)
        left: Array = _alike_cells(cells, self._cells) @ self._alike
        return model.times(self.parameters, self.device, cells, among) * np.exp(left)


def _alike_cells(a: Sequence[Cell], b: Sequence[Cell]) -> Array:
    return _bell(np.array([each.features for each in a]) / REACH, np.array([each.features for each in b]) / REACH)


def _alike_configs(a: Candidates, b: Candidates) -> Array:
    same = np.array(a.variants)[:, None] == np.array(b.variants)
    equal = np.array(a.names)[:, None] == np.array(b.names)
    return np.asarray(((1 - OWN) * _bell(_places(a), _places(b)) + OWN * equal) * same)


def _places(among: Candidates) -> Array:
    """[configs, 12] where the two tiles of each config lie; halved, as both usually change together."""
    sizes: Array = np.stack([np.log2(part[name][0]) for part in (among.up, among.down) for name in SIZES], axis=1)
    return sizes / (SIMILAR * math.sqrt(2))


def _bell(a: Array, b: Array) -> Array:
    return np.asarray(np.exp(-0.5 * ((a[:, None] - b[None]) ** 2).sum(axis=-1)))
