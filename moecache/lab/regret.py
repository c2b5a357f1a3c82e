"""Replays a grid of timings and scores ways to choose a config.

Regret is (time of the chosen - time of the best) / time of the best, of one call, by the grid's own timings. Where
configs are closer than the noise of these, the best is partly luck, and no way of choosing gets to 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from moecache.lab.choosers import (
    Chooser,
    Chosen,
    by_bucket,
    by_fit,
    by_others,
    by_ramp,
    by_relative_ramp,
    by_table,
    by_zero_shot,
    fastest,
    fitted,
    in_its_bucket,
)
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


@dataclass
class _Tally:
    """Regrets of one way, with the models of their calls."""

    regrets: list[float] = field(default_factory=list)
    models: list[str] = field(default_factory=list)

    def add(self, asked: Timings, chosen: Chosen) -> None:
        self.regrets += regrets(asked.us, chosen).tolist()
        self.models += asked.models

    def score(self, model: str | None = None) -> Score | None:
        found = [r for r, m in zip(self.regrets, self.models, strict=True) if model in (None, m)]
        if not found:
            return None
        high = (np.mean(found), np.percentile(found, 95), np.max(found))
        mean, p95, most = (round(100 * float(value), 3) for value in high)
        return Score(mean, p95, most, len(found))


def regrets(us: Array, chosen: Chosen) -> Array:
    """[rows] relative regret of one chosen config a row."""
    return np.asarray(us[np.arange(len(us)), chosen] / np.nanmin(us, axis=1) - 1)


def score_ways(grid: Timings, other: Timings | None = None, splits: int = SPLITS) -> Scores:
    """Score every way on a grid.

    Args:
        other: what `transfer` is fitted on, calls of the same layer left out; the grid's other models by default.
        splits: how often `fitted`, `ramp` and `bucket` choose which calls are timed.

    Raises:
        InvalidInput: splits is below 1.
    """
    if splits < 1:
        raise InvalidInput(f"splits={splits}; allowed are 1 and more")
    tallies = {way: _Tally() for way in WAYS}
    models = list(dict.fromkeys(grid.models))
    chosen, alone = by_others(grid, bucket_index)
    tallies["bucket_transfer"].add(grid, chosen)
    for model in models:
        here = np.array([name == model for name in grid.models])
        mine = grid.part(np.flatnonzero(here))
        tallies["zero_shot"].add(mine, by_zero_shot(mine, mine))
        tallies["oracle"].add(mine, fastest(mine.us, mine))
        strangers = _strangers(other if other is not None else grid, mine)
        if strangers is not None:
            _score_strangers(tallies, strangers, mine)
        _score_tables(tallies, mine)
        _score_splits(tallies, mine, splits)
        if mine.again is not None:
            second = replace(mine, us=mine.again)
            tallies["noise"].add(second, fastest(mine.us, second))
    scores = {way: tally.score() for way, tally in tallies.items()}
    by_model = {model: {way: tally.score(model) for way, tally in tallies.items()} for model in models}
    share = round(100 * float(np.mean(alone)), 1)
    return Scores(scores, by_model, len(grid.cells), len(grid.among.works), splits, share)


def _strangers(grid: Timings, mine: Timings) -> Timings | None:
    """The calls of other layers than those of `mine`."""
    layers = {(cell.hidden, cell.intermediate, len(cell.counts)) for cell in mine.cells}
    keep = [i for i, c in enumerate(grid.cells) if (c.hidden, c.intermediate, len(c.counts)) not in layers]
    return grid.part(keep) if keep else None


def _score_strangers(tallies: dict[str, _Tally], strangers: Timings, mine: Timings) -> None:
    """Other models timed, none of this one; its calls known exactly, or by their buckets."""
    model = fitted(strangers)
    for way, cells in (("transfer", mine.cells), ("transfer_bucket", tuple(map(in_its_bucket, mine.cells)))):
        tallies[way].add(mine, fastest(model.times(cells, mine.among), mine))


def _score_tables(tallies: dict[str, _Tally], mine: Timings) -> None:
    """Tables of uniform routing: used where they were tuned, and at a token count that they lack."""
    tokens = np.array([cell.tokens for cell in mine.cells])
    uniform = np.array([routing == UNIFORM for routing in mine.routings])
    for count in np.unique(tokens):
        tuned, skewed = np.flatnonzero(uniform & (tokens == count)), np.flatnonzero(~uniform & (tokens == count))
        if len(tuned) and len(skewed):
            asked = mine.part(skewed)
            tallies["table"].add(asked, by_table(mine.part(tuned), asked))
        if len(others := np.flatnonzero(uniform & (tokens != count))):
            asked = mine.part(np.flatnonzero(tokens == count))
            tallies["nearest"].add(asked, by_table(mine.part(others), asked))


def _score_splits(tallies: dict[str, _Tally], mine: Timings, splits: int) -> None:
    """Some calls of a model timed, the rest asked."""
    ways: dict[str, Chooser] = {
        "fitted": by_fit,
        "ramp": by_ramp,
        "ramp_relative": by_relative_ramp,
        "bucket": by_bucket,
    }
    for timed, asked in _halves(mine, splits):
        for way, choose in ways.items():
            tallies[way].add(asked, choose(timed, asked))


def _halves(mine: Timings, splits: int) -> Iterator[tuple[Timings, Timings]]:
    count = round(KNOWN * len(mine.cells))
    if 0 < count < len(mine.cells):
        for seed in range(splits):
            order = np.random.default_rng(seed).permutation(len(mine.cells))
            yield mine.part(order[:count]), mine.part(order[count:])
