"""What the MoE benchmarks share: options, the grid of cells within a time budget, and one cell's checks and times."""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import moe_peers
import torch
from moe_case import SHAPES, TOLERANCE, Case, case, weights
from moe_clock import Bench, Recorded, bandwidth
from moe_sheet import Row, Sheet, summarise

import moecache
from moecache.devices import Places

ROUTINGS = ("uniform", "zipf")
BEGAN = time.monotonic()
LAYERS = count()  # a new layer for each case: no choice follows the routing of another
Call = Callable[[], Any]


def parser(description: str | None, tokens: Sequence[int]) -> argparse.ArgumentParser:
    """The options of every MoE benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--shapes", nargs="+", help="all by default")
    add("--shapes-file", type=Path, help="more shapes: JSON {name: [experts, topk, hidden, intermediate]}")
    add("--tokens", type=int, nargs="+", default=list(tokens))
    add("--routing", nargs="+", default=list(ROUTINGS), help="uniform, zipf, hot1, dirX")
    add("--skip", nargs="+", default=[], help="peers to leave out")
    add("--merge", action="store_true", help="add to the result file of the same code and device")
    add("--missing", action="store_true", help="as --merge, and leave out the cells that the file holds")
    add("--seconds", type=float, default=30.0, help="of tuning for one problem of ours")
    add("--db", type=Path, help="keep what is tuned in this cache file, and use what it holds")
    add("--isolate", action=argparse.BooleanOptionalAction, default=True, help="try candidates in subprocesses first")
    add("--budget-s", type=float, default=math.inf, help="stop before a cell that may end later than this")
    add("--bandwidth", type=float, help="GB/s of reading that the limit assumes; the device's otherwise")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, default=2)
    return made


def parse(
    made: argparse.ArgumentParser, arguments: Sequence[str] | None, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> argparse.Namespace:
    """The options; `known` holds every shape."""
    options = made.parse_args(arguments)
    options.known = dict(shapes)
    if options.shapes_file:
        options.known |= {name: tuple(shape) for name, shape in json.loads(options.shapes_file.read_text()).items()}
    options.shapes = options.shapes or list(options.known)
    if unknown := set(options.shapes) - set(options.known):
        made.error(f"unknown shapes {', '.join(sorted(unknown))}; there are {', '.join(options.known)}")
    options.merge |= options.missing
    return options


class Grid:
    """The cells of one run and the result file that they go to.

    Args:
        keys: the fields that tell one row from another; with `missing`, cells are told apart by those that a cell has.
    """

    def __init__(self, options: argparse.Namespace, name: str, op: str, keys: Sequence[str], dtype: str) -> None:
        self.options, self.dtype = options, dtype
        self.place = Places().first() if options.device == "cuda" else Places().here("cpu", 0)
        self.sheet = Sheet(name, self.place, op, keys, merge=options.merge)
        self.bench = Bench(self.place, options.rounds)
        self.rate, source = bandwidth(self.bench, options.bandwidth)
        self.sheet.facts |= {"bandwidth_gbs": self.rate, "bandwidth_from": source}
        self._op = op
        self.answers: dict[str, Any] = {}  # op name -> (problem, choice) of the last question
        self._hot: dict[Any, Any] = {}

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """The library as a user has it, but with the cache file and the tuning budget of the options."""
        with ExitStack() as stack, torch.no_grad():
            db = self.options.db or Path(stack.enter_context(tempfile.TemporaryDirectory()), "benchmark.sqlite")
            chosen = {"db": db, "path": (), "mode": "tune", "budget": self.options.seconds}
            serving: Any = stack.enter_context(moecache.using(**chosen, isolate=self.options.isolate))
            choose = serving.choose

            def noting(op: Any, problem: Any, *, prepare: Any, **more: Any) -> Any:
                def noted(choice: Any) -> Any:
                    self.answers[op.name] = (problem, choice)
                    return prepare(choice)

                return choose(op, problem, prepare=noted, **more)

            serving.choose, self._hot = noting, serving.hot
            yield

    def cases(self) -> Iterator[Case]:
        """Every cell, the weights of one shape at a time."""
        longest = 0.0
        for name in self.options.shapes:
            held, shape = None, self.options.known[name]
            for tokens, generator in self._cells(name):
                now = time.monotonic() - BEGAN
                if now + longest > self.options.budget_s:
                    print(f"stopped before {name} T={tokens} {generator}: --budget-s", flush=True)
                    return
                device, fp8 = str(self.place.torch_device), self.dtype != "bf16"
                held = held or weights(name, device, fp8=fp8, shape=shape)
                yield case(held, generator, tokens, shape[1])
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # the pools of this cell's graphs
                longest = max(longest, time.monotonic() - BEGAN - now)
            del held

    def _cells(self, shape: str) -> Iterator[tuple[int, str]]:
        """(tokens, routing) of those that are to be measured."""
        for tokens in self.options.tokens:
            for generator in self.options.routing:
                row = {"shape": shape, "T": tokens, "routing": generator, "dtype": self.dtype}
                if not (self.options.missing and self.sheet.has(row)):
                    yield tokens, generator

    def compare(
        self, label: str, calls: dict[str, Call], error: Callable[[Any], float], products: Call, size: int
    ) -> Row:
        """Check every call, time those that are right, and set them beside the limit.

        Args:
            error: relative error of a call's result.
            products: dense products of the same FLOPs.
            size: bytes that must move.
        """
        self.answers.clear()
        self._hot.clear()  # so that the cell's first call asks
        live, errors = {}, {}
        for name, call in calls.items():
            found = moe_peers.attempt(name, partial(self._checked, call, error))
            if found is None:
                continue
            recorded, errors[name] = found
            if errors[name] <= TOLERANCE[self.dtype]:
                live[name] = recorded
            else:
                print(f"WRONG {name} {label}: error {errors[name]:.2e}", flush=True)
        dense = moe_peers.attempt("dense", partial(self.bench.record, products))
        times = self.bench.race(live | ({"dense": dense} if dense else {}))
        floor, top = size / self.rate / 1e3, times["dense"].median if dense else None
        row: Row = {
            "limit_us": round(max(floor, top or 0.0), 2),
            "bytes_us": round(floor, 2),
            "dense_us": top and round(top, 2),
            "us": {name: round(times[name].median, 2) if name in live else None for name in calls},
            "mad_us": {name: round(times[name].mad, 2) for name in live},
            "rel_err": {name: float(f"{e:.2e}") if math.isfinite(e) else None for name, e in errors.items()},
            "eager": [name for name, each in live.items() if not each.graph],
        }
        if self._op in self.answers:
            problem, choice = self.answers[self._op]
            row |= {
                "config": str(choice.alternatives or choice.config),
                "tier": choice.tier,
                "bucket": problem.routing or "any",
            }
        shown = "  ".join(f"{name} {us}" for name, us in row["us"].items())
        print(f"{label}: limit {row['limit_us']}  {shown}", flush=True)
        return row

    def _checked(self, call: Call, error: Callable[[Any], float]) -> tuple[Recorded, float]:
        recorded = self.bench.record(call)
        return recorded, error(recorded.result)

    def keep(self, row: Row) -> Path:
        """Add a row and write the file, so that nothing measured is lost."""
        self.sheet.add(row)
        order = {"shape": list(self.options.known), "routing": ROUTINGS, "gemm": ("up", "down")}
        return self.sheet.save(order, summarise(self.sheet.rows))
