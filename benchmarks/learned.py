"""Makes what the package knows of an architecture before anybody tunes: moecache/costmodel/learned/ARCH.json.gz.

    python benchmarks/learned.py tests/data/h100-moecache-grid.json.gz [--check]

Fits the cost model to a grid of timings of our own kernels; where a cell was timed twice, to the geometric mean. No GPU
is needed. `--check` only says whether the file is that of the present model and grid.
"""

import argparse
import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np

from moecache.costmodel import learn
from moecache.costmodel.learned import SHIPPED, Learned
from moecache.regret import read


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the file is stale")
    parser.add_argument("--folder", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    made = from_grid(options.grid)
    file = options.folder / f"{made.parameters.arch}.json.gz"
    if options.check:
        fresh = file.exists() and _same(Learned.model_validate_json(gzip.decompress(file.read_bytes())), made)
        print(f"{file}: {'fresh' if fresh else f'stale: run python {Path(__file__).name} {options.grid}'}")
        return int(not fresh)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(made.model_dump_json().encode(), mtime=0))
    print(f"{file}: {len(made.calls)} calls, {len(made.configs)} configs, {file.stat().st_size / 1024:.0f} KiB")
    return 0


def from_grid(path: Path) -> Learned:
    """What a grid teaches."""
    grid = read(path)
    us = grid.us if grid.again is None else np.sqrt(grid.us * grid.again)
    about = {
        "grid": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "device": grid.device.name,
        "calls": str(len(grid.cells)),
    }
    return learn(grid.op, grid.cells, grid.configs, us, grid.device, about)


def _same(a: Learned, b: Learned) -> bool:
    """Up to what another processor's arithmetic changes."""
    alike = (a.op, a.about, a.configs, a.calls) == (b.op, b.about, b.configs, b.calls)
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
