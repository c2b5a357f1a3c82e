"""Dispatch, combine and the whole layer across GPUs: ours beside the collectives of NCCL or RCCL.

    torchrun --standalone --nproc-per-node N benchmarks/ep.py [--tokens 1 128 4096] [--wires same fp8] [--no-layer]

All times are microseconds a call in a captured graph of several calls, the slowest rank's. `ours` is the fastest of a
few configs, timed again beside the baselines in rounds of alternating order; `choice` names it and `all_us` has every
config's first timing. `ag_rs` is all-gather and reduce-scatter of rows, ids and weights; `a2a` is all-to-all of the
same, after a copy of the rows for each rank; `rows_ag` and `rows_a2a` move rows alone. The layer has
`moecache.fused_moe` in all columns, tuned once for all of them; `experts` is that alone, on the rows of an all-gather.
A hook brings other experts: the function that `--experts-of` names is called with (w1, w2, expert_map), and gives
{name: callable}. A callable takes (rows, ids, weights) and gives [R, hidden]. It is timed between all-gather and
reduce-scatter.

Rows of phase `link` say what the link carries without flags: see ep_link.py.

`gb_s` are bytes of rows that have to reach another GPU, each row once a GPU, over the time of ours, of the rank that
sends most; `p2p_gb_s` is a plain copy to the peers on all GPUs at once, in the same run. Every result is checked before
it is timed. Data is as warm as calls in a row leave it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))

from record import folder_of, named, save

import moecache
from moecache import routing
from moecache.devices import Places
from moecache.kernels.ep import collectives
from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import CombineConfig, DispatchConfig, Received, combine, dispatch
from moecache.kernels.ep.layer import dequantised, ep_moe

Call = Callable[[int], Any]  # of the number of the call in its graph
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of rows, ids and weights
TOKENS, WIRES, ROUTINGS = (1, 16, 128, 1024, 4096), ("same", "fp8"), ("uniform", "hot_rank")
ROUNDS, REPLAYS = 4, 12
COPY_BYTES = 512 << 20
MODELS = {"deepseek_v3": (7168, 256, 8, 2048), "qwen3_30b_a3b": (2048, 128, 8, 768)}  # hidden, experts, top-k, inner
TUNING = 5.0  # seconds for each problem of a layer

DISPATCH = [DispatchConfig("push", 128, *rest) for rest in ((8, 1024), (8, 2048), (8, 4096), (8, 8192), (16, 8192))]
COMBINE = [
    *(CombineConfig("pull", *rest) for rest in ((128, 8, 1024), (128, 8, 4096), (128, 16, 8192), (256, 8, 4096),
                                                (512, 4, 2048))),
    *(CombineConfig("push", *rest) for rest in ((64, 16, 8192, 16), (64, 16, 8192, 32), (96, 16, 8192, 16),
                                                (128, 16, 8192, 16), (128, 8, 8192, 16))),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One routing of so many tokens a rank, as this rank has it."""

    tokens: int
    routing: str
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    everybody: torch.Tensor  # ids of all ranks [world, T, K]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    rank, world, seconds, tell = begun()
    rows: list[dict[str, Any]] = []
    place = Places().first()

    def write() -> None:  # after each part: what a time limit cuts off loses no more
        if rank == 0:
            launcher = f"torchrun --standalone --nproc-per-node {world}"
            where = save("ep", f"{folder_of(place)}x{world}", place, rows, launcher=launcher)
            if options.out:
                options.out.write_text(where.read_text())

    with torch.no_grad(), moecache.using(mode="replay"):
        copy = 0.0
        for ctx, speed, case in cases(options, seconds, tell):
            copy = copy or speed
            for row in phases(ctx, case, options.only):
                row |= {"p2p_gb_s": round(copy, 1)}
                rows.append(head(ctx, case) | row)
                tell(show(rows[-1]))
            write()
    for model in options.models if options.layer else ():
        for row in layers(model, options, tell, seconds):
            rows.append(row | {"p2p_gb_s": round(copy, 1)})
            tell(show(rows[-1]))
            write()
    if options.link:
        from ep_link import links

        with EpContext(None, options.hidden, options.experts, options.topk, max(options.tokens)) as ctx:
            for tokens in sorted({1024, 4096} & set(options.tokens)):
                for row in links(ctx, tokens, captured, timed):
                    rows.append(row)
                    tell(f"link T={tokens} at_once={row['at_once']}: {row['us']} us, {row['gb_s']} GB/s")
        write()
    dist.destroy_process_group()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--wires", nargs="+", choices=WIRES, default=list(WIRES))
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--only", nargs="+", choices=("dispatch", "combine"), default=["dispatch", "combine"])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="whose layers are timed")
    parser.add_argument("--no-layer", dest="layer", action="store_false")
    parser.add_argument("--no-link", dest="link", action="store_false", help="as on AMD, for which it is not written")
    parser.add_argument("--experts-of", nargs="+", default=[], metavar="MODULE:FUNCTION", help="hooks, see above")
    parser.add_argument("--budget-s", type=float, default=120, help="begin no cell after so many seconds")
    parser.add_argument("--out", type=Path, help="write the file here too")
    return parser.parse_args(arguments)


def begun() -> tuple[int, int, Callable[[], float], Callable[[str], None]]:
    """The process group of torchrun: rank, ranks, seconds since now, and what prints a line on rank 0."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    rank, world, began = dist.get_rank(), dist.get_world_size(), time.monotonic()

    def seconds() -> float:
        return time.monotonic() - began

    def tell(text: str) -> None:
        if rank == 0:
            print(f"{seconds():5.0f} s  {text}", flush=True)

    return rank, world, seconds, tell


def cases(
    options: argparse.Namespace, seconds: Callable[[], float], tell: Callable[[str], None]
) -> Iterator[tuple[EpContext, float, Case]]:
    """Every case that may begin in time, with the context and the GB/s of a copy over its wire's memory."""
    for wire in options.wires:
        with EpContext(None, options.hidden, options.experts, options.topk, max(options.tokens), wire=wire,
                       slots=2) as ctx:  # fmt: skip
            copy = copy_speed(ctx)
            tell(f"wire {wire}, copy to the peer {copy:.0f} GB/s")
            for tokens in options.tokens:
                for name in options.routing:
                    if ctx.team.broadcast("seconds", seconds()) > options.budget_s:
                        tell("out of time")
                        continue
                    yield ctx, copy, drawn(ctx, tokens, name)
                    ctx.check()


def drawn(ctx: EpContext, tokens: int, name: str) -> Case:
    """Random rows and routing; with hot_rank all tokens choose experts of rank 0."""
    among = len(ctx.experts_of(0)) if name == "hot_rank" else ctx.experts
    ids = torch.stack([routing.draw("uniform", tokens, among, ctx.topk, 77 + rank) for rank in range(ctx.world)])
    rng = torch.Generator(device=ctx.device).manual_seed(ctx.rank)
    x = torch.randn(tokens, ctx.hidden, device=ctx.device, generator=rng).to(ctx.dtype)
    weights = torch.rand(tokens, ctx.topk, device=ctx.device, generator=rng)
    return Case(tokens, name, x, ids[ctx.rank].to(ctx.device), weights, ids)


def remote_rows(ctx: EpContext, case: Case) -> tuple[int, int]:
    """(rows that have to leave the rank that sends most, each once a peer; as many if each expert got a copy)."""
    owner = torch.zeros(ctx.experts, dtype=torch.int64)
    for rank in range(ctx.world):
        held = ctx.experts_of(rank)
        owner[held.start : held.stop] = rank
    unique, copies = [0], [0]
    for rank in range(ctx.world):
        there = torch.nn.functional.one_hot(owner[case.everybody[rank].long()], ctx.world)
        there[:, :, rank] = 0
        unique.append(int(there.amax(1).sum()))
        copies.append(int(there.sum()))
    return max(unique), max(copies)


def head(ctx: EpContext, case: Case) -> dict[str, Any]:
    return {"world": ctx.world, "T": case.tokens, "hidden": ctx.hidden, "topk": ctx.topk, "E": ctx.experts,
            "routing": case.routing, "wire": ctx.wire}  # fmt: skip


def phases(ctx: EpContext, case: Case, only: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of dispatch and combine."""
    row_bytes = ctx.hidden + ctx.hidden // 32 if ctx.wire == "fp8" else 2 * ctx.hidden
    found, (unique, copies) = [], remote_rows(ctx, case)
    got = [checked_dispatch(ctx, case) for _ in range(ctx.slots)]
    if "dispatch" in only:
        ours = {config: partial(one_dispatch, ctx, case, config) for config in DISPATCH}
        sent = (*wire_rows(ctx, case), case.ids, case.weights)
        theirs: dict[str, Call] = {
            "a2a": lambda number: collectives.swap(ctx, *sent), "ag_rs": lambda number: collectives.gather(ctx, *sent),
            "rows_a2a": lambda number: collectives.swap(ctx, sent[0]),
            "rows_ag": lambda number: collectives.gather(ctx, sent[0]),
        }  # fmt: skip
        found.append({"phase": "dispatch"} | race(ctx, case, ours, theirs, unique, copies, row_bytes))
    if "combine" in only and ctx.wire == "same":
        y = [result(ctx, each) for each in got]
        for config in COMBINE:
            check_combine(ctx, case, got, y, config)
        ours = {config: partial(one_combine, ctx, got, y, config) for config in COMBINE}
        theirs = {
            "a2a": lambda number: collectives.swap_back(ctx, y[0]),
            "ag_rs": lambda number: collectives.scatter(ctx, y[0]),
        }
        back = remote_rows(ctx, case)[0]
        found.append({"phase": "combine"} | race(ctx, case, ours, theirs, back, copies, 2 * ctx.hidden))
    return found


def wire_rows(ctx: EpContext, case: Case) -> tuple[torch.Tensor, ...]:
    """What a baseline sends: with the fp8 wire rows that are quantised already."""
    if ctx.wire == "same":
        return (case.x,)
    return case.x.to(ctx.fp8).view(torch.uint8), torch.ones(case.tokens, ctx.hidden // 128, device=ctx.device)


def one_dispatch(ctx: EpContext, case: Case, config: DispatchConfig, number: int) -> Received:
    return dispatch(ctx, case.x, case.ids, case.weights, capacity=case.tokens, config=config)


def one_combine(ctx: EpContext, got: list[Received], y: list[torch.Tensor], config: CombineConfig, number: int) -> Any:
    each = got[number % len(got)]
    return combine(ctx, each.sums if config.how == "pull" else y[number % len(got)], each.handle, config=config)


def checked_dispatch(ctx: EpContext, case: Case) -> Received:
    """A dispatch whose rows are those of an all-gather, bit for bit unless they are fp8."""
    got = dispatch(ctx, case.x, case.ids, case.weights, capacity=case.tokens)
    rows, ids, weights = collectives.gather(ctx, case.x, case.ids, case.weights)
    mine = torch.where(ctx.expert_map[ids.long()] >= 0, ids, -1)
    here = (mine >= 0).any(1)
    ctx.check()
    assert torch.equal(got.ids, mine) and torch.equal(got.weights, weights) and (got.counts == case.tokens).all()
    if ctx.wire == "same":
        assert torch.equal(got.rows[here], rows[here])
    else:
        assert torch.allclose(dequantised(ctx, got)[here].float(), rows[here].float(), rtol=0.07, atol=0.02)
    return got


def result(ctx: EpContext, got: Received) -> torch.Tensor:
    """What experts might leave, zero where a row holds nothing; also in `sums`."""
    held = got.ids >= 0
    scale = (got.weights * held).sum(1, keepdim=True)
    y = torch.where(held.any(1, keepdim=True), dequantised(ctx, got).float() * scale, 0).to(ctx.dtype)
    return y.contiguous()


def check_combine(
    ctx: EpContext, case: Case, got: list[Received], y: list[torch.Tensor], config: CombineConfig
) -> None:
    for number, each in enumerate(got):
        if config.how == "pull":
            each.sums.copy_(y[number])
        out = one_combine(ctx, got, y, config, number)
        ctx.check()
        want = case.x.double() * case.weights.double().sum(1, keepdim=True)
        error = (out.double() - want).norm() / want.norm()
        assert error < 1e-2, f"{config}: error {error}"


def race(
    ctx: EpContext, case: Case, ours: dict[Any, Call], theirs: dict[str, Call], unique: int, copies: int, row: int
) -> dict[str, Any]:
    """The fastest of ours, then beside theirs."""
    calls = 20 if case.tokens < 1024 else 6
    first = timed({config: captured(ctx, call, calls) for config, call in ours.items()}, calls, 1)
    ctx.check()
    best = min(first, key=lambda config: first[config])
    graphs = {"ours": captured(ctx, ours[best], calls)} | {n: captured(ctx, c, calls) for n, c in theirs.items()}
    us = timed(graphs, calls, ROUNDS)
    ctx.check()
    return {
        "us": {name: round(value, 2) for name, value in us.items()},
        "gb_s": round(unique * row / us["ours"] / 1e3, 1), "remote_bytes": unique * row, "logical_bytes": copies * row,
        "choice": asdict(best), "all_us": {short(config): round(value, 2) for config, value in first.items()},
    }  # fmt: skip


def short(config: Any) -> str:
    return " ".join(str(value) for value in asdict(config).values())


def captured(ctx: EpContext, call: Call, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls, replayed once."""
    call(0), call(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def timed(graphs: dict[Any, torch.cuda.CUDAGraph], calls: int, rounds: int, runs: bool = True) -> dict[Any, float]:
    """Median µs of a call, of the slowest of the ranks that run them."""
    samples: dict[Any, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds if runs else 0):
        for name in list(graphs)[:: -1 if turn % 2 else 1]:
            graphs[name].replay()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
            events[0].record()
            for event in events[1:]:
                graphs[name].replay()
                event.record()
            events[-1].synchronize()
            samples[name] += [a.elapsed_time(b) * 1e3 / calls for a, b in pairwise(events)]
    medians = torch.tensor([statistics.median(each or [0.0]) for each in samples.values()], device="cuda")
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    return dict(zip(samples, medians.tolist(), strict=True))


def copy_speed(ctx: EpContext) -> float:
    """GB/s of a plain copy to the next rank's memory, all ranks at once; of the slowest."""
    size = min(COPY_BYTES, ctx.parts.slot * ctx.slots) // 256 * 256
    there = ctx.peers.handle.get_buffer((ctx.rank + 1) % ctx.world, (size,), torch.uint8, ctx.parts.first_slot)
    here = torch.ones(size, dtype=torch.uint8, device=ctx.device)
    graph = captured(ctx, lambda number: there.copy_(here), 2)
    dist.barrier()
    (us,) = timed({"copy": graph}, 2, 2).values()
    return size / us / 1e3


def layers(
    model: str, options: argparse.Namespace, tell: Callable[[str], None], seconds: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """The whole layer of a model, of weights that are drawn on the device, with the configs that are fastest in its
    phases. Each column has the same experts."""
    hidden, experts, topk, inner = MODELS[model]
    with (
        torch.no_grad(), tempfile.TemporaryDirectory() as folder,
        moecache.using(mode="tune", db=Path(folder, "layer.sqlite"), budget=TUNING),
        EpContext(None, hidden, experts, topk, max(options.tokens), slots=2, patience=120.0) as ctx,
    ):  # fmt: skip
        held = len(ctx.experts_of(ctx.rank))
        rng = torch.Generator(device=ctx.device).manual_seed(5)
        made = [torch.empty(held, *shape, dtype=ctx.dtype, device=ctx.device).normal_(0, 0.02, generator=rng)
                for shape in ((2 * inner, hidden), (hidden, inner))]  # fmt: skip
        for tokens in options.tokens:
            if ctx.team.broadcast("seconds", seconds()) > options.budget_s:
                tell("out of time")
                return
            case = drawn(ctx, tokens, "uniform")
            moved = phases(ctx, case, ("dispatch", "combine"))
            configs = {f"{row['phase']}_config": kind(**row["choice"])
                       for row, kind in zip(moved, (DispatchConfig, CombineConfig), strict=True)}  # fmt: skip
            if (hidden, experts) != (options.hidden, options.experts):
                yield from (head(ctx, case) | row for row in moved)

            def ours(number: int, case: Case = case, configs: dict[str, Any] = configs) -> torch.Tensor:
                return ep_moe(ctx, case.x, *made, case.weights, case.ids, fused_moe=moecache.fused_moe,
                              capacity=case.tokens, **configs)  # fmt: skip

            def local(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
                return moecache.fused_moe(rows, *made, weights, ids, expert_map=ctx.expert_map)

            def ag_rs(number: int, case: Case = case) -> torch.Tensor:
                return collectives.scatter(ctx, local(*collectives.gather(ctx, case.x, case.ids, case.weights)))

            def a2a(number: int, case: Case = case) -> torch.Tensor:
                return collectives.swap_back(ctx, local(*collectives.swap(ctx, case.x, case.ids, case.weights)))

            def others(number: int, experts_of: Experts, case: Case = case) -> torch.Tensor:
                rows, ids, weights = collectives.gather(ctx, case.x, case.ids, case.weights)
                return collectives.scatter(ctx, experts_of(rows, ids, weights))

            sent = collectives.gather(ctx, case.x, case.ids, case.weights)
            for _ in range(3):
                local(*sent)  # tuned, and its routing posted
            dist.barrier()
            calls = {"ours": ours, "ag_rs": ag_rs, "a2a": a2a}
            hooks = hooked(options, ctx, made)
            calls |= {name: partial(others, experts_of=each) for name, each in hooks.items()}
            results = {name: call(0).double() for name, call in calls.items()}
            ctx.check()
            for name, value in results.items():
                error = (value - results["ag_rs"]).norm() / results["ag_rs"].norm()
                if not error < 1e-2:
                    assert name in hooks, f"{name}: error {error}"
                    del calls[name]
                    tell(f"{name} is left out: error {error}")
            many = 10 if tokens < 128 else 4 if tokens < 1024 else 2
            graphs = {name: captured(ctx, call, many) for name, call in calls.items()}
            graphs["experts"] = captured(ctx, lambda number, sent=sent: local(*sent), many)
            us = timed(graphs, many, ROUNDS)
            ctx.check()
            layer = {"phase": "layer", "model": model, "intermediate": inner}
            yield head(ctx, case) | layer | {"us": {name: round(value, 1) for name, value in us.items()}}


def hooked(options: argparse.Namespace, ctx: EpContext, made: Sequence[torch.Tensor]) -> dict[str, Experts]:
    """The experts of other libraries."""
    found: dict[str, Experts] = {}
    for hook in named(options.experts_of, "function"):
        found |= hook(*made, ctx.expert_map)
    return found


def show(row: dict[str, Any]) -> str:
    times = "  ".join(f"{name} {value}" for name, value in row["us"].items())
    speed = f"{row['gb_s']} GB/s of {row['p2p_gb_s']}" if "gb_s" in row else ""
    choice = " ".join(f"{name}={value}" for name, value in row.get("choice", {}).items())
    cell = f"{row['phase']} T={row['T']} {row['routing']} {row['wire']}"
    return f"{cell}: {times}  {speed}  {choice}  {row.get('all_us', '')}"


if __name__ == "__main__":
    main()
