"""Kernel times of another tree of this project and of this one, in one session: before and after a change.

    python benchmarks/against.py TREE [--db FILE] [--shapes qwen3_30b_a3b] [--tokens 1 16] [--routing uniform zipf]
    python benchmarks/against.py TREE --smoke      a tiny layer on the CPU: shows that it runs

TREE is a checkout, the one from before the change. Each tree has a process for each shape, with its own PYTHONPATH.
TREE measures what the cells ask for, or `--db` holds it. Then both trees serve from a copy of that one file, in mode
`replay`. Every cell is captured in a graph through the public call. The graphs of a cell are replayed by turns, before,
after, before, after, with 256 MiB written before every replay, so that no cache holds anything. Never do two processes
use the device at once.

`ratio` of a cell is after / before, of medians of all replays. `configs` stands in a row where the trees tell the
logger other choices, `same_result` is false where the norms of their results differ by more than 1 %. Run it with this
tree as TREE to know the noise.
"""

import argparse
import functools
import json
import logging
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent.parent
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
TINY, TINY_TOKENS = {"tiny": (8, 2, 64, 48)}, (1, 40)  # what --smoke runs
FLUSH_BYTES = 256 << 20  # several times the L2 of an H200
SIDES = ("before", "after")
SAME = 1e-2  # relative difference of the norms of results
BEGAN = time.monotonic()

Row = dict[str, Any]


class Side:
    """A process that serves one shape from one tree."""

    def __init__(self, tree: Path, db: Path, shape: Sequence[int], device: str) -> None:
        path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, __file__, "serve", str(db), device, *map(str, shape)]
        env = {**os.environ, "PYTHONPATH": path}
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._tree = tree

    def ask(self, **what: Any) -> None:
        """Begin something; `answer` waits for its end."""
        assert self._process.stdin is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self._tree} ended with {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        """Close its input, which ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = {name: folder / f"{name}.sqlite" for name in SIDES}
        known(options, files["before"])
        shutil.copy(files["before"], files["after"])
        cells = [{"tokens": tokens, "routing": routing} for tokens in options.tokens for routing in options.routing]
        trees, device = dict(zip(SIDES, (options.tree, HERE), strict=True)), "cpu" if options.smoke else "cuda"
        pairs: dict[str, dict[str, Side]] = {}
        for shape in options.shapes:
            pairs[shape] = {name: Side(trees[name], files[name], options.known[shape], device) for name in SIDES}
            for side in pairs[shape].values():
                stack.callback(side.end)
                side.ask(do="capture", cells=cells)  # all at once: nothing is timed yet
        for pair in pairs.values():
            check(trees, {name: side.answer() for name, side in pair.items()})
        print(f"captured after {time.monotonic() - BEGAN:.0f} s", flush=True)
        for shape, pair in pairs.items():
            if time.monotonic() - BEGAN > options.budget_s:
                print(f"stopped before {shape}: --budget-s")
                break
            rows += compared(options, shape, pair, cells)
    return told(options, rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tree", type=Path, metavar="TREE", help="the other checkout")
    add("--shapes", nargs="+", help="all by default")
    add("--tokens", type=int, nargs="+", help="default: " + " ".join(map(str, TOKENS)))
    add("--routing", nargs="+", default=["uniform", "zipf"], help="uniform, zipf, hot1, dirX")
    add("--db", type=Path, help="a cache file with what both trees serve; it is only read")
    add("--seconds", type=float, default=0.5, help="of measuring a problem where there is no --db")
    add("--rounds", type=int, default=8, help="turns of each tree in a cell")
    add("--replays", type=int, default=12, help="of a turn")
    add("--budget-s", type=float, default=135.0, help="stop before a shape that begins later than this")
    add("--smoke", action="store_true", help="a tiny layer on the CPU")
    options = parser.parse_args(arguments)
    from moe_case import SHAPES  # it needs this tree's moecache, which the process of the other tree has not

    options.known, options.tree = TINY if options.smoke else SHAPES, options.tree.resolve()
    options.shapes = options.shapes or list(options.known)
    options.tokens = options.tokens or list(TINY_TOKENS if options.smoke else TOKENS)
    if unknown := set(options.shapes) - set(options.known):
        parser.error(f"unknown shapes {', '.join(sorted(unknown))}; there are {', '.join(options.known)}")
    if not (options.tree / "moecache" / "__init__.py").exists():
        parser.error(f"{options.tree} is no checkout: it has no moecache/__init__.py")
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("there is no GPU here; --smoke shows on a CPU that it runs")
    return options


def known(options: argparse.Namespace, file: Path) -> None:
    """The cache file that both trees serve from."""
    if options.db:
        shutil.copy(options.db, file)
        return
    shapes = [options.known[shape] for shape in options.shapes]
    side = Side(options.tree, file, shapes[0], "cuda")
    side.ask(do="tune", shapes=shapes, tokens=options.tokens, routing=options.routing, seconds=options.seconds)
    print(f"known after {time.monotonic() - BEGAN:.0f} s: {side.answer()}", flush=True)
    side.end()


def check(trees: dict[str, Path], files: dict[str, str]) -> None:
    """That each process runs its own tree."""
    for name, file in files.items():
        if not Path(file).resolve().is_relative_to(trees[name]):
            raise SystemExit(f"{name} runs {file}, which is not in {trees[name]}")


def compared(options: argparse.Namespace, shape: str, pair: dict[str, Side], cells: Sequence[Row]) -> list[Row]:
    """The rows of a shape."""
    rows = []
    for at, cell in enumerate(cells):
        us: dict[str, list[float]] = {name: [] for name in SIDES}
        found: dict[str, Row] = {}
        for turn in range(options.rounds):
            for name in SIDES[:: -1 if turn % 2 else 1]:
                pair[name].ask(do="replay", cell=at, count=options.replays)
                found[name] = pair[name].answer()
                us[name] += found[name]["us"]
        middle = {name: statistics.median(values) for name, values in us.items()}
        row = {"shape": shape, "T": cell["tokens"], "routing": cell["routing"], "us": middle}
        row["ratio"] = round(middle["after"] / middle["before"], 4)
        configs = {name: found[name]["configs"] for name in SIDES}
        row |= {"configs": configs} if configs["before"] != configs["after"] else {}
        norms = [found[name]["norm"] for name in SIDES]
        row["same_result"] = math.isclose(*norms, rel_tol=SAME)
        rows.append(row)
        times = "  ".join(f"{name} {value:.2f}" for name, value in middle.items())
        notes = f"  OTHER CONFIGS {configs}" if "configs" in row else ""
        notes += "" if row["same_result"] else f"  OTHER RESULT {norms}"
        print(f"{shape} T={row['T']} {row['routing']}: {times}  ratio {row['ratio']}{notes}", flush=True)
    return rows


def told(options: argparse.Namespace, rows: Sequence[Row]) -> int:
    """Write the rows and print what they come to; 1 where a cell gives another result."""
    if not rows:
        return 1
    import record

    from moecache.devices import Places

    place = Places().here("cpu", 0) if options.smoke else Places().first()
    worst = max(rows, key=lambda row: row["ratio"])
    summary = {
        "cells": len(rows),
        "ratio_geomean": round(math.exp(statistics.fmean(math.log(row["ratio"]) for row in rows)), 4),
        "ratio_max": worst["ratio"],
        "worst": [worst["shape"], worst["T"], worst["routing"]],
        "other_configs": sum("configs" in row for row in rows),
        "other_results": sum(not row["same_result"] for row in rows),
    }
    facts = {"before": options.tree.name, "rounds": options.rounds, "replays": options.replays, "summary": summary}
    print(summary, record.save("against", record.folder_of(place), place, list(rows), **facts), sep="\n")
    return int(summary["other_results"] > 0)


# --- in the process of a tree: torch, and what is public in moecache ---


class Served:
    """One shape of the tree of this process."""

    def __init__(self, db: Path, device: str, shape: Sequence[int]) -> None:
        self._db, self._device, self._shape, self._heard = db, device, shape, Heard()
        self._runs: list[tuple[Any, Any, list[str]]] = []  # replay, result, configs that were told
        self._calls: list[Any] = []  # a graph reads their tensors and owns none

    def tune(
        self, shapes: Sequence[Sequence[int]], tokens: Sequence[int], routing: Sequence[str], seconds: float
    ) -> Row:
        """Measure what the cells ask for; how many problems are served from which tier."""
        import moecache
        from moecache.models import model_of

        layers = [layer for shape in shapes for layer in model_of(*shape).layers]
        limit = seconds * len(layers) * len(tokens) * len(routing)
        with moecache.using(mode="tune", db=self._db, path=()):
            rows = moecache.warmup(layers, tokens=tokens, routing=routing, ops=["fused_moe"], budget=limit)
        tiers = [row.tier for row in rows]
        return {tier: tiers.count(tier) for tier in sorted(set(tiers))}

    def capture(self, cells: Sequence[Row]) -> str:
        """A graph of every cell; the file of the package that serves them."""
        import moecache
        from moecache import routing

        experts, topk, hidden, inner = self._shape
        rng = torch.Generator(self._device).manual_seed(1)

        def random(*size: int) -> torch.Tensor:
            return torch.empty(size, device=self._device, dtype=torch.bfloat16).normal_(generator=rng)

        w1, w2 = random(experts, 2 * inner, hidden).mul_(hidden**-0.5), random(experts, hidden, inner).mul_(inner**-0.5)
        for at, cell in enumerate(cells):
            x, scores = random(cell["tokens"], hidden), random(cell["tokens"], topk).float().softmax(-1)
            ids = routing.draw(cell["routing"], cell["tokens"], experts, topk).to(self._device)
            self._heard.configs = []
            call = functools.partial(moecache.fused_moe, x, w1, w2, scores, ids, layer=at)
            run, out = self._graph(call)
            self._runs.append((run, out, self._heard.configs))
            self._calls.append(call)
        self._flush = torch.empty(FLUSH_BYTES if self._device == "cuda" else 1, dtype=torch.uint8, device=self._device)
        return str(moecache.__file__)

    def _graph(self, call: Any) -> tuple[Any, Any]:
        """What repeats the call, and the result that it writes."""
        for _ in range(3):
            out = call()
        if self._device == "cpu":
            return call, out
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = call()
        return graph.replay, out

    def replay(self, cell: int, count: int) -> Row:
        """Times in µs of some replays, each with a cold L2."""
        run, out, configs = self._runs[cell]
        us = self._on_gpu(run, count) if self._device == "cuda" else [self._on_cpu(run) for _ in range(count)]
        return {"us": us, "norm": float(out.float().norm()), "configs": configs}

    def _on_gpu(self, run: Any, count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count + 1)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in pairs[1:]]  # the other process ran before the first

    def _on_cpu(self, run: Any) -> float:
        began = time.perf_counter_ns()
        run()
        return (time.perf_counter_ns() - began) / 1e3


class Heard(logging.Handler):
    """The configs that the logger `moecache` names. It names a problem's choice once."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.configs: list[str] = []
        logger = logging.getLogger("moecache")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r" gets (.+?), (\w+): ", record.getMessage()):
            self.configs.append(f"{found[1]}, {found[2]}")


def serve(db: str, device: str, *shape: str) -> None:
    """Answer what stdin asks, line by line; what is printed meanwhile goes to stderr."""
    import moecache

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    served = Served(Path(db), device, [int(size) for size in shape])
    with torch.no_grad(), ExitStack() as stack:
        for line in sys.stdin:
            what = json.loads(line)
            do = what.pop("do")
            if do == "capture":
                stack.enter_context(moecache.using(mode="replay", db=Path(db), path=()))
            print(json.dumps(getattr(served, do)(**what)), file=out, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
    else:
        sys.exit(main())
