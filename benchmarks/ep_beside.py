"""Dispatch and combine of other libraries beside ours, in one run.

    torchrun --standalone --nproc-per-node N benchmarks/ep_beside.py --peers ep_libraries:FlashInfer

A row is a case: `us` are microseconds of a dispatch and the combine after it, in a captured graph of several such round
trips, the slowest rank's. `dispatch_us` and `combine_us` come from a second graph with events between the two; an event
takes time too, so they add up to more. `ours` has the configs that ep.json names for the case, or, if there are none,
those of an untuned call. `ag_rs` is all-gather and reduce-scatter. With the fp8 wire everybody gets rows that are
quantised already, and results travel as bf16.

`peers` says the version of each, or why it is not there. One that is wrong, or fails on a rank, is left out on all.
"""

import argparse
import ctypes
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))

from ep import ROUTINGS, TOKENS, WIRES, Case, begun, captured, cases, head, timed, wire_rows
from ep_peers import Gathered, Ours, Peer, Rows, verified
from record import folder_of, named, save
from record import load as recorded

import moecache
from moecache.devices import Places
from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import CombineConfig, DispatchConfig

Result = TypeVar("Result")
Events = list[list[torch.cuda.Event]]
REPLAYS = 12
SHOWN = ("T", "routing", "wire", "us", "dispatch_us", "combine_us")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    rank, world, seconds, tell = begun()
    place = Places().first()
    folder = f"{folder_of(place)}x{world}"
    known = (recorded("ep", folder) or {"rows": []})["rows"]
    rows: list[dict[str, Any]] = []
    told: dict[str, str] = {}
    classes = [each for each in named(options.peers, "class") if usable(each, told)]
    tell(str(told))
    with torch.no_grad(), moecache.using(mode="replay"):
        for ctx, copy, case in cases(options, seconds, tell):
            Ours.configs = configs_of(head(ctx, case), known)
            row = round_trips(ctx, case, wire_rows(ctx, case), classes, told)
            rows.append(head(ctx, case) | row | {"p2p_gb_s": round(copy, 1)})
            tell(str({key: value for key, value in rows[-1].items() if key in SHOWN}))
            if rank == 0:  # after each case: the next one may never end
                where = save("ep_beside", folder, place, rows, peers=told, nccl=loaded_nccl(),
                             launcher=f"torchrun --standalone --nproc-per-node {world}")  # fmt: skip
                if options.out:
                    options.out.write_text(where.read_text())
    tell(str(told))
    dist.destroy_process_group()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=[], metavar="MODULE:CLASS", help="as ep_peers.Peer says")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--wires", nargs="+", choices=WIRES, default=list(WIRES))
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["uniform"])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--budget-s", type=float, default=120, help="begin no case after so many seconds")
    parser.add_argument("--out", type=Path, help="write the file here too")
    return parser.parse_args(arguments)


def loaded_nccl() -> int:
    """Version of the library that is loaded, 23007 for 2.30.7; torch names the one it was built with."""
    number = ctypes.c_int()
    ctypes.CDLL("librccl.so.1" if torch.version.hip else "libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    return number.value


def configs_of(
    case: dict[str, Any], known: Sequence[dict[str, Any]]
) -> tuple[DispatchConfig | None, CombineConfig | None]:
    """What ep.json chose for this case; combine is measured with the plain wire."""
    chosen = {}
    for row in known:
        wire = case["wire"] if row["phase"] == "dispatch" else "same"
        if "choice" in row and all(row[key] == value for key, value in (case | {"wire": wire}).items()):
            chosen[row["phase"]] = row["choice"]
    return (
        DispatchConfig(**chosen["dispatch"]) if "dispatch" in chosen else None,
        CombineConfig(**chosen["combine"]) if "combine" in chosen else None,
    )


def usable(peer: type[Peer], told: dict[str, str]) -> bool:
    """Whether all ranks can import it."""

    def imported() -> str:
        peer.prepare()
        return peer.version()

    version = together(peer, "import", imported, told)
    if version is not None:
        told[peer.name] = version
    return version is not None


def together(peer: type[Peer], doing: str, call: Callable[[], Result], told: dict[str, str]) -> Result | None:
    """What the call returns; None on all ranks where it fails on one, which is told."""
    found, error = None, ""
    try:
        found = call()
        torch.cuda.synchronize()
    except Exception as why:
        traceback.print_exc()
        error = f"{doing}: {type(why).__name__}: {str(why)[:300]}"
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if not any(errors):
        return found
    reason = next(each for each in errors if each)
    told[peer.name] = "; ".join(filter(None, (told.get(peer.name), reason)))
    if dist.get_rank() == 0:
        print(f"{peer.name}: {reason}", flush=True)
    return None


def round_trips(
    ctx: EpContext, case: Case, sent: Rows, classes: Sequence[type[Peer]], told: dict[str, str]
) -> dict[str, Any]:
    """The times of one case."""
    calls, where = 10 if case.tokens < 1024 else 4, f"T={case.tokens} {case.routing} {ctx.wire}"
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    halves: dict[str, list[float]] = {}
    kept: list[Peer] = []
    everybody: list[type[Peer]] = [Ours, Gathered, *classes]
    for each in everybody:
        made = together(each, where, lambda each=each: each(ctx, case, sent), told)
        if made is None:
            continue
        kept.append(made)
        if not together(each, where, lambda made=made: verified(made), told):
            continue
        graph = together(each, f"{where}, graph", lambda made=made: captured(ctx, trip(made), calls), told)
        if graph is None:
            continue
        graphs[each.name] = graph
        split = together(each, f"{where}, events", lambda made=made: marked(made, calls), told)
        if split is not None:
            halves[each.name] = halves_of(*split)
    us = timed(graphs, calls, 4)
    del graphs
    for made in reversed(kept):
        made.close()
    return {"us": {name: round(value, 2) for name, value in us.items()}} | {
        f"{phase}_us": {name: round(each[at], 2) for name, each in halves.items()}
        for at, phase in enumerate(("dispatch", "combine"))
    }


def trip(peer: Peer) -> Callable[[int], torch.Tensor]:
    def call(number: int) -> torch.Tensor:
        peer.dispatch()
        return peer.combine()

    return call


def marked(peer: Peer, calls: int) -> tuple[torch.cuda.CUDAGraph, Events]:
    """A graph of round trips with an event before, between and after dispatch and combine."""
    events = [[torch.cuda.Event(enable_timing=True, external=True) for _ in range(3)] for _ in range(calls)]

    def call(number: int) -> None:
        events[number][0].record()
        peer.dispatch()
        events[number][1].record()
        peer.combine()
        events[number][2].record()

    return captured(peer.ctx, call, calls), events


def halves_of(graph: torch.cuda.CUDAGraph, events: Events) -> list[float]:
    """Median µs of a dispatch and of a combine, of the slowest rank; the first round trip of a replay is left out."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPLAYS):
        graph.replay()
        torch.cuda.synchronize()
        for before, between, after in events[1:]:
            samples[0].append(before.elapsed_time(between) * 1e3)
            samples[1].append(between.elapsed_time(after) * 1e3)
    medians = torch.tensor([statistics.median(each) for each in samples], device="cuda")
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    return [float(each) for each in medians]


if __name__ == "__main__":
    main()
