"""Times every config of an op on a grid of layers, tokens and routings: a file for `benchmarks/regret.py`.

    python benchmarks/grid.py OUT.json [--op fused_moe] [--layer NAME=E,topk,hidden,intermediate] [--tokens 16 256]

Each config is checked against the reference, then all of a cell are sampled in turn with cold caches, twice: the
second run tells the noise. The file is written after every cell; a second call adds the cells that are missing.
"""

import argparse
import gc
import gzip
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from moecache import routing
from moecache.devices import Place, Places
from moecache.kernels import code
from moecache.kernels import registry as ops
from moecache.kernels.compile import compile_source
from moecache.kernels.contract import Args, Op
from moecache.kernels.tensors import poison, tensors
from moecache.schemas.config import Config
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem, bucket_index
from moecache.tuning.timing import DeviceClock, Sampler, stats

Times = list[float | None]

LAYERS = (
    "qwen3_30b_a3b=128,8,2048,768", "dsv3_tp8=256,8,7168,256", "mixtral_tp8=8,2,4096,1792",
    "gptoss_120b=128,4,2880,2880",
)  # fmt: skip
TOKENS = (16, 64, 256, 1024, 4096)
ROUTINGS = ("uniform", "dir1.5", "dir2", "dir3", "dir4", "zipf", "hot1")
SAMPLES = 9  # of a config in each of the two runs
ABOUT = (
    "Microseconds of whole calls, median of {samples} samples with cold caches; `again` is a second run right behind. "
    "null: the config does not fit, failed or is wrong. counts: rows per expert. shape: E, topk, hidden, inter."
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--op", default="fused_moe")
    parser.add_argument("--layer", nargs="+", default=LAYERS, help="NAME=experts,topk,hidden,intermediate")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--routing", nargs="+", default=ROUTINGS)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no cell after so many seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    began, op = time.monotonic(), ops.get(options.op)
    place = Places().first() if options.device == "cuda" else Places().here("cpu", 0)
    problems = {
        (each, tokens): problem
        for each in (layer(text, options.dtype) for text in options.layer)
        for tokens in options.tokens
        if (problem := asked(op, each, tokens, place)) is not None
    }
    spaces = {key: op.space(problem, place.device) for key, problem in problems.items()}
    file = File(options.out, place, op, options)
    file.add_configs([config for space in spaces.values() for config in space])
    precompile(op, place, list(problems.values()), file.configs)
    for (each, tokens), problem in problems.items():
        for generator in options.routing:
            if time.monotonic() - began > options.budget_s:
                print(f"stopped before {each.model} T={tokens} {generator}: --budget-s")
                return
            if not file.has(each.model, tokens, generator):
                counts, runs = cell(op, place, problem, tokens, generator, file.configs, options.samples)
                file.add_row(row(each, tokens, generator, counts, runs))


def layer(text: str, dtype: str) -> Layer:
    """`NAME=experts,topk,hidden,intermediate`."""
    name, _, sizes = text.partition("=")
    experts, topk, hidden, inter = (int(size) for size in sizes.split(","))
    return Layer(model=name, experts=experts, global_experts=experts, topk=topk, hidden=hidden, intermediate=inter,
                 dtype=dtype)  # fmt: skip


def asked(op: Op, each: Layer, tokens: int, place: Place) -> Problem | None:
    """What the op would tune for this layer; None where it leaves it out."""
    return next(iter(op.problems(each, [tokens], place.device)), None)


class File:
    """The grid file: what it holds already, and what is added."""

    def __init__(self, path: Path, place: Place, op: Op, options: argparse.Namespace) -> None:
        self.path, self.configs = path, list[Config]()
        self.head, self.rows = dict[str, Any](), list[dict[str, Any]]()
        if path.exists():
            held = json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
            self.head, self.rows = held["about"], held["rows"]
            self.configs = [Config.model_validate(each) for each in held["configs"]]
            if self.head.get("source") != code.whole(op.name) or self.head["device"]["name"] != place.device.name:
                raise SystemExit(f"{path} holds timings of another device or of other kernels")
        self.head |= {
            "about": ABOUT.format(samples=options.samples), "op": op.name, "dtype": options.dtype,
            "source": code.whole(op.name),
            "device": place.device.model_dump(mode="json"), "environment": place.environment.model_dump(),
        }  # fmt: skip

    def add_configs(self, configs: list[Config]) -> None:
        """Append what is new; cells measured before have null there."""
        self.configs += [each for each in dict.fromkeys(configs) if each not in self.configs]
        for row in self.rows:
            for column in ("moe_us", "moe_us_again"):
                row[column] += [None] * (len(self.configs) - len(row[column]))

    def has(self, model: str, tokens: int, generator: str) -> bool:
        return any((row["shape"], row["T"], row["routing"]) == (model, tokens, generator) for row in self.rows)

    def add_row(self, row: dict[str, Any]) -> None:
        """Keep a row and write the file, so that nothing measured is lost."""
        self.rows.append(row)
        configs = ",\n".join(json.dumps(each.model_dump(mode="json")) for each in self.configs)
        rows = ",\n".join(json.dumps(each) for each in self.rows)
        text = f'{{"about": {json.dumps(self.head)},\n"configs": [\n{configs}\n],\n"rows": [\n{rows}\n]}}\n'
        self.path.write_bytes(gzip.compress(text.encode()) if self.path.suffix == ".gz" else text.encode())
        seen = [us for us in row["moe_us"] if us is not None]
        best = self.configs[row["moe_us"].index(min(seen))].name if seen else "nothing ran"
        print(f"{row['shape']} T={row['T']} {row['routing']}: {len(seen)} configs, best {best}", flush=True)


def precompile(op: Op, place: Place, problems: list[Problem], configs: list[Config]) -> None:
    """Fill Triton's disk cache, one process a core: each kernel once, those of the sort among them."""
    if place.device.vendor == "cpu":
        return
    jobs: dict[str, Any] = {}
    for problem in problems:
        for config in configs:
            if not op.fits(problem, config, place.device):
                for number, s in enumerate(op.sources(problem, config, place.device)):
                    same = repr((s.fn.__name__, s.signature, s.constexprs, s.options, s.aligned))
                    jobs.setdefault(same, (op.name, problem, config, place.device, number))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs.values()))


def compile_one(job: Any) -> None:
    name, problem, config, device, number = job
    try:
        compile_source(ops.get(name).sources(problem, config, device)[number], device)
    except Exception as error:
        print(f"{config.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def row(each: Layer, tokens: int, generator: str, counts: list[int], runs: list[Times]) -> dict[str, Any]:
    """As it stands in the file."""
    return {
        "shape": each.model, "E": each.experts, "topk": each.topk, "hidden": each.hidden, "inter": each.intermediate,
        "T": tokens, "routing": generator, "counts": counts, "moe_us": runs[0], "moe_us_again": runs[1],
    }  # fmt: skip


def cell(
    op: Op, place: Place, problem: Problem, tokens: int, generator: str, configs: list[Config], samples: int
) -> tuple[list[int], list[Times]]:
    """Rows per expert, and the times of two runs: every config that fits, checked and timed."""
    ids = routing.draw(generator, tokens, problem.experts, problem.topk)
    counts = routing.histogram(ids, problem.experts)
    problem = problem.model_copy(update={"routing": routing.bucket_name(bucket_index(counts))})
    clock = clock_of(place)
    args = inputs(op, clock, problem, ids.to(place.torch_device))
    fitting = [config for config in configs if not op.fits(problem, config, place.device)]
    samplers = prepare(op, clock, problem, fitting, args)
    runs = []
    for _ in range(2):
        taken: dict[Config, list[float]] = {config: [] for config in samplers}
        for turn in range(samples):
            for config in list(samplers)[:: -1 if turn % 2 else 1]:
                taken[config].append(samplers[config]())
        medians = {config: round(stats(each).median, 3) for config, each in taken.items()}
        runs.append([medians.get(config) for config in configs])
    del samplers, args
    gc.collect()
    return counts, runs


def clock_of(place: Place) -> DeviceClock:
    """With room for copies of large weights: half of what the device has."""
    assert place.backend is not None
    return DeviceClock(place.backend, place.device, memory_bytes=max(2 << 30, place.device.memory_bytes // 2))


def inputs(op: Op, clock: DeviceClock, problem: Problem, ids: torch.Tensor) -> list[Args]:
    """As many input sets as keep the caches cold."""
    first = op.inputs(problem, ids, 0)
    size = sum(t.numel() * t.element_size() for t in tensors(first))
    return [first, *(op.inputs(problem, ids, seed) for seed in range(1, clock.copies(size)))]


def prepare(
    op: Op, clock: DeviceClock, problem: Problem, configs: list[Config], args: list[Args]
) -> dict[Config, Sampler]:
    """Samplers of the configs that run and agree with the reference."""
    want = op.reference(args[0])
    outs = [op.outputs(each) for each in args]
    found: dict[Config, Sampler] = {}
    for config in configs:
        try:
            run = op.bind(config, args[0], outs[0])
            error = op.error(run(args[0], poison(outs[0])), want)
            if not error <= op.tolerance(problem):
                print(f"{config.name}: wrong, error {error:.2e}", flush=True)
                continue
            calls = [partial(run, a, out) for a, out in zip(args, outs, strict=True)]
            found[config] = clock.prepare(calls)
        except Exception as error:
            print(f"{config.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return found


if __name__ == "__main__":
    main()
