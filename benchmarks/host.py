"""Host time of one eager call of `moecache.fused_moe`, a hit, beside vLLM's and SGLang's; and a chain of such layers.

    python benchmarks/host.py [--peers module:function] [--prewarm] [--shapes olmoe] [--tokens 1 16]
    python benchmarks/host.py --smoke      a tiny layer on the CPU: shows that it runs

`us` of a row is the host's microseconds for one call. Calls come in batches of 8. The device is waited for between the
batches, outside of the time, so that the launch queue is never full. `torch_add` is `x.add_(1)` on the hidden states:
what the launch of one small kernel costs here. `launches` are the kernels, copies and fills that one call of ours
enqueues. A profiler counts them after everything is timed.

`chain_ms` is the wall time of 48 eager layers, one after the other, up to the end of a synchronise. Every layer has its
own weights and name. Where memory holds fewer weights, `weight_sets` of them take turns. All layers read the same
hidden states and router output. `graph_ms` is the wall time of the same chain as one captured graph, `replay_us` what
of it the host needs to launch that graph.

Everything of a cell is in one process, in rounds of alternating order. Figures are medians, spreads are median absolute
deviations. Every result is compared with a float32 reference first; what is wrong is not timed. Ours is measured for
`--seconds` a problem beforehand, and then served in mode `replay`. Peers are those of moe_peers.py.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # also when this is imported as benchmarks.host

import moe_case
import moe_peers
import record
from moe_case import TOLERANCE, Case, Weights

import moecache
from moecache.devices import Place, Places
from moecache.models import model_of

SHAPES = {  # experts, top-k, hidden, intermediate, as one GPU sees them
    "qwen3_30b_a3b": (128, 8, 2048, 768),
    "mixtral_tp8": (8, 2, 4096, 1792),
    "olmoe": (64, 8, 2048, 1024),
    "gptoss_120b": (128, 4, 2880, 2880),
}
TOKENS = (1, 8, 16, 64, 256, 1024)
TINY, TINY_TOKENS = {"tiny": (8, 2, 64, 48)}, (1, 5)  # what --smoke runs
PEERS = ("vllm", "sglang")
ROUTING = "uniform"
BATCH = 8  # calls; a launch queue holds about a thousand launches
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories in a profiler's trace
MEMORY = 0.8  # of what is free: for the weights of a chain
OVERHEAD_US, SHARE = 5.0, 0.4  # goals: above `torch_add` for each launch, and of vLLM's time
SPREADS = {"chain_ms": "spread_ms"}  # the others are called after what they are the spread of
BEGAN = time.monotonic()

Call = Callable[[], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What stays the same during one run."""

    options: argparse.Namespace
    hooks: Sequence[moe_peers.Hook]
    device: torch.device
    wait: Callable[[], None]  # for the device


def main(arguments: Sequence[str] | None = None) -> Path | None:
    options = parse(arguments)
    if options.prewarm:
        moe_peers.prewarm(__file__, options, sys.argv[1:] if arguments is None else arguments)
    place = Places().here("cpu", 0) if options.smoke else Places().first()
    wait = torch.cuda.synchronize if place.torch_device.type == "cuda" else lambda: None
    run = Run(options, record.named(options.peers, "function"), place.torch_device, wait)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        if options.once:
            compiled(run)
            return None
        db = options.db or Path(folder, "host.sqlite")
        tiers = tune(options, db)
        with moecache.using(mode="replay", db=db, path=()):
            return measured(run, place, {"peers": moe_peers.versions(options.peers), "tiers": tiers})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", help="all by default")
    add("--tokens", type=int, nargs="+", help="default: " + " ".join(map(str, TOKENS)))
    add("--peers", nargs="+", default=[], metavar="MODULE:FUNCTION", help="more peers, see moe_peers.py")
    add("--prewarm", action="store_true", help="compile the peers in parallel processes first")
    add("--once", action="store_true", help="run every peer once, time nothing")
    add("--seconds", type=float, default=1.0, help="of measuring a problem of ours beforehand")
    add("--db", type=Path, help="keep what is measured in this cache file, and use what it holds")
    add("--rounds", type=int, default=41, help="batches of each call; a quarter as many chains")
    add("--layers", type=int, default=48, help="of a chain; 0: no chains")
    add("--budget-s", type=float, default=225.0, help="stop before a cell that begins later than this")
    add("--smoke", action="store_true", help="a tiny layer on the CPU")
    options = parser.parse_args(arguments)
    options.known = TINY if options.smoke else SHAPES
    options.shapes = options.shapes or list(options.known)
    options.tokens = options.tokens or list(TINY_TOKENS if options.smoke else TOKENS)
    if unknown := set(options.shapes) - set(options.known):
        parser.error(f"unknown shapes {', '.join(sorted(unknown))}; there are {', '.join(options.known)}")
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("there is no GPU here; --smoke shows on a CPU that it runs")
    return options


def tune(options: argparse.Namespace, db: Path) -> Counter[str]:
    """Measure what the cells ask for; how many problems are served from which tier."""
    with moecache.using(mode="tune", db=db, path=()):
        layers = [layer for shape in options.shapes for layer in model_of(*options.known[shape]).layers]
        limit = options.seconds * len(layers) * len(options.tokens)
        rows = moecache.warmup(layers, tokens=options.tokens, routing=[ROUTING], ops=["fused_moe"], budget=limit)
    print(f"{len(rows)} problems are known after {time.monotonic() - BEGAN:.0f} s", flush=True)
    return Counter(row.tier for row in rows)


def compiled(run: Run) -> None:
    """Every peer once in every cell, which compiles it."""
    for shape in run.options.shapes:
        held = weights(run, shape)
        for tokens in run.options.tokens:
            for name, call in peers(run, case(run, held, tokens)).items():
                moe_peers.attempt(name, call)


def measured(run: Run, place: Place, facts: Row) -> Path | None:
    """Time every cell, count launches at the end, and write the file after each step, so that nothing is lost."""
    rows: list[Row] = []
    facts |= {"batch": BATCH, "rounds": run.options.rounds, "layers": run.options.layers}

    def save() -> Path:
        return record.save("host", record.folder_of(place), place, rows, **facts, summary=summary(rows))

    for shape in run.options.shapes:
        for row in cells(run, shape):
            rows.append(row)
            save()
    for row in rows:
        if run.device.type == "cuda" and "ours" in row["us"]:
            row["launches"] = launches(run, row)
    if not rows:
        return None
    where = save()
    print(summary(rows), where, sep="\n")
    return where


def cells(run: Run, shape: str) -> Iterable[Row]:
    """The rows of a shape."""
    sets = [weights(run, shape)]
    sets += copies(run, sets[0])
    for tokens in run.options.tokens:
        if time.monotonic() - BEGAN > run.options.budget_s:
            print(f"stopped before {shape} T={tokens}: --budget-s", flush=True)
            return
        row: Row = {"shape": shape, "T": tokens}
        given = case(run, sets[0], tokens)
        calls = right(run, given, {"ours": ours(given, 0)} | peers(run, given))
        calls["torch_add"] = partial(given.x.clone().add_, 1)
        row |= figures("us", alternate(calls, run.options.rounds, lambda call: enqueued(run, call)), 2)
        row["launches"] = None  # counted at the end
        if run.options.layers:
            chains = chain(run, given, sets, [name for name in calls if name in ("ours", "vllm")])
            rounds = max(3, run.options.rounds // 4)
            row |= figures("chain_ms", alternate(chains, rounds, lambda calls: finished(run, calls)), 3)
            if run.device.type == "cuda":
                graphs = {name: captured(calls) for name, calls in chains.items()}
                row |= figures("graph_ms", alternate(graphs, rounds, lambda replay: finished(run, [replay])), 3)
                row |= figures("replay_us", alternate(graphs, rounds, lambda replay: launched(run, replay)), 1)
            row["weight_sets"] = min(len(sets), run.options.layers)
        print(row, flush=True)
        yield row


# --- what is called ---


def weights(run: Run, shape: str) -> Weights:
    return moe_case.weights(shape, str(run.device), shape=run.options.known[shape])


def copies(run: Run, first: Weights) -> list[Weights]:
    """Weights of the other layers of a chain, or of as many as memory holds."""
    room = run.options.layers
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # the weights of the shape before
        room = int(MEMORY * torch.cuda.mem_get_info()[0] / first.bytes_of_expert / len(first.w1))
    return [replace(first, w1=first.w1.clone(), w2=first.w2.clone()) for _ in range(min(room, run.options.layers - 1))]


def case(run: Run, held: Weights, tokens: int) -> Case:
    return moe_case.case(held, ROUTING, tokens, run.options.known[held.shape][1])


def ours(given: Case, layer: int) -> Call:
    """The public call, which allocates its result, as the peers do."""
    x, w1, w2, wts, ids, name = given.x, given.w1, given.w2, given.wts, given.ids, ("host", given.T, layer)
    return lambda: moecache.fused_moe(x, w1, w2, wts, ids, layer=name)


def peers(run: Run, given: Case) -> dict[str, Call]:
    """Those of PEERS that are here."""
    return {name: call for name, call in moe_peers.collect(given, run.hooks).items() if name in PEERS}


def right(run: Run, given: Case, calls: dict[str, Call]) -> dict[str, Call]:
    """The calls whose results are right, called often enough to be hits."""
    found = {}
    for name, call in calls.items():
        results = [moe_peers.attempt(name, call) for _ in range(3)]
        run.wait()
        if results[-1] is None:
            continue
        if (error := given.error(results[-1])) <= TOLERANCE["bf16"]:
            found[name] = call
        else:
            print(f"WRONG {name} {given.weights.shape} T={given.T}: error {error:.2e}", flush=True)
    return found


def chain(run: Run, given: Case, sets: Sequence[Weights], names: Sequence[str]) -> dict[str, list[Call]]:
    """The calls of a chain's layers, each called often enough to be a hit."""
    found: dict[str, list[Call]] = {name: [] for name in names}
    for layer in range(run.options.layers):
        own = replace(given, weights=sets[layer % len(sets)])
        calls = {"ours": ours(own, layer)} | (peers(run, own) if "vllm" in names else {})
        for name in names:
            found[name].append(calls[name])
    for calls_of_layers in found.values():
        for _ in range(3):
            finished(run, calls_of_layers)
    return found


# --- how it is timed ---


def alternate(calls: dict[str, Any], rounds: int, sample: Callable[[Any], float]) -> dict[str, list[float]]:
    """Samples of each, forth and back through the list."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            found[name].append(sample(calls[name]))
    return found


def enqueued(run: Run, call: Call) -> float:
    """Host µs of one call of a batch, while nothing is waited for."""
    run.wait()
    began = time.perf_counter_ns()
    for _ in range(BATCH):
        call()
    return (time.perf_counter_ns() - began) / 1e3 / BATCH


def finished(run: Run, calls: Sequence[Call]) -> float:
    """Wall ms of all calls, until the device has done them."""
    run.wait()
    began = time.perf_counter_ns()
    for call in calls:
        call()
    run.wait()
    return (time.perf_counter_ns() - began) / 1e6


def captured(calls: Sequence[Call]) -> Call:
    """The replay of a graph of all calls, replayed once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph.replay


def launched(run: Run, replay: Call) -> float:
    """Host µs of launching a graph while nothing runs."""
    run.wait()
    began = time.perf_counter_ns()
    replay()
    return (time.perf_counter_ns() - began) / 1e3


def figures(name: str, samples: dict[str, list[float]], digits: int) -> Row:
    """Median and spread of each."""
    middle = {each: statistics.median(values) for each, values in samples.items()}
    spread = {each: statistics.median(abs(v - middle[each]) for v in values) for each, values in samples.items()}
    return {
        what: {each: round(value, digits) for each, value in found.items()}
        for what, found in ((name, middle), (SPREADS.get(name, f"spread_{name}"), spread))
    }


def launches(run: Run, row: Row) -> int | None:
    """What one hit of ours enqueues; None where the profiler sees nothing of the device."""
    call = ours(case(run, weights(run, row["shape"]), row["T"]), 0)
    for _ in range(3):
        call()
    run.wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        run.wait()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(str(trace := Path(folder, "trace.json")))
        return work(json.loads(trace.read_text())) or None


def work(trace: Row) -> int:
    """Pieces of work for the device in a profiler's trace; the host's calls and the profiler's own are others."""
    return sum(event.get("cat") in ON_DEVICE for event in trace["traceEvents"])


def summary(rows: Sequence[Row]) -> Row:
    """The worst cells, and how many miss the goals."""
    share = [row["us"]["ours"] / row["us"]["vllm"] for row in rows if {"ours", "vllm"} <= row["us"].keys()]
    over = [row["us"]["ours"] - row["launches"] * row["us"]["torch_add"] for row in rows if row["launches"]]
    chains = [row["chain_ms"] for row in rows if {"ours", "vllm"} <= row.get("chain_ms", {}).keys()]
    slower = [times["ours"] / times["vllm"] for times in chains]
    return {
        "cells": len(rows),
        "ours_over_vllm_max": round(max(share), 3) if share else None,
        "cells_over_share": sum(each > SHARE for each in share),
        "us_above_launches_max": round(max(over), 2) if over else None,
        "cells_above_overhead": sum(each > OVERHEAD_US for each in over),
        "chain_ours_over_vllm_max": round(max(slower), 3) if slower else None,
        "chains_slower": sum(each > 1 for each in slower),
    }


if __name__ == "__main__":
    main()
