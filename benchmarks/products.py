"""What another product's winners cost, beside predictions: two grids of the same calls and configs on two products.

    python benchmarks/products.py one.json.gz other.json.gz

Regret in per cent against the best config of each call, mean / 95th percentile / maximum, scored on the first grid.
Predictions are told the routing bucket alone, as in a call. No GPU is needed.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from moecache.lab.choosers import in_its_bucket
from moecache.lab.grid import Timings, read, work_of
from moecache.predict.learned import shipped
from moecache.predict.model import times
from moecache.predict.parameters import zero_shot
from moecache.predict.products import candidates
from moecache.predict.ranking import smoothed


def shared(one: Timings, other: Timings) -> tuple[Timings, np.ndarray]:
    """The calls and configs of `one` that `other` has, and the µs [calls, configs] of `other` there."""
    both = [config for config in one.configs if config in other.configs]
    mine, theirs = ([grid.configs.index(config) for config in both] for grid in (one, other))
    known = {key: row for row, key in enumerate(_calls(other))}
    part = one.part([row for row, key in enumerate(_calls(one)) if key in known])
    rows = [known[key] for key in _calls(part)]
    among = candidates([work_of(config) for config in both])
    part = replace(part, us=part.us[:, mine], configs=tuple(both), among=among, again=None)
    return part, other.us[np.ix_(rows, theirs)]


def _calls(grid: Timings) -> list[tuple[str, int, str]]:
    return list(zip(grid.models, [cell.tokens for cell in grid.cells], grid.routings, strict=True))


def tell(what: str, us: np.ndarray, predicted: np.ndarray) -> None:
    chosen = np.where(np.isfinite(us) & np.isfinite(predicted), predicted, np.inf).argmin(axis=1)
    lost = 100 * (us[np.arange(len(us)), chosen] / np.nanmin(us, axis=1) - 1)
    print(f"{what:44}{lost.mean():6.2f} / {np.percentile(lost, 95):5.2f} / {lost.max():5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", type=Path, nargs=2)
    one, other = (read(path) for path in parser.parse_args().grids)
    mine, theirs = shared(one, other)
    cells = tuple(map(in_its_bucket, mine.cells))
    print(f"scored on {one.device.name}: {len(mine.us)} calls, {len(mine.configs)} configs")
    tell(f"winner of {other.device.name}", mine.us, theirs)
    tell("constants of this device", mine.us, times(zero_shot(mine.device), mine.device, cells, mine.among))
    if (learnt := shipped(mine.device.arch)) is not None:
        tell("the shipped model on this device", mine.us, smoothed(learnt, mine.device).times(cells, mine.among))


if __name__ == "__main__":
    main()
