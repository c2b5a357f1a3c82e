"""RaMP's cost model (arXiv 2604.26039), to compare with.

Per config, T = a + b · ⌈g / units⌉ + c · g + d · log(g + 1), where g counts the tiles. It sees the geometry of the grid
alone: neither the bytes of weights nor what another config shows.
"""

from collections.abc import Sequence

import numpy as np

from moecache.predict.products import Array, Candidates, products
from moecache.predict.work import Cell
from moecache.schemas.device import Device


def grid(cells: Sequence[Cell], among: Candidates, device: Device) -> Array:
    """[cells, configs] tiles of `up`."""
    return products(cells, among, device)[0].programs


def fit(g: Array, us: Array, units: int, *, relative: bool = False) -> Array:
    """[configs, 4] coefficients by least squares over [cells, configs], NaN where a timing is missing.

    Args:
        relative: count relative errors, so that long calls do not decide alone. The publication counts µs.
    """
    found = np.zeros((g.shape[1], 4))
    for config in range(g.shape[1]):
        seen = np.isfinite(us[:, config])
        weight = 1 / us[seen, config] if relative else np.ones(int(seen.sum()))
        columns = _columns(g[seen, config], units) * weight[:, None]
        scale = np.abs(columns).max(axis=0, initial=1e-9)  # ⌈g / units⌉ and g are nearly parallel
        found[config] = np.linalg.lstsq(columns / scale, us[seen, config] * weight, rcond=None)[0] / scale
    return found


def times(coefficients: Array, g: Array, units: int) -> Array:
    """[cells, configs] µs."""
    return np.asarray((_columns(g, units) * coefficients).sum(axis=-1))


def _columns(g: Array, units: int) -> Array:
    return np.stack([np.ones_like(g), np.ceil(g / units), g, np.log(g + 1)], axis=-1)
