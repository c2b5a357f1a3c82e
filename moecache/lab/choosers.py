"""Ways to choose a config for calls that were not timed, each from what it may know. All return indices of configs."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from moecache import routing
from moecache.lab import ramp
from moecache.lab.fitting import fit, leftovers
from moecache.lab.grid import UNIFORM, Timings
from moecache.predict.calls import representative
from moecache.predict.model import times
from moecache.predict.parameters import zero_shot
from moecache.predict.products import Array
from moecache.predict.ranking import Smoothed, features
from moecache.predict.work import Cell
from moecache.schemas.problem import bucket_index

Chosen = np.typing.NDArray[np.intp]
Chooser = Callable[[Timings, Timings], Chosen]  # (timed, asked) -> a config for each asked


def fastest(predicted: Array, asked: Timings) -> Chosen:
    """The config with the lowest time among those that run there: `fits` knows that before a launch."""
    return np.asarray(np.where(np.isfinite(asked.us), predicted, np.inf).argmin(axis=1))


def by_zero_shot(asked: Timings) -> Chosen:
    """The cost model with the device's constants."""
    return fastest(times(zero_shot(asked.device), asked.device, asked.cells, asked.among), asked)


def fitted(timed: Timings) -> Smoothed:
    """The cost model fitted to what was timed, and its leftovers smoothed."""
    found = fit(timed.cells, timed.among, timed.us, timed.device)
    solved = leftovers(found, timed.device, timed.cells, timed.among, timed.us)
    return Smoothed(found, timed.device, features(timed.cells), timed.among, solved)


def by_fit(timed: Timings, asked: Timings) -> Chosen:
    """That model, told the exact routing."""
    return fastest(fitted(timed).times(asked.cells, asked.among), asked)


def in_its_bucket(cell: Cell) -> Cell:
    """What a process knows of a call that it has not seen: its sizes and its routing bucket."""
    counts = cell.counts
    topk = max(1, round(sum(counts) / cell.tokens))
    drawn = representative(routing.bucket(counts), cell.tokens, len(counts), topk)
    return replace(cell, counts=drawn)


def by_ramp(timed: Timings, asked: Timings, *, relative: bool = False) -> Chosen:
    """RaMP's four terms for each config; `relative`: fitted to relative errors."""
    units = timed.device.units
    known = ramp.fit(ramp.grid(timed.cells, timed.among, timed.device), timed.us, units, relative=relative)
    return fastest(ramp.times(known, ramp.grid(asked.cells, asked.among, asked.device), units), asked)


def by_bucket(timed: Timings, asked: Timings) -> Chosen:
    """The winner of the same tokens and routing bucket; of the same tokens or the nearest where none was timed."""
    tokens = np.array([cell.tokens for cell in timed.cells])
    buckets = np.array([bucket_index(cell.counts) for cell in timed.cells])
    found = []
    for cell in asked.cells:
        distance = np.abs(np.log2(tokens / cell.tokens))
        near = distance == distance.min()
        same = near & (buckets == bucket_index(cell.counts))
        found.append(_winner(timed.us[same if same.any() else near]))
    return fastest(_only(found, asked), asked)


def by_others(grid: Timings, bucket: Callable[[Sequence[int]], object]) -> tuple[Chosen, list[bool]]:
    """The winner over the other calls of the same model, tokens and bucket, and which calls have no others: these get
    the best of their own."""
    groups: dict[object, list[int]] = {}
    keys = [(m, c.tokens, bucket(c.counts)) for m, c in zip(grid.models, grid.cells, strict=True)]
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    others = [[row for row in groups[key] if row != mine] for mine, key in enumerate(keys)]
    found = [_winner(grid.us[rows or [mine]]) for mine, rows in enumerate(others)]
    return fastest(_only(found, grid), grid), [not rows for rows in others]


def by_table(timed: Timings, asked: Timings) -> Chosen:
    """The winner of uniform routing at the nearest token count that was timed, as engines' tables are used."""
    rows = [row for row, routing in enumerate(timed.routings) if routing == UNIFORM]
    tokens = np.array([timed.cells[row].tokens for row in rows])
    nearest = [rows[int(np.abs(tokens - cell.tokens).argmin())] for cell in asked.cells]
    return fastest(_only([_winner(timed.us[[row]]) for row in nearest], asked), asked)


def _winner(us: Array) -> int:
    """The config that is least behind over some calls, by geometric mean; one that failed somewhere does not win."""
    behind = np.log(us / np.nanmin(us, axis=1, keepdims=True)).sum(axis=0)
    usable = np.where(np.isfinite(behind), behind, np.inf)
    return int(usable.argmin()) if np.isfinite(usable).any() else int(np.nanargmin(us[0]))


def _only(chosen: Sequence[int], asked: Timings) -> Array:
    """Predictions that prefer the chosen, and else the first that runs: that is the static default."""
    preferred = np.ones(asked.us.shape)
    preferred[np.arange(len(chosen)), chosen] = 0.0
    return preferred
