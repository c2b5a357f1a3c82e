"""Host cost of a dispatch hit over calling the kernel's launch directly; the goal is at most 3 µs.

    python benchmarks/dispatch.py [--out FILE]

Nothing of a device is timed: a hit and a direct launch enqueue the same kernel. `wrap, no-op` wraps a
function that returns its argument, so that all of the difference is dispatch; `moe_sort` and `fused_moe` are set
against their own launch with the same outputs, `no kernel` leaves out what both enqueue. `posted routing` is what a hit
does to know the routing that its layer posted, `capture question` what it does besides where a captured graph would be
served another config, both against nothing. Rounds alternate between the
two ways, and the overhead of a round is the difference of its times: what disturbs one disturbs the other.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from record import commit

from moecache import feedback, fused_moe, moe_sort, routing, using, wrap
from moecache.dispatch import dispatcher
from moecache.kernels.contract import Bound
from moecache.kernels.fused_moe.call import call_args
from moecache.kernels.sort.op import SORT, SortCall

Call = Callable[[], object]
ROUNDS, SECONDS = 100, 0.03  # rounds, and about how long one side of a round runs
GOAL_US = 3.0


def no_op(x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
    """The cheapest launch there can be."""
    return x


def wrapped() -> dict[str, tuple[Call, Call]]:
    """A wrapped function."""
    x, given = torch.zeros(16, 64), {"BLOCK": 1}
    configs = [given, {"BLOCK": 2}]
    fast = wrap(no_op, op="no_op", configs=configs, key=lambda x: {"tokens": x.shape[0], "hidden": x.shape[1]})
    return {"wrap, no-op": (lambda: no_op(x, config=given), lambda: fast(x))}


def nothing() -> None:
    """What finding and reading a slot is set against."""


def posted() -> dict[str, tuple[Call, Call]]:
    """Finding the slot of a layer and reading it; asking for a capture."""
    at = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    device, layer = at.device, "model.layers.7"  # a hit has its device anyway
    slot = feedback.post(layer, 64, 128, device)

    def find() -> int:
        return feedback.post(layer, 64, 128, device).word.value

    number = at.get_device()
    return {"posted routing": (nothing, find), "capture question": (nothing, lambda: feedback.read(slot, number))}


def empty(call: Any, out: Any) -> Any:
    """Stands for what runs an op's kernels."""
    return out


def chosen(call: Call) -> Any:
    """The one config that `hot` serves a call, after the first one tuned and the second one knew the posted routing."""
    before = set(dispatcher().hot)
    for _ in range(3):
        call()
    (config,) = {served.what for key, served in dispatcher().hot.items() if key not in before}
    return config


def without(call: Call) -> Call:
    """The call, whose hits run nothing until something is tuned."""
    hot, before = dispatcher().hot, set(dispatcher().hot)
    for _ in range(3):
        call()
    for key in set(hot) - before:
        hot[key] = hot[key]._replace(run=empty)
    return call


def sorting() -> dict[str, tuple[Call, Call]]:
    """moe_sort as it is, and with nothing in the place of its kernel."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = routing.draw("uniform", 16, 128, 8).to(device)
    posted = torch.zeros(1, dtype=torch.int32, pin_memory=device == "cuda")  # a direct caller would keep one too

    def args(block: int) -> SortCall:
        return SortCall(ids, 128, block, posted=posted)

    config = chosen(lambda: moe_sort(ids, 128, 16))
    run = SORT.bind(config, args(16), SORT.outputs(args(16)))

    def direct(run: Bound, block: int) -> object:
        call = args(block)
        return run(call, SORT.outputs(call))

    return {
        "moe_sort, no kernel": (partial(direct, empty, 8), without(partial(moe_sort, ids, 128, 8))),
        f"moe_sort, {device}": (partial(direct, run, 16), partial(moe_sort, ids, 128, 16)),
    }


def layer() -> dict[str, tuple[Call, Call]]:
    """fused_moe with nothing in the place of its kernels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, w1, w2 = (torch.randn(shape, device=device).bfloat16() for shape in ((64, 128), (16, 128, 128), (16, 128, 64)))
    weights, ids = torch.randn(64, 16, device=device).softmax(1).topk(4)
    out, posted = torch.empty_like(x), torch.zeros(1, dtype=torch.int32, pin_memory=device == "cuda")

    def direct() -> object:
        return empty(call_args(x, w1, w2, weights, ids, posted=posted), out)

    return {"fused_moe, no kernel": (direct, without(partial(fused_moe, x, w1, w2, weights, ids, out=out)))}


# Name -> (direct launch, the same through dispatch); each is measured before the next one tunes.
CASES = (wrapped, posted, layer, sorting)


def measure(direct: Call, hit: Call) -> dict[str, Any]:
    """Median and spread (median absolute deviation) in µs per call."""
    for call in (direct, hit):  # the first may tune
        timed(call, 10)
    count = max(10, int(SECONDS / (timed(direct, 100) * 1e-6)))
    rounds = []
    for turn in range(ROUNDS):
        order = (direct, hit) if turn % 2 else (hit, direct)
        times = {call: timed(call, count) for call in order}
        rounds.append((times[direct], times[hit], times[hit] - times[direct]))
    named = dict(zip(("direct", "hit", "overhead"), zip(*rounds, strict=True), strict=True))
    return {
        "us": {name: round(statistics.median(values), 3) for name, values in named.items()},
        "spread_us": {name: round(spread(values), 3) for name, values in named.items()},
        "rounds": ROUNDS,
        "calls_per_round": count,
    }


def timed(call: Call, count: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(count):
        call()
    return (time.perf_counter_ns() - start) / 1e3 / count


def spread(values: tuple[float, ...]) -> float:
    middle = statistics.median(values)
    return statistics.median(abs(value - middle) for value in values)


def package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "results" / "cpu" / "dispatch.json"
    parser.add_argument("--out", type=Path, default=default, help="result file (default: %(default)s)")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # two threads made single calls of a CPU sort differ by a factor of two
    with using(mode="tune", strict=False, db=Path(":memory:"), path=(), budget=2.0):
        rows = [{"case": name, **measure(*calls)} for made in CASES for name, calls in made().items()]
    result = {
        "what": "host µs per call: a dispatch hit against a direct launch; medians, spread = MAD",
        "goal_us": GOAL_US,
        "cpu": cpu(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": {name: package(name) for name in ("torch", "triton", "pydantic")}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": "python benchmarks/dispatch.py",
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    for row in rows:
        print(f"{row['case']:20} direct {row['us']['direct']:8.2f}  hit {row['us']['hit']:8.2f}  "
              f"overhead {row['us']['overhead']:6.2f} ± {row['spread_us']['overhead']:.2f} µs")  # fmt: skip


if __name__ == "__main__":
    main()
