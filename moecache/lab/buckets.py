"""Routing buckets compared: how well the calls of a bucket share a config.

Each call gets the config that is least behind over the *other* calls of its model, tokens and bucket. One that is alone
in its bucket costs nothing here, so many small buckets look good: the share of such calls stands beside.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moecache.lab.choosers import by_others
from moecache.lab.grid import Timings
from moecache.schemas.problem import bucket_index

Counts = Sequence[int]
Bucket = Callable[[Counts], Hashable]


@dataclass(frozen=True)
class Cost:
    """What one bucket function costs, in per cent."""

    mean: float
    p95: float
    max: float
    alone: float  # of the calls
    others: float  # mean over calls that are not alone
    buckets: int  # of one model at one token count, at most


def _levels(value: Callable[[Counts], float], *limits: float) -> Bucket:
    return lambda counts: sum(value(counts) <= limit for limit in limits)


def _both(*several: Bucket) -> Bucket:
    return lambda counts: tuple(each(counts) for each in several)


def _active(counts: Counts) -> float:
    """Share of the experts that could be active."""
    return sum(c > 0 for c in counts) / min(len(counts), sum(counts))


def _effective(counts: Counts) -> float:
    """(Σt)² / Σt², of the same."""
    return sum(counts) ** 2 / sum(c * c for c in counts) / min(len(counts), sum(counts))


def _even(counts: Counts) -> float:
    """The same, of the active ones."""
    return _effective(counts) / _active(counts)


def _flat(counts: Counts) -> float:
    """Mean over largest count, of the experts that could be active."""
    return sum(counts) / min(len(counts), sum(counts)) / max(counts)


def _blocks(counts: Counts, rows: int = 64) -> float:
    """Blocks of rows over those of balanced routing."""
    balanced = len(counts) * -(-sum(counts) // (rows * len(counts)))
    return sum(-(-c // rows) for c in counts) / balanced


THIRDS = 2 / 3, 1 / 3, 1 / 6
TRIED: dict[str, Bucket] = {
    "active x effective, as it is": bucket_index,
    "one bucket": lambda counts: 0,
    "active 2/3 1/3": _levels(_active, *THIRDS[:2]),
    "active 9/10 3/4": _levels(_active, 0.9, 0.75),
    "effective 2/3 1/3 1/6": _levels(_effective, *THIRDS),
    "effective 3/4 1/2 1/4": _levels(_effective, 0.75, 0.5, 0.25),
    "largest 2 4 8 times the mean": _levels(_flat, 1 / 2, 1 / 4, 1 / 8),
    "evenness of the active 2/3 1/3": _levels(_even, *THIRDS[:2]),
    "blocks 19/20 4/5 of balanced": _levels(_blocks, 0.95, 0.8),
    "active x evenness": _both(_levels(_active, 2 / 3), _levels(_even, *THIRDS[:2])),
    "active x largest": _both(_levels(_active, 0.8), _levels(_flat, 1 / 4)),
    "active x effective, one limit each": _both(_levels(_active, 0.9), _levels(_effective, 0.5)),
}


def compare(grid: Timings) -> dict[str, Cost]:
    """Every function of TRIED on a grid."""
    return {name: cost(grid, bucket) for name, bucket in TRIED.items()}


def cost(grid: Timings, bucket: Bucket = bucket_index) -> Cost:
    """One function on a grid."""
    chosen, alone = by_others(grid, bucket)
    lost = 100 * (grid.us[np.arange(len(chosen)), chosen] / np.nanmin(grid.us, axis=1) - 1)
    among: dict[tuple[str, int], set[Hashable]] = {}  # what occurs
    for model, cell in zip(grid.models, grid.cells, strict=True):
        among.setdefault((model, cell.tokens), set()).add(bucket(cell.counts))
    kept = lost[~np.array(alone)]
    return Cost(
        mean=_short(lost.mean()),
        p95=_short(np.percentile(lost, 95)),
        max=_short(lost.max()),
        alone=_short(100 * np.mean(alone)),
        others=_short(kept.mean() if kept.size else 0.0),
        buckets=max(map(len, among.values())),
    )


def _short(value: float | np.floating[Any]) -> float:
    return round(float(value), 3)
