"""One captured graph of `moecache.fused_moe` under changing routing, beside the best config of each routing.

    python benchmarks/in_graph.py [--shapes qwen3_30b_a3b] [--tokens 64 256] [--seconds 2] [--db FILE] [--missing]

For each layer and token count the library first measures every routing. Then one graph is captured through the public
call and replayed with each routing in its inputs (`ours`), beside a graph of every candidate: `best_single` is the
fastest of them under this routing, `static` the one that won under the first routing (uniform), `single` the one config
that the library would choose for all routings. `ours` may hold two configs by turns, then `config` names both. All are
raced as the tuner does it, each replay behind emptied caches. The result of `ours` is compared with a float32 reference
under each routing.

`extra_us` of a row is what a second config costs where it has nothing to do: a graph of `single` and another config
that owns no routing, less the graph of `single` alone, in the same race; null where no two can be captured.

`sort_us` of a row is what posting costs on the device: the layer's sort with the routing's word in pinned host memory,
and with one in device memory. `host_us` of the file is what it costs the host.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # also when this is imported as benchmarks.in_graph

import moe_grid
import moe_peers
from grid import precompile
from moe_case import TOLERANCE, Case, Weights, case, weights
from moe_clock import Bench, Recorded
from moe_sheet import Sheet, geomean

import moecache
from moecache import feedback, routing
from moecache.devices import Place, Places
from moecache.dispatch import Dispatcher
from moecache.kernels import registry as ops
from moecache.kernels.contract import Args
from moecache.kernels.fused_moe.op import FUSED_MOE, call_args
from moecache.kernels.sort.op import SORT, SortCall, usual_block_m
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Choice
from moecache.tuning.timing import DeviceClock, Stats, race

ROUTINGS = ("uniform", "dir4", "zipf", "hot1")
TOKENS = (64, 256, 1024)
KEYS = ("shape", "T", "routing")
RACE_SECONDS, SORT_SECONDS = 3.0, 0.2  # of one row at most
NEAR, SLACK_US = 1.03, 1.0  # a time within this of the best is as good

Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What stays the same during one run."""

    options: argparse.Namespace
    place: Place
    serving: Dispatcher
    bench: Bench


@dataclass(frozen=True)
class Group:
    """One layer at one token count: a case for each routing, and the static inputs that the graphs read."""

    cases: dict[str, Case]
    problems: dict[str, Problem]  # by routing
    static: Case

    def show(self, generator: str) -> Case:
        """Put one routing into the static inputs."""
        chosen = self.cases[generator]
        self.static.ids.copy_(chosen.ids)
        self.static.wts.copy_(chosen.wts)
        return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    place = Places().first() if options.device == "cuda" else Places().here("cpu", 0)
    sheet = Sheet("in_graph", place, "fused_moe", KEYS, merge=options.merge)
    todo = {(shape, tokens): rest for shape in options.shapes for tokens in options.tokens
            if (rest := missing(sheet, options, shape, tokens))}  # fmt: skip
    compile_ahead(place, options, list(todo))
    sheet.facts["host_us"] = host_cost(place)
    order = {"shape": list(options.known), "routing": ROUTINGS}
    with tuning(options) as serving:
        study, held = Study(options, place, serving, Bench(place)), None
        for shape, tokens in in_time(list(todo), options.budget_s):
            if held is None or held.shape != shape:
                held = None  # before the next ones are made
                held = weights(shape, str(place.torch_device), shape=options.known[shape])
            for row in rows(study, held, tokens, todo[shape, tokens]):
                sheet.add(row)
            print(sheet.save(order, summary(sheet.rows)), flush=True)
            if place.device.vendor != "cpu":
                torch.cuda.empty_cache()  # the pools of this group's graphs
    for name, told in summary(sheet.rows).items():
        print(f"{name}: {told}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = moe_grid.parser(__doc__, TOKENS)
    parser.set_defaults(routing=list(ROUTINGS), seconds=2.0)
    return moe_grid.parse(parser, arguments)


def missing(sheet: Sheet, options: argparse.Namespace, shape: str, tokens: int) -> list[str]:
    """The routings whose rows are to be measured."""
    return [
        name
        for name in options.routing
        if not (options.missing and sheet.has({"shape": shape, "T": tokens, "routing": name}))
    ]


def compile_ahead(place: Place, options: argparse.Namespace, todo: Sequence[tuple[str, int]]) -> None:
    """Fill Triton's disk cache with every candidate of the groups, one process a core."""
    problems = []
    for shape, tokens in todo:
        experts, topk, hidden, inner = options.known[shape]
        layer = Layer(model=shape, experts=experts, global_experts=experts, topk=topk, hidden=hidden,
                      intermediate=inner)  # fmt: skip
        problems += FUSED_MOE.problems(layer, [tokens], place.device)
    configs = dict.fromkeys(config for problem in problems for config in FUSED_MOE.space(problem, place.device))
    began = time.monotonic()
    precompile(FUSED_MOE, place, problems, list(configs))
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)


@contextmanager
def tuning(options: argparse.Namespace) -> Iterator[Dispatcher]:
    """The library as a user has it, but with the cache file and the tuning budget of the options."""
    with ExitStack() as stack, torch.no_grad():
        db = options.db or Path(stack.enter_context(tempfile.TemporaryDirectory()), "benchmark.sqlite")
        chosen = {"db": db, "path": (), "mode": "tune", "budget": options.seconds, "isolate": options.isolate}
        yield stack.enter_context(moecache.using(**chosen))


def in_time(groups: Sequence[tuple[str, int]], budget: float) -> Iterator[tuple[str, int]]:
    """Those that should end within so many seconds, judged by the longest before."""
    longest = 0.0
    for shape, tokens in groups:
        now = time.monotonic() - moe_grid.BEGAN
        if now + longest > budget:
            print(f"stopped before {shape} T={tokens}: --budget-s", flush=True)
            return
        yield shape, tokens
        longest = max(longest, time.monotonic() - moe_grid.BEGAN - now)


def rows(study: Study, held: Weights, tokens: int, generators: Sequence[str]) -> Iterator[Row]:
    """The rows of one layer at one token count."""
    options, began = study.options, time.monotonic()
    topk = options.known[held.shape][1]
    cases = {name: case(held, name, tokens, topk) for name in options.routing}
    group = Group(cases, measured(study, cases), static_inputs(cases[options.routing[0]]))
    asked = group.problems[options.routing[0]].any_routing
    choice = study.serving.choose(FUSED_MOE, asked)
    static = study.serving.peek(FUSED_MOE, group.problems[options.routing[0]]).config.name
    served, single = str(choice.alternatives or choice.config), choice.config.name
    ours, singles = graphs(study, group, asked)
    fixed = {"ours": ours} | ({"idle": idle} if (idle := beside(study, group, asked, choice)) else {})
    print(f"{held.shape} T={tokens}: {served}, {choice.reason}", flush=True)
    for name in generators:
        found = group.show(name)
        times = raced(study, fixed, singles, (static, single))
        best = min((each for each in times if each not in fixed), key=lambda each: times[each].median)
        picked = {"best_single": times[best], "ours": times["ours"], "static": times.get(static),
                  "single": times.get(single)}  # fmt: skip
        extra = times["idle"].median - times[single].median if {"idle", single} <= set(times) else None
        ours.run()
        row = {
            "shape": held.shape, "E": found.E, "topk": topk, "hidden": found.K, "intermediate": found.N, "T": tokens,
            "routing": name, "bucket": group.problems[name].routing,
            "us": {key: each and round(each.median, 2) for key, each in picked.items()},
            "mad_us": {key: each and round(each.mad, 2) for key, each in picked.items()},
            "config": {"best_single": best, "ours": served, "static": static, "single": single},
            "tier": choice.tier, "reason": choice.reason, "candidates": len(times) - len(fixed), "graph": ours.graph,
            "extra_us": extra if extra is None else round(extra, 2),
            "rel_err": float(f"{found.error(ours.result):.2e}"), "sort_us": sort_cost(study, group),
        }  # fmt: skip
        if not row["rel_err"] <= TOLERANCE["bf16"]:
            raise SystemExit(f"WRONG {held.shape} T={tokens} {name}: error {row['rel_err']:.2e}")
        shown = "  ".join(f"{key} {us}" for key, us in row["us"].items())
        print(f"{held.shape} T={tokens} {name}: {shown}  ({time.monotonic() - began:.0f} s)", flush=True)
        yield row


def measured(study: Study, cases: dict[str, Case]) -> dict[str, Problem]:
    """The problem of each routing; those that nobody has measured are measured now."""
    problems = {}
    for name, each in cases.items():
        bucket = routing.bucket(each.counts.tolist())
        problems[name] = FUSED_MOE.problem(args_of(each), study.place.device, bucket)
        if study.serving.peek(FUSED_MOE, problems[name]).tier != "measured":
            study.serving.measure(FUSED_MOE, problems[name], each.ids, seconds=study.options.seconds)
    return problems


def args_of(each: Case) -> Args:
    return call_args(each.x, each.w1, each.w2, each.wts, each.ids)


def static_inputs(first: Case) -> Case:
    """A case whose routing is overwritten from here on."""
    return replace(first, ids=first.ids.clone(), wts=first.wts.clone())


def graphs(study: Study, group: Group, asked: Problem) -> tuple[Recorded, dict[str, Recorded]]:
    """The graph of the public call, and one of every candidate that is right."""
    bench, static, layer = study.bench, group.static, ("in_graph", next(moe_grid.LAYERS))
    shown = group.show(next(iter(group.cases)))
    out, other = torch.empty_like(static.x), torch.empty_like(static.x)
    ours = bench.record(
        lambda: moecache.fused_moe(static.x, static.w1, static.w2, static.wts, static.ids, out=out, layer=layer)
    )
    slot = feedback.post(layer, asked.tokens, static.E, static.x.device)  # they post too: the choice is compared alone
    args, singles = replace(args_of(static), posted=slot.tensor), {}
    for config in FUSED_MOE.space(asked, study.place.device):
        recorded = moe_peers.attempt(config.name, partial(record_config, bench, config, args, other))
        if recorded is not None and shown.error(recorded.result) <= TOLERANCE["bf16"]:
            singles[config.name] = recorded
    return ours, singles


def record_config(bench: Bench, what: Config | Alternatives, args: Args, out: torch.Tensor) -> Recorded:
    """The graph of a config's launches."""
    return bench.record(partial(FUSED_MOE.bind(what, args, out), args, out))


def beside(study: Study, group: Group, asked: Problem, choice: Choice) -> Recorded | None:
    """The graph of the choice for any routing with a second config that never works; None where there can be none."""
    other = partner(asked, choice, FUSED_MOE.space(asked, study.place.device))
    if other is None:
        return None
    both, out = Alternatives(first=choice.config, second=other, served=()), torch.empty_like(group.static.x)
    args = replace(args_of(group.static), posted=torch.zeros(1, dtype=torch.int32, device=out.device))
    found = moe_peers.attempt(both.name, partial(record_config, study.bench, both, args, out))
    right = found is not None and group.show(next(iter(group.cases))).error(found.result) <= TOLERANCE["bf16"]
    return found if right else None


def partner(asked: Problem, choice: Choice, space: Sequence[Config]) -> Config | None:
    """A config that can take turns with the chosen one: the one that does, else one of another block height."""
    kind = ops.alternating(FUSED_MOE.name).kind
    able = [each for each in space if kind(asked, each) and kind(asked, each) == kind(asked, choice.config)]
    taken = [each for each in choice.configs if each in able and each != choice.config]
    return next(iter([*taken, *(each for each in able if each["block"] != choice.config["block"])]), None)


def raced(
    study: Study, fixed: dict[str, Recorded], singles: dict[str, Recorded], keep: Sequence[str]
) -> dict[str, Stats]:
    """Times of one routing; what is fixed or kept and whatever is near the best reach the final."""
    first = fixed | {name: singles[name] for name in keep if name in singles}
    samplers = {name: study.bench.sampler(each) for name, each in (first | singles).items()}
    return race(samplers, keep=list(first), deadline=time.perf_counter() + RACE_SECONDS)


def sort_cost(study: Study, group: Group) -> dict[str, float]:
    """µs of the layer's sort on the device, posting its routing to the host or not."""
    static, device, backend = group.static, study.place.device, study.place.backend
    assert backend is not None
    block = usual_block_m(static.T, static.topk, static.E)
    args = SortCall(static.ids, static.E, block)
    config = SORT.space(SORT.problem(args, device, ""), device)[0]
    slot = feedback.post(("in_graph", "sort"), static.T, static.E, static.ids.device)
    outs = {"posted": SORT.outputs(replace(args, posted=slot.tensor)), "alone": SORT.outputs(args)}
    clock = DeviceClock(backend, device)
    samplers = {n: clock.prepare([partial(SORT.bind(config, args, out), args, out)]) for n, out in outs.items()}
    found = race(samplers, keep=list(outs), deadline=time.perf_counter() + SORT_SECONDS)
    return {name: round(each.median, 3) for name, each in found.items()}


def host_cost(place: Place) -> dict[str, float]:
    """µs of finding a layer's slot, and of reading it."""
    at = torch.zeros(1, device=place.torch_device)
    slot = feedback.post(("in_graph", "host"), 64, 8, at.device)
    calls: dict[str, Callable[[], object]] = {
        "post": lambda: feedback.post(("in_graph", "host"), 64, 8, at.device),
        "read": lambda: feedback.read(slot, at.get_device()),
        "nothing": lambda: None,
    }
    return {name: round(statistics.median(host_us(call) for _ in range(15)), 3) for name, call in calls.items()}


def host_us(call: Callable[[], object], count: int = 2000) -> float:
    start = time.perf_counter_ns()
    for _ in range(count):
        call()
    return (time.perf_counter_ns() - start) / 1e3 / count


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """How far `ours`, `single` and `static` are from the best single config of each row, and what a second config
    costs."""
    out: dict[str, Any] = {"rows": len(rows), "within": f"{NEAR} x best + {SLACK_US} us"}
    for name in ("ours", "single", "static"):
        pairs = [(row["us"][name], row["us"]["best_single"]) for row in rows if row["us"].get(name)]
        if pairs:
            ratios = [us / best for us, best in pairs]
            out[name] = {
                "within": sum(us <= NEAR * best + SLACK_US for us, best in pairs),
                "over_best_geomean": geomean(ratios),
                "over_best_max": round(max(ratios), 4),
            }
    if extra := [row["extra_us"] for row in rows if row.get("extra_us") is not None]:
        out["extra_us"] = {"median": round(statistics.median(extra), 2), "max": max(extra), "rows": len(extra)}
    return out


if __name__ == "__main__":
    main()
