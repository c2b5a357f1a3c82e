"""Fits the model to timings: its parameters, the body factors of compiled tiles, and what they leave over.

Choosing wants the good configs told apart, so a timing counts less the slower it is beside the best of its call.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moecache.predict import model
from moecache.predict.learned import DIGITS, Learned, layer_of
from moecache.predict.parameters import OWN, SHARED, Kernel, Parameters, zero_shot
from moecache.predict.products import Array, Candidates, candidates, products
from moecache.predict.ranking import alike_cells, alike_configs, features
from moecache.predict.work import Cell, Work
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput

SLOW = 0.08  # a config slower than the best by this share counts half
ACCURACY = 1 / 60  # relative, of the differences between the configs of a call
LEVEL = 0.3  # what the error that all configs of a call share counts beside: it does not change their order
TRUST = 0.7, 0.05  # how far parameters and body factors go from their start, natural log
ROUNDS = 20  # of the fit at most
STEP = 1e-4  # of its differences, natural log
LEFTOVER, NOISE = 0.05, 0.03  # relative size of leftovers, and of what is not worth carrying in the best's
TURNS = 60  # of the solver of leftovers at most
EXACT = 1e-5  # of its result


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
        start: from where, and near which; the constants of the device otherwise. Kernels that nobody timed stay so.

    Raises:
        InvalidInput: a kernel that `start` does not know, or timings that say nothing.
    """
    start = start or zero_shot(device)
    fitting = _Fitting(cells, among, us, device, start)
    spread = np.repeat(TRUST, (len(fitting.first) - len(fitting.bodies), len(fitting.bodies)))
    solved = np.exp(_descend(fitting.residuals, fitting.slopes, fitting.first, spread))
    found = {name: float(f"{value:.4g}") for name, value in zip(fitting.names, solved, strict=True)}
    kernels = {name: Kernel(**{field: found[name, field] for field in OWN}) for name in fitting.kernels}
    factors = {name: found["body", name] for name in fitting.bodies}
    changed = {name: found["", name] for name in SHARED}
    return start.model_copy(
        update=changed | {"kernels": start.kernels | kernels, "bodies": start.bodies | factors, "arch": device.arch}
    )


def learn(
    op: str,
    cells: Sequence[Cell],
    works: Sequence[Work],
    us: Array,
    device: Device,
    about: dict[str, str],
    start: Parameters | None = None,
) -> Learned:
    """Fit timings [cells, configs] in µs, NaN where there is none.

    Args:
        about: what a reader should know of the timings. start: see `fit`.

    Raises:
        InvalidInput: see `fit`.
    """
    among, layers = candidates(works), {layer_of(cell) for cell in cells}
    found = fit(cells, among, us, device, start)
    left = leftovers(found, device, cells, among, us)
    return Learned(
        op=op,
        layer=layers.pop() if len(layers) == 1 else "",
        about=about,
        parameters=found,
        works=list(works),
        calls=np.round(features(cells), DIGITS).tolist(),
        leftovers=np.round(left, DIGITS).tolist(),
    )


class _Fitting:
    """Weighted log errors of all timings as a function of log parameters: SHARED, then OWN of each kernel, then the
    factors of the bodies."""

    def __init__(self, cells: Sequence[Cell], among: Candidates, us: Array, device: Device, start: Parameters) -> None:
        if not {*among.kernels[0], *among.kernels[1]} <= start.kernels.keys():
            asked = ", ".join(sorted({*among.kernels[0], *among.kernels[1]}))
            raise InvalidInput(f"kernels {asked}, known are {', '.join(start.kernels)}")
        self.kernels = sorted({*among.kernels[0], *among.kernels[1]})
        self.bodies = sorted({*among.bodies[0], *among.bodies[1]})
        self._kernel = [np.array([self.kernels.index(name) for name in part]) for part in among.kernels]
        self._body = [np.array([self.bodies.index(name) for name in part]) for part in among.bodies]
        self._cells, self._among, self._device = cells, among, device
        self._work, self._whole = products(cells, among, device), model.whole(cells)
        self._weights, self._log = weights(us), np.log(np.where(np.isfinite(us), us, 1.0))
        known = {("", name): getattr(start, name) for name in SHARED}
        known |= {(kernel, name): getattr(start.kernels[kernel], name) for kernel in self.kernels for name in OWN}
        self._before = len(known)  # the first factor
        known |= {("body", name): start.bodies.get(name, 1.0) for name in self.bodies}
        self.names, self.first = list(known), np.log([*known.values()])

    def _times(self, x: Array) -> tuple[Array, Array, Array]:
        """µs of `up`, of `down` where it counts, and of the rest."""
        values = np.exp(x)
        shared = dict(zip(SHARED, values, strict=False))
        own, factors = values[len(SHARED) : self._before].reshape(-1, len(OWN)), values[self._before :]
        begun = model.starts(shared["early"], self._among)
        found = []
        for w, kernel, body in zip(self._work, self._kernel, self._body, strict=True):
            mine = {name: own[kernel, at][None, :] for at, name in enumerate(OWN)}
            mine["start_us"] = mine["start_us"] * begun
            found.append(model.gemm(shared, mine, w, self._device, factors[body]).us)
        around = model.around_us(shared["early"], self._cells, self._among, self._device)
        return found[0], self._whole * found[1], around

    def residuals(self, x: Array) -> Array:
        up, down, other = self._times(x)
        return self._counted(np.log(up + down + other) - self._log)

    def _counted(self, error: Array) -> Array:
        """Errors [cells, configs] as the fit counts them: against the mean of their call, then these means."""
        mean = (self._weights * error).sum(axis=1, keepdims=True)
        return np.concatenate([np.ravel(np.sqrt(self._weights) * (error - mean)), LEVEL * np.ravel(mean)]) / ACCURACY

    def slopes(self, x: Array) -> Array:
        """Of the residuals: by differences for parameters, one of all kernels at a time; for a factor, the share of
        the time that it scales."""
        base = self._times(x)
        total = base[0] + base[1] + base[2]
        columns = np.zeros((total.size + len(total), len(x)))
        for at in range(len(SHARED)):
            up, down, other = self._times(x + STEP * (np.arange(len(x)) == at))
            columns[:, at] = self._counted((up + down + other - total) / (STEP * total))
        every = np.arange(len(SHARED), self._before).reshape(-1, len(OWN))
        for places in every.T:
            moved = self._times(x + STEP * np.isin(np.arange(len(x)), places))
            parts = [(new - old) / (STEP * total) for new, old in zip(moved, base, strict=True)][:2]
            for kernel, at in enumerate(places):
                columns[:, at] = self._of(parts, self._kernel, kernel)
        gemms = [base[0] / total, base[1] / total]
        for body in range(len(self.bodies)):
            columns[:, self._before + body] = self._of(gemms, self._body, body)
        return columns

    def _of(self, parts: Sequence[Array], which: Sequence[Array], index: int) -> Array:
        """What the halves with that kernel or body count."""
        up, down = (part * (mine == index) for part, mine in zip(parts, which, strict=True))
        return self._counted(up + down)


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
        if before - error @ error < 1e-4 * before:
            break
    return x


def leftovers(p: Parameters, device: Device, cells: Sequence[Cell], among: Candidates, us: Array) -> Array:
    """[cells, configs] weights of the timings [cells, configs] in µs, NaN where there is none, in what is left over."""
    w = weights(us)
    seen = w > 0
    error = np.where(seen, np.log(np.where(seen, us, 1.0)) - np.log(model.times(p, device, cells, among)), 0.0)
    left = np.where(seen, error - (w * error).sum(axis=1, keepdims=True), 0.0)
    calls, configs = alike_cells(features(cells), features(cells)), alike_configs(among, among)
    trust = np.sqrt(w / w.max(axis=1, keepdims=True))  # a slow config's leftover is not worth as much
    noise = (NOISE / LEFTOVER) ** 2
    solved: Array = trust * _solve(lambda x: trust * (calls @ (trust * x) @ configs) + noise * x, trust * left)
    return solved


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
