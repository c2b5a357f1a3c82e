"""Makes what the package knows of an architecture before anybody tunes: moecache/predict/learned/ARCH.json.gz.

    python benchmarks/learned.py tests/data/h100-moecache-grid.json.gz tests/data/h100-moecache-warm.json.gz [--check]

Fits the cost model to grids of timings of our own kernels on one device; where a cell was timed twice, to the
geometric mean. No GPU is needed. `--check` only says whether the file is that of the present model and grids.
"""

import argparse
import gzip
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moecache.lab.fitting import learn
from moecache.lab.grid import Timings, read, work_of
from moecache.predict.learned import SHIPPED, Learned
from moecache.predict.products import Array
from moecache.schemas.config import Config


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the file is stale")
    parser.add_argument("--folder", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    made = from_grids(options.grids)
    file = options.folder / f"{made.parameters.arch}.json.gz"
    if options.check:
        fresh = file.exists() and _same(Learned.model_validate_json(gzip.decompress(file.read_bytes())), made)
        again = " ".join(["python", Path(__file__).name, *map(str, options.grids)])
        print(f"{file}: {'fresh' if fresh else f'stale: run {again}'}")
        return int(not fresh)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(made.model_dump_json().encode(), mtime=0))
    print(f"{file}: {len(made.calls)} calls, {len(made.works)} configs, {file.stat().st_size / 1024:.0f} KiB")
    return 0


def from_grids(paths: Sequence[Path]) -> Learned:
    """What grids teach together."""
    grids = [read(path) for path in paths]
    configs = list(dict.fromkeys(config for grid in grids for config in grid.configs))
    us = np.vstack([_spread(grid, configs) for grid in grids])
    cells = [cell for grid in grids for cell in grid.cells]
    about = {
        "grid": ", ".join(path.name for path in paths),
        "sha256": hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest(),
        "device": grids[0].device.name,
        "calls": str(len(cells)),
    }
    return learn(grids[0].op, cells, [work_of(config) for config in configs], us, grids[0].device, about)


def _spread(grid: Timings, configs: Sequence[Config]) -> Array:
    """The grid's times under all configs, NaN where it has none."""
    us = grid.us if grid.again is None else np.sqrt(grid.us * grid.again)
    at = {config: number for number, config in enumerate(grid.configs)}
    blank = np.full(len(us), np.nan)
    return np.column_stack([us[:, at[config]] if config in at else blank for config in configs])


def _same(a: Learned, b: Learned) -> bool:
    """Up to what another processor's arithmetic changes."""
    alike = (a.op, a.about, a.works, a.calls) == (b.op, b.about, b.works, b.calls)
    return (
        alike
        and np.allclose(a.leftovers, b.leftovers, atol=5e-3)
        and np.allclose(_numbers(a), _numbers(b), rtol=1e-2)
    )  # fmt: skip


def _numbers(made: Learned) -> list[float]:
    p = made.parameters
    kernels = [value for kernel in p.kernels.values() for value in kernel.model_dump().values()]
    return [p.version, p.bandwidth, p.reread, p.early, *kernels, *p.bodies.values()]


if __name__ == "__main__":
    sys.exit(main())
