"""Times the first call of a process, each in a process of its own: tuning it, or replaying a choice, with and without
kernels in Triton's disk cache.

    python benchmarks/first_encounter.py [--shape dsv3_tp8] [--tokens 64] [--other 256] [--runs 3]

Seconds, from the call to the end of its kernels; torch, moecache and the tensors are there before. `first`: the first
call. `second`: the same again. `other`: the first call with another number of tokens. The medians of the runs are kept.
`where` says of the first call how long its tuning took, and what came `before` and `after` it. The package's
own files are left out: where they answer, nothing is tuned.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

SHAPES = {  # experts, top-k, hidden, intermediate, as one GPU sees them
    "qwen3_30b_a3b": (128, 8, 2048, 768), "dsv3_tp8": (256, 8, 7168, 256), "mixtral_tp8": (8, 2, 4096, 1792),
    "tiny": (8, 2, 64, 32),
}  # fmt: skip
CASES = {  # mode, whether kernels are compiled; in this order, as one leaves what the next needs
    "tune, nothing compiled": ("tune", False), "tune, kernels compiled": ("tune", True),
    "replay, nothing compiled": ("replay", False), "replay, kernels compiled": ("replay", True),
    "off, nothing compiled": ("off", False),
}  # fmt: skip
TIMES = ("first_s", "second_s", "other_s", "import_s")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="dsv3_tp8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--other", type=int, default=256, help="tokens of another first call in the same process")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--budget", default="", help="MOECACHE_BUDGET; default: the library's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(child(options)))
        return
    runs = [cases(options) for _ in range(options.runs)]
    rows = []
    for name in CASES:
        row = {"case": name, **runs[-1][name]}
        row |= {what: round(statistics.median(run[name][what] for run in runs), 3) for what in TIMES}
        rows.append(row | {"firsts_s": [run[name]["first_s"] for run in runs]})
        print(f"{name}: " + ", ".join(f"{what} {row[what]}" for what in TIMES), flush=True)
    from moecache.devices import Places

    place = Places().first() if options.device == "cuda" else Places().here("cpu", 0)
    facts = {"shape": options.shape, "tokens": options.tokens, "other": options.other}
    cores = len(os.sched_getaffinity(0))
    print(record.save("first_encounter", record.folder_of(place), place, rows, **facts, cores=cores))


def cases(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every case once, in a new folder."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeded, kernels = folder / "seeded.sqlite", folder / "kernels"
        for number, (case, (mode, compiled)) in enumerate(CASES.items()):
            db = folder / f"{number}.sqlite"
            cache = kernels if compiled or not number else folder / f"kernels{number}"
            if mode == "replay":
                shutil.copy(seeded, db)
            found[case] = run(options, mode, cache, db)
            if not number:
                shutil.copy(db, seeded)
            print(f"  {case}: {json.dumps(found[case])}", flush=True)
    return found


def run(options: argparse.Namespace, mode: str, cache: Path, db: Path) -> dict[str, Any]:
    """One process with this mode, Triton cache and cache file."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOECACHE_")}
    env |= {"TRITON_CACHE_DIR": str(cache), "MOECACHE_MODE": mode, "MOECACHE_DB": str(db)}
    env |= {"MOECACHE_BUDGET": options.budget} if options.budget else {}
    command = [
        sys.executable, __file__, "--child", "--shape", options.shape, "--tokens", str(options.tokens), "--other",
        str(options.other), "--device", options.device,
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": round(time.perf_counter() - began, 3)}


def child(options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: seconds of its first calls, and how they were answered."""
    began = time.perf_counter()
    import torch

    import moecache
    from moecache import settings

    imported = time.perf_counter() - began
    settings.PREBUILT = Path(os.devnull)
    torch.manual_seed(0)  # all cases ask for the same routings
    tunings = noted()
    with torch.no_grad():
        calls = [tensors(options, tokens) for tokens in (options.tokens, options.tokens, options.other)]
        times, where = [], dict[str, float]()
        for layer, call in enumerate(calls):
            if options.device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            moecache.fused_moe(*call, layer=layer // 2)
            if options.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            if not layer:
                for start, end in tunings:
                    where = {"before": start - began, "tuning": end - start, "after": began + times[0] - end}
    told = dict(zip(("first_s", "second_s", "other_s"), (round(each, 3) for each in times), strict=True))
    return {**told, "import_s": round(imported, 3), "where": {k: round(v, 3) for k, v in where.items()}, **answers()}


def noted() -> list[tuple[float, float]]:
    """When each tuning from now on began and ended."""
    from moecache.dispatch import serving

    tune, found = serving.tune, []

    def timed(*args: Any, **more: Any) -> Any:
        start = time.perf_counter()
        try:
            return tune(*args, **more)
        finally:
            found.append((start, time.perf_counter()))

    serving.tune = timed
    return found


def tensors(options: argparse.Namespace, tokens: int) -> tuple[Any, ...]:
    """The arguments of a call, on the device."""
    import torch

    experts, topk, hidden, middle = SHAPES[options.shape]
    at = torch.device(options.device)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=at)
    w1 = torch.empty(experts, 2 * middle, hidden, dtype=torch.bfloat16, device=at).normal_(0, hidden**-0.5)
    w2 = torch.empty(experts, hidden, middle, dtype=torch.bfloat16, device=at).normal_(0, middle**-0.5)
    scores, ids = torch.rand(tokens, experts, device=at).topk(topk)
    return x, w1, w2, scores / scores.sum(1, keepdim=True), ids.int()


def answers() -> dict[str, Any]:
    """What serves the problems that were met, and how many candidates were timed for each."""
    from moecache.dispatch import dispatcher

    serving = dispatcher()
    if serving.settings.mode == "off":
        return {"tried": [], "tier": "default"}
    stored = serving.lookup.tiers.user.timings()
    tried: dict[str, int] = {}
    for timing in stored:
        tried[timing.problem.key] = tried.get(timing.problem.key, 0) + (timing.status == "ok")
    return {"tried": list(tried.values()), "failed": [t.reason for t in stored if t.status != "ok"]}


if __name__ == "__main__":
    main()
