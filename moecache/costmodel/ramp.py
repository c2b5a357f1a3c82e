"""RaMP's cost model (arXiv 2604.26039), to compare with, and its performance regions, to explain a choice with.

Per config, T = a + b · ⌈g / units⌉ + c · g + d · log(g + 1), where g counts the tiles. It sees the geometry of the grid
alone: neither the bytes of weights nor what another config shows.
"""

from collections.abc import Sequence

import numpy as np

from moecache.costmodel.tiles import Tile, tiles
from moecache.costmodel.work import Array, Candidates, Cell, products
from moecache.schemas.config import Config
from moecache.schemas.device import Device

SWIZZLE = 1440  # columns of tiles · steps from which an order in groups of rows pays; thresholds of one H200
DEEP, IDLE = 48, 0.2  # steps from which, and rounds below which, splitting the depth pays
WIDE = 512  # columns that a tile of a grid of more than one round should have


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


def regions(cell: Cell, config: Config, device: Device) -> list[str]:
    """Where a config stands in RaMP's performance regions for this call, `up` and `down` apart, as sentences."""
    both = ("up", cell.wide, cell.hidden), ("down", cell.hidden, cell.intermediate)
    return [
        f"{name}: {line}"
        for (name, columns, depth), tile in zip(both, tiles(config, cell.gated), strict=True)
        for line in _regions(cell, tile, columns, depth, device)
    ]


def _regions(cell: Cell, tile: Tile, columns: int, depth: int, device: Device) -> list[str]:
    across, steps = -(-columns // tile.n), -(-depth // tile.k)
    count = across * sum(-(-rows // tile.m) for rows in cell.counts)
    rounds, pressure = count / device.units, across * steps
    ordered = "is" if tile.group > 1 else "is not"
    split = steps >= DEEP and rounds < IDLE
    return [
        f"{count} tiles on {device.units} units, ω = {rounds:.2f}; "
        + (f"above 1 wide tiles pay (to {WIDE} columns, here {tile.n})" if rounds > 1 else "the device is not full"),
        f"{across} tiles across x {steps} steps, λ·κ = {pressure}; above {SWIZZLE} an order in groups pays: "
        f"{'yes' if pressure > SWIZZLE else 'no'}, and this config {ordered} grouped",
        f"κ = {steps} steps; splitting the depth pays from {DEEP} at ω < {IDLE}: {'yes' if split else 'no'}",
    ]
