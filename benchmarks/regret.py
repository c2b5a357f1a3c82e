"""Regret of the ways to choose a config, on grids of timings: writes benchmarks/results/<folder>/regret.json.

    python benchmarks/regret.py tests/data/h200-vllm-grid.json tests/data/h100-moecache-grid.json.gz [--splits 20]

No GPU is needed. Of whole layers, and of their first GEMM where a grid has it.
"""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from record import RESULTS, commit

from moecache.lab.grid import Of, read
from moecache.lab.regret import WAYS, score_ways
from moecache.schemas.errors import InvalidInput


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", type=Path, nargs="+")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--out", default="h200", help="folder below benchmarks/results")
    options = parser.parse_args(arguments)
    target = RESULTS / options.out / "regret.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    made = {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
        "ways": WAYS,
        "grids": {path.name: scored(path, options.splits) for path in options.grids},
    }
    target.write_text(json.dumps(made, indent=1) + "\n")
    print(target)


def scored(path: Path, splits: int) -> dict[str, Any]:
    """Every score that a grid allows."""
    found: dict[str, Any] = {}
    every: tuple[Of, ...] = ("moe", "gemm1")
    for of in every:
        try:
            grid = read(path, of)
        except InvalidInput as error:
            print(f"{of} is left out: {error}")
            continue
        found[of] = asdict(score_ways(grid, splits=splits))
        for way, score in found[of]["scores"].items():
            if score:
                print(f"{of:6}{way:16}{score['mean']:8.2f}{score['p95']:8.2f}{score['max']:8.2f}  {WAYS[way]}")
    return found


if __name__ == "__main__":
    main()
