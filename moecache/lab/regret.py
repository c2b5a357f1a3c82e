"""Replays a grid of timings and scores ways to choose a config.

Regret is (time of the chosen - time of the best) / time of the best, of one call, by the grid's own timings. Where
configs are closer than the noise of these, the best is partly luck, and no way of choosing gets to 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from moecache.lab import choosers
from moecache.lab.choosers import Chooser, Chosen, fastest
from moecache.lab.grid import UNIFORM, Timings
from moecache.predict.products import Array
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import bucket_index

KNOWN = 2 / 3  # of a model's calls: 20 of 30
SPLITS = 10  # random choices of which, with fixed seeds
WAYS = {
    "table": "one config a token count, tuned on uniform routing, on the other routings",
    "nearest": "the same table at the nearest other token count",
    "bucket": "the winner of the same tokens and routing bucket, 2/3 of the calls timed",
    "bucket_transfer": "the winner over the other calls of the same tokens and bucket; 0 where there are none",
    "ramp": "RaMP's four terms a config, 2/3 of the calls timed",
    "ramp_relative": "the same, fitted to relative errors",
    "zero_shot": "the cost model with the device's constants, nothing timed",
    "transfer": "the cost model fitted on other models, none of this one timed",
    "transfer_bucket": "the same, told the routing bucket instead of the counts",
    "fitted": "the cost model fitted and smoothed, 2/3 of the calls timed",
    "oracle": "every call timed",
    "noise": "every call timed once, scored by a second run",
}

SPLIT: dict[str, Chooser] = {
    "fitted": choosers.by_fit,
    "ramp": choosers.by_ramp,
    "ramp_relative": partial(choosers.by_ramp, relative=True),
    "bucket": choosers.by_bucket,
}  # ways for which some calls of a model are timed, and the rest asked


@dataclass(frozen=True)
class Score:
    """Regrets in per cent over `calls` choices."""

    mean: float
    p95: float
    max: float
    calls: int


@dataclass(frozen=True)
class Scores:
    """Scores by way of choosing, None where the grid does not allow it, over all calls and for each model.

    Attributes:
        alone: calls, in per cent, that share model, tokens and routing bucket with no other.
    """

    scores: dict[str, Score | None]
    models: dict[str, dict[str, Score | None]]
    cells: int
    configs: int
    splits: int
    alone: float


def regrets(us: Array, chosen: Chosen) -> Array:
    """[rows] relative regret of one chosen config a row."""
    return np.asarray(us[np.arange(len(us)), chosen] / np.nanmin(us, axis=1) - 1)


def score_ways(grid: Timings, splits: int = SPLITS) -> Scores:
    """Score every way on a grid.

    Args:
        splits: how often `fitted`, `ramp` and `bucket` choose which calls are timed.

    Raises:
        InvalidInput: splits is below 1.
    """
    if splits < 1:
        raise InvalidInput(f"splits={splits}; allowed are 1 and more")
    chosen, alone = choosers.by_others(grid, bucket_index)
    lost: dict[str, list[tuple[str, float]]] = {way: [] for way in WAYS}  # model and regret of each call
    for way, asked, picked in [("bucket_transfer", grid, chosen), *_choices(grid, splits)]:
        lost[way] += zip(asked.models, regrets(asked.us, picked).tolist(), strict=True)
    scores = {way: _score([each for _, each in found]) for way, found in lost.items()}
    models = {
        model: {way: _score([each for name, each in found if name == model]) for way, found in lost.items()}
        for model in dict.fromkeys(grid.models)
    }
    share = round(100 * float(np.mean(alone)), 1)
    return Scores(scores, models, len(grid.cells), len(grid.among.works), splits, share)


def _score(found: Sequence[float]) -> Score | None:
    if not found:
        return None
    mean, p95, most = (round(100 * float(x), 3) for x in (np.mean(found), np.percentile(found, 95), np.max(found)))
    return Score(mean, p95, most, len(found))


def _choices(grid: Timings, splits: int) -> Iterator[tuple[str, Timings, Chosen]]:
    """For each model what each way chooses for which calls."""
    for model in dict.fromkeys(grid.models):
        mine = grid.part(np.flatnonzero([name == model for name in grid.models]))
        yield "zero_shot", mine, choosers.by_zero_shot(mine)
        yield "oracle", mine, fastest(mine.us, mine)
        if mine.again is not None:
            second = replace(mine, us=mine.again)
            yield "noise", second, fastest(mine.us, second)
        if (others := strangers(grid, mine)) is not None:
            known = choosers.fitted(others)
            for way, cells in (("transfer", mine.cells), ("transfer_bucket", map(choosers.in_its_bucket, mine.cells))):
                yield way, mine, fastest(known.times(tuple(cells), mine.among), mine)
        yield from _tables(mine)
        for timed, asked in _halves(mine, splits):
            for way, choose in SPLIT.items():
                yield way, asked, choose(timed, asked)


def strangers(grid: Timings, mine: Timings) -> Timings | None:
    """The calls of other layers than those of `mine`."""
    layers = {(cell.hidden, cell.intermediate, len(cell.counts)) for cell in mine.cells}
    keep = [i for i, c in enumerate(grid.cells) if (c.hidden, c.intermediate, len(c.counts)) not in layers]
    return grid.part(keep) if keep else None


def _tables(mine: Timings) -> Iterator[tuple[str, Timings, Chosen]]:
    """Tables of uniform routing: used where they were tuned, and at a token count that they lack."""
    tokens = np.array([cell.tokens for cell in mine.cells])
    uniform = np.array([routing == UNIFORM for routing in mine.routings])
    for count in np.unique(tokens):
        here = tokens == count
        for way, tuned, rows in (("table", uniform & here, ~uniform & here), ("nearest", uniform & ~here, here)):
            if tuned.any() and rows.any():
                asked = mine.part(np.flatnonzero(rows))
                yield way, asked, choosers.by_table(mine.part(np.flatnonzero(tuned)), asked)


def _halves(mine: Timings, splits: int) -> Iterator[tuple[Timings, Timings]]:
    count = round(KNOWN * len(mine.cells))
    if 0 < count < len(mine.cells):
        for seed in range(splits):
            order = np.random.default_rng(seed).permutation(len(mine.cells))
            yield mine.part(order[:count]), mine.part(order[count:])
