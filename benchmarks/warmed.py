"""Makes a grid of what a warm-up timed, so that the cost model can learn from it: bf16 layers of one device.

    python benchmarks/warmed.py FILE.sqlite OUT.json.gz

A warm-up times a shortlist of each problem, not every config, and knows of the routing its bucket alone: rows have
nulls, and the counts are those that stand for the bucket.
"""

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moecache.predict.calls import representative
from moecache.schemas.config import Config
from moecache.schemas.device import KNOWN
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment
from moecache.store import Store


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=KNOWN, default="h100", help="whose rates the model is fitted with")
    options = parser.parse_args(arguments)
    made = gridded(options.file, options.device)
    options.out.write_bytes(gzip.compress(json.dumps(made).encode(), mtime=0))
    print(f"{options.out}: {len(made['rows'])} calls, {len(made['configs'])} configs")


def gridded(file: Path, product: str) -> dict[str, Any]:
    """The timings of the environment that most of them are from, in the form of a grid file."""
    with Store.open(file, shipped=True) as store:
        timed = [t for t in store.timings() if t.median_us is not None and _wanted(t.problem)]
    most: Environment = Counter(t.environment for t in timed).most_common(1)[0][0]
    us: dict[str, dict[Config, float]] = {}
    problems: dict[str, Problem] = {}
    for timing in timed:
        if timing.environment == most and timing.median_us is not None:
            us.setdefault(timing.problem.key, {})[timing.config] = round(timing.median_us, 2)
            problems[timing.problem.key] = timing.problem
    configs = sorted({config for each in us.values() for config in each}, key=lambda config: config.name)
    about = {
        "about": "what `moecache warm` timed of bf16 layers: a shortlist of each problem",
        "op": "fused_moe", "dtype": "bf16", "device": KNOWN[product].model_dump(mode="json"),
        "environment": most.model_dump(mode="json"),
    }  # fmt: skip
    order = sorted(problems, key=lambda key: (problems[key].experts, problems[key].dims, problems[key].tokens, key))
    rows = [_row(problems[key], [us[key].get(config) for config in configs]) for key in order]
    return {"about": about, "configs": [config.model_dump(mode="json") for config in configs], "rows": rows}


def _wanted(problem: Problem) -> bool:
    return problem.op == "fused_moe" and problem.dtype == "bf16" and not problem.dim("quant", "")


def _row(problem: Problem, us: list[float | None]) -> dict[str, Any]:
    counts = representative(problem.routing, problem.tokens, problem.experts, problem.topk)
    hidden, inner = problem.dim("hidden"), problem.dim("intermediate")
    return {
        "shape": f"{problem.experts}x{hidden}x{inner}", "E": problem.experts, "topk": problem.topk, "hidden": hidden,
        "inter": inner, "T": problem.tokens, "routing": problem.routing, "counts": [int(n) for n in counts],
        "moe_us": us,
    }  # fmt: skip


if __name__ == "__main__":
    main()
