"""Regret of the ways to choose a config, on a grid of timings: writes benchmarks/results/<folder>/regret.json.

    python benchmarks/regret.py tests/data/h200-vllm-grid.json --out h200 [--fit-on OTHER] [--splits 20]

No GPU is needed; `moecache regret` prints the same.
"""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from record import RESULTS, commit

from moecache.regret import WAYS, read, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--fit-on", type=Path, help="what `transfer` is fitted on")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--out", default="h200", help="folder below benchmarks/results")
    options = parser.parse_args()
    scored = {}
    for of in ("moe", "gemm1"):
        other = read(options.fit_on, of) if options.fit_on else None
        scored[of] = asdict(report(read(options.grid, of), other, options.splits))
        for way, score in scored[of]["scores"].items():
            if score:
                print(f"{of:6}{way:14}{score['mean']:8.2f}{score['p95']:8.2f}{score['max']:8.2f}  {WAYS[way]}")
    target = RESULTS / options.out / "regret.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "grid": options.grid.name,
        "fit_on": options.fit_on and options.fit_on.name,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
    }
    target.write_text(json.dumps(head | scored, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
