"""Makes the cache files inside the package, moecache/prebuilt/: predictions, and what was measured on a GPU.

    python benchmarks/prebuilt.py predict [--check]         every predicted-ARCH.sqlite; seconds, no GPU
    python benchmarks/prebuilt.py measure FILE.sqlite       measure the layers and their sorting; on the GPU, minutes
    python benchmarks/prebuilt.py pack h200 FILE.sqlite …   h200.sqlite, from files that were filled there

A predicted file holds the config with the lowest predicted time, for problems that `warm` would measure. Nobody has
measured them: they answer as `predicted`. `--check` only says whether the files are those of the present kernels.

`measure` does what `moecache warm` does for each layer in turn, in bf16 and in fp8. It stops before a problem that
begins after `--budget-s`, and exits with 1. The same command goes on: what the file holds is not measured again.

A packed file holds, of each problem, the winner, the static default, two runners-up and what captured graphs run, of
the environment measured last. Left out are problems of other devices, of ops that are not built in, and of other
kernels than the present. How ranks exchange tokens (`moecache warm MODEL --ep 2`) is kept: its key says which ranks.
"""

import argparse
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import moecache
from moecache import routing
from moecache.dispatch.any_routing import least_worst
from moecache.dispatch.exchange import EXCHANGE
from moecache.kernels import registry as ops
from moecache.predict.ranking import rank
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Prediction, Timing, Winner
from moecache.schemas.warm import Progress
from moecache.settings import PREBUILT
from moecache.store import Store

SHAPES = {  # experts, top-k, hidden, intermediate, as one GPU sees them
    "mixtral_8x7b": (8, 2, 4096, 14336),
    "mixtral_tp8": (8, 2, 4096, 1792),
    "qwen3_30b_a3b": (128, 8, 2048, 768),
    "dsv3_tp8": (256, 8, 7168, 256),
    "gptoss_120b": (128, 4, 2880, 2880),
}
ACTIVATIONS = {"gptoss_120b": "swiglu_oai"}
TOKENS = tuple(1 << power for power in range(15))
GENERATORS = ("uniform", "dir2", "zipf", "hot1")
RUNNERS_UP = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="write, or check, the predicted files")
    predict.add_argument("--check", action="store_true", help="write nothing; 1 if a file is stale")
    measurer = commands.add_parser("measure", help="fill a cache file on this machine's GPU")
    measurer.add_argument("file", type=Path, metavar="FILE", help="cache file; it goes on with what it holds")
    measurer.add_argument("--layers", nargs="+", metavar="NAME:DTYPE", help="like dsv3_tp8:fp8; all by default")
    measurer.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="default: 1 to 16384")
    measurer.add_argument("--budget-s", type=float, default=math.inf, help="begin no problem after so many seconds")
    packer = commands.add_parser("pack", help="write a measured file")
    packer.add_argument("product", choices=KNOWN, help="the GPU, which names the file")
    packer.add_argument("files", type=Path, nargs="+", metavar="FILE", help="cache files; they are only read")
    for each in (predict, packer):
        each.add_argument("--folder", type=Path, default=PREBUILT, help="where the files lie")
    options = parser.parse_args(arguments)
    if options.command == "measure":
        return measure(options.file, options.layers, options.tokens, options.budget_s)
    if options.command == "pack":
        return pack(options.product, options.files, options.folder)
    return max(predicted_file(arch, options.folder, options.check) for arch in archs())


# --- predictions ---


def archs() -> list[str]:
    """The architectures of the known devices."""
    return list(dict.fromkeys(device.arch for device in KNOWN.values()))


def predicted_file(arch: str, folder: Path, check: bool) -> int:
    """Write the file of an architecture; or 1 if it does not say what it should."""
    file, want = folder / f"predicted-{arch}.sqlite", predictions(arch)
    if check:
        with Store.open(file, shipped=True) as store:
            fresh = set(store.predictions()) == set(want)
        print(f"{file}: {'fresh' if fresh else 'stale: run `make prebuilt`'}", file=sys.stdout if fresh else sys.stderr)
        return int(not fresh)
    with Store.memory() as store:
        store.predict(want)
        store.export_file(file)
    print(f"{file}: {len(want)} predictions, {file.stat().st_size / 1024:.0f} KiB")
    return 0


def predictions(arch: str) -> list[Prediction]:
    """One for each problem and known device of an architecture."""
    devices = [device for device in KNOWN.values() if device.arch == arch]
    return [prediction(problem, device) for device in devices for problem in problems(device)]


def prediction(problem: Problem, device: Device) -> Prediction:
    """The config that dispatch would find when it ranks the candidates."""
    op = ops.get(problem.op)
    space = op.space(problem, device)
    ranking = rank(op, problem, space, device)
    assert ranking.best is not None
    # rounded, so that another machine's exp() makes the same file
    us = round(ranking.us[ranking.best], 2)
    return Prediction(
        problem=problem, device=device.name, config=space[ranking.best], predicted_us=us, model=ranking.by
    )  # fmt: skip


def problems(device: Device) -> list[Problem]:
    """What `warm` would measure of the layers, with every routing bucket that the generators reach."""
    found: dict[str, Problem] = {}
    for layer in layers():
        for op in map(ops.get, filter(ops.built_in, ops.names())):
            for problem in op.problems(layer, TOKENS, device):
                for bucket in buckets(problem.tokens, problem.experts, problem.topk):
                    full = problem.model_copy(update={"routing": bucket})
                    found[full.key] = full
    return list(found.values())


def layers() -> Iterator[Layer]:
    """Every shape in bf16 and in fp8, whose scales are those of blocks."""
    for dtype in ("bf16", "fp8"):
        for name, (experts, topk, hidden, inter) in SHAPES.items():
            yield Layer(
                model=name, experts=experts, global_experts=experts, topk=topk, hidden=hidden, intermediate=inter,
                dtype=dtype, activation=ACTIVATIONS.get(name, "silu"),
            )  # fmt: skip


@cache
def buckets(tokens: int, experts: int, topk: int) -> list[str]:
    """The routing buckets that the generators reach, in order."""
    drawn = (routing.draw(generator, tokens, experts, topk) for generator in GENERATORS)
    return sorted({routing.bucket(routing.histogram(ids, experts)) for ids in drawn})


# --- measured ---


class OutOfTime(Exception):
    """The budget is spent, and another problem would begin."""


def measure(file: Path, names: Sequence[str] | None, tokens: Sequence[int], budget: float) -> int:
    """Measure the layers, each in a warm-up of its own; 1 if something is left."""
    known = {f"{layer.model}:{layer.dtype}": layer for layer in layers()}
    if unknown := set(names or ()) - known.keys():
        raise SystemExit(f"no layers {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    began, left = time.monotonic(), 0

    def in_time(news: Progress) -> None:
        if not news.text and time.monotonic() - began > budget:  # before a problem, not while it is tuned
            raise OutOfTime(f"{news.total - news.done} of {news.total} problems are left; the same command goes on")

    def tell(name: str, text: object) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {name}: {text}", flush=True)

    for name in names or known:
        try:
            with moecache.using(mode="tune", db=file, path=()):  # anew, as `moecache warm` is a process of its own
                rows = moecache.warmup(known[name], tokens=tokens, progress=in_time)
        except OutOfTime as why:
            tell(name, why)
            return 1
        tell(name, f"{len(rows)} problems, {sum(row.measured for row in rows)} candidates now")
        for row in (row for row in rows if row.tier != "measured"):
            tell(name, f"{row.problem.key} is not measured: {row.reason}")
            left += 1
    return int(left > 0)


def pack(product: str, files: Sequence[Path], folder: Path) -> int:
    """Write PRODUCT.sqlite; 1 if nothing is left to write."""
    out, left_out = folder / f"{product}.sqlite", Counter[str]()
    with Store.memory() as whole:
        for file in files:
            with Store.open(file, readonly=True) as store:
                whole.merge(store)
        winners = latest(whole, product, left_out)
        told = (timing for winner in winners for timing in telling(whole, winner))
        kept = list(dict.fromkeys([*told, *captured(whole, winners)]))
    for why, count in left_out.items():
        print(f"left out: {count} problems, {why}")
    if not kept:
        print(f"nothing is left for {out}", file=sys.stderr)
        return 1
    with Store.memory() as small:
        small.put(kept)
        if {(w.problem, w.config) for w in small.winners()} != {(w.problem, w.config) for w in winners}:
            raise SystemExit("a winner would change: more than the runners-up decides it")
        small.export_file(out)
    print(f"{out}: {len(winners)} problems, {len(kept)} timings, {out.stat().st_size / 1024:.0f} KiB")
    return 0


def latest(store: Store, product: str, left_out: "Counter[str]") -> list[Winner]:
    """The winner of each problem that this product's calls can ask, in the environment measured last."""
    found: dict[str, Winner] = {}
    for winner in sorted(store.winners(), key=lambda w: (w.measured_at, w.environment.id)):
        if why := unwanted(winner, product):
            left_out[why] += 1
        else:
            found[winner.problem.key] = winner
    return list(found.values())


def unwanted(winner: Winner, product: str) -> str:
    """Why a winner does not go into the file; '' when it does."""
    problem, name = winner.problem, winner.environment.device_name
    if problem.arch != KNOWN[product].arch or product not in re.findall(r"[a-z0-9]+", name.lower()):
        return f"measured on {name or 'an unnamed device'}"
    if not ops.built_in(problem.op) and problem.op != EXCHANGE.name:
        return f"as {problem.op} is not built in"
    return "" if problem.source == ops.get(problem.op).source else f"of other code of {problem.op}"


def telling(store: Store, winner: Winner) -> list[Timing]:
    """The timings that a reader needs: the winner, the default, and the best others; the best of all is among them, so
    that ties, and hence the winner, stay what they are."""
    usable = store.timings(winner.problem, environment=winner.environment.id, status="ok", today=True)
    sure = [timing for timing in usable if timing.is_default or timing.config == winner.config]
    return [*sure, *[timing for timing in usable if timing not in sure][:RUNNERS_UP]]


def captured(store: Store, winners: Sequence[Winner]) -> Iterator[Timing]:
    """The timings by which a captured graph gets the config that loses least under any routing."""
    groups: dict[str, list[list[Timing]]] = {}
    for winner in winners:
        usable = store.timings(winner.problem, environment=winner.environment.id, status="ok", today=True)
        groups.setdefault(winner.problem.any_routing.key, []).append(usable)
    for group in groups.values():
        times = {
            usable[0].problem.routing: {t.config.name: t.median_us for t in usable if t.median_us} for usable in group
        }
        if verdict := least_worst(times):
            yield from (t for usable in group for t in usable if t.config.name == verdict.name)


if __name__ == "__main__":
    sys.exit(main())
