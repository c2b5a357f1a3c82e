"""What vllm_e2e.py measures in a running vLLM: whole calls, its worker's steps, its kernels, and who has the host.

Functions that take `worker` run in the process of vLLM's worker, which finds this module as a script's neighbour.
"""

import json
import math
import os
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecache.tuning.timing import Stats

ROOT = Path(__file__).parent.parent
PROMPT, LONG = 16, 1024  # tokens of a prompt that is decoded, and of one that is prefilled
STEP = 4096  # tokens of a prefill step
SHAPES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2 * LONG - 1)  # of prefills that come first
PROFILED = 31  # tokens that a profiled call decodes after the first
ROUNDS = 3  # however late it is
THEIRS = (  # parts of names; for eight rows a token, vLLM's moe_sum is torch's sum
    "fused_moe_kernel", "moe_align", "count_and_sort_expert", "act_and_mul", "moe_sum", "topkGating", "moeSoftmax",
    "moeTopK", "sum_functor",
)  # fmt: skip
JIT = re.compile(r"^@(?:triton|gluon)\.jit.*\n(?:@.*\n)*def (\w+)", re.MULTILINE)
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories in a profiler's trace
SHOWN = 12  # kernels that a profile names, and threads of the host
OF_SYSTEM = 0x200000  # in a process's flags: it is a thread of the kernel
BUSY = 0.02  # cores that a thread takes before it is named

Row = dict[str, Any]
Size = tuple[int, int, int]  # requests, tokens of a prompt, new tokens
Step = list[float]  # tokens; seconds: when it began, and in execute_model, in sample_tokens, in replays of graphs


@dataclass(frozen=True)
class Phase:
    """Two calls, by how many tokens they differ, and the tokens of the steps that do these."""

    long: Size
    short: Size
    tokens: int
    step: int


def phases_of(batches: Sequence[int], new: int) -> dict[str, Phase]:
    """By name. Both calls of a phase have the same fixed costs."""
    found = {f"decode {n}": Phase((n, PROMPT, new + 1), (n, PROMPT, 1), n * new, n) for n in batches}
    each = STEP // LONG
    return found | {"prefill": Phase((12 * each, LONG, 1), (4 * each, LONG, 1), 8 * STEP, STEP)}


def measured(llm: Any, batches: Sequence[int], new: int, repeats: int, budget: float) -> Row:
    """All phases by turns, warmed up first; no round but the first few begins after the budget."""
    rng, began = random.Random(0), time.monotonic()
    phases = phases_of(batches, new)
    for tokens in SHAPES:
        taken(llm, rng, (1, tokens, 1))
    for phase in [*phases.values()] * 2:
        taken(llm, rng, phase.long), taken(llm, rng, phase.short)
    llm.collective_rpc(watch)
    warm, threads, rounds = time.monotonic() - began, alive(), 0
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in phases}
    steps: dict[str, list[list[Step]]] = {name: [] for name in phases}
    cores: dict[str, Counter[str]] = {name: Counter() for name in phases}
    while rounds < repeats and (rounds < ROUNDS or time.monotonic() - began < budget):
        for name in list(phases)[:: -1 if rounds % 2 else 1]:
            before = cpu_seconds()
            llm.collective_rpc(seen)
            seconds[name][0].append(taken(llm, rng, phases[name].long))
            steps[name] += llm.collective_rpc(seen)
            cores[name].update(spent(before, cpu_seconds()))
            seconds[name][1].append(taken(llm, rng, phases[name].short))
        rounds += 1
    rows = {
        name: rate(phase.tokens, *seconds[name])
        | clock(steps[name], phase.step)
        | {"cores": busy(cores[name], sum(seconds[name][0]))}
        for name, phase in phases.items()
    }
    after, found = alive(), {"seconds_to_warm_up": round(warm, 1), "rounds": rounds, "phases": rows}
    return found | {"threads": {name: [threads[name], after[name]] for name in sorted({*threads, *after})}}


def profiled(llm: Any, batches: Sequence[int]) -> dict[str, Row]:
    """Profiles of the phases."""
    rng, phases = random.Random(1), phases_of(batches, PROFILED)
    return {name: profile(llm, partial(taken, llm, rng, phase.long)) for name, phase in phases.items()}


def taken(llm: Any, rng: random.Random, size: Size) -> float:
    """Seconds for fresh prompts."""
    from vllm import SamplingParams

    requests, prompt, new = size
    prompts = [{"prompt_token_ids": [rng.randrange(1000, 100_000) for _ in range(prompt)]} for _ in range(requests)]
    sampling = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False)
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    short = [len(each.outputs[0].token_ids) for each in outputs if len(each.outputs[0].token_ids) != new]
    if short or len(outputs) != requests:
        raise SystemExit(f"{requests} prompts of {new} new tokens gave {len(outputs)}, of which {len(short)} are short")
    return seconds


# --- what the samples say ---


def rate(tokens: int, long: Sequence[float], short: Sequence[float]) -> Row:
    """Tokens a second, of the median of long calls less that of short ones; None where that is nothing.

    `within` is by which share the difference may be off: two standard errors of both medians.
    """
    shorter = statistics.median(short)
    more = statistics.median(long) - shorter
    took = {"long_s": [round(each, 4) for each in long], "short_s": [round(each, 4) for each in short]}
    if more <= 0:  # so few tokens that they drown
        return {"tokens_per_s": None} | took
    within = 2 * math.hypot(error(long), error(short)) / more
    return spread([tokens / (each - shorter) for each in long if each > shorter]) | {"within": round(within, 4)} | took


def spread(rates: Sequence[float]) -> Row:
    """Median, median absolute deviation and samples."""
    found = stats(rates)
    return {
        "tokens_per_s": round(found.median, 1),
        "mad": round(found.mad, 1),
        "samples": [round(each, 1) for each in rates],
    }


def stats(samples: Sequence[float]) -> "Stats":
    """As a race has them. Imported late: the worker of `stock` loads this module, and nothing of moecache."""
    from moecache.tuning.timing import stats

    return stats(samples)


def error(samples: Sequence[float]) -> float:
    """The standard error of a median, of samples that would be normal but for some that are far off."""
    found = stats(samples)
    return found.noise * found.median


def clock(calls: Sequence[Sequence[Step]], tokens: int) -> Row:
    """Medians over steps of so many tokens, after which another such step comes in the same call.

    `step_us` is from one's begin to the next one's. The host is in the worker's two calls, and in one of them for a
    while in the launch of graphs.
    """
    pairs = [pair for steps in calls for pair in pairwise(steps) if pair[0][0] == pair[1][0] == tokens]
    if not pairs:
        return {"steps": 0}
    each = [1e6 * (after[1] - step[1]) for step, after in pairs]
    host = {name: statistics.median(1e6 * step[at] for step, _ in pairs)
            for at, name in enumerate(("execute_us", "sample_us", "replay_us"), 2)}  # fmt: skip
    found = stats(each)
    figures = {"step_us": found.median, "step_mad_us": found.mad} | host
    return {"steps": len(pairs)} | {name: round(value, 1) for name, value in figures.items()}


# --- in the worker ---


def watch(worker: Any) -> None:
    """Note each step of vLLM's worker from now on."""
    import torch

    inner, graph = worker.worker, torch.cuda.CUDAGraph
    execute, sample, replay = inner.execute_model, inner.sample_tokens, graph.replay
    steps = worker.moecache_steps = []

    def timed(at: int, call: Callable[..., Any], *given: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*given)
        finally:
            if steps:
                steps[-1][at] += time.perf_counter() - began

    def step(output: Any) -> Any:
        steps.append([output.total_num_scheduled_tokens, time.perf_counter(), 0.0, 0.0, 0.0])
        return timed(2, execute, output)

    inner.execute_model, inner.sample_tokens = step, partial(timed, 3, sample)
    graph.replay = lambda graph: timed(4, replay, graph)


def seen(worker: Any) -> list[Step]:
    """The steps since the last call."""
    steps = [*worker.moecache_steps]
    worker.moecache_steps.clear()
    return steps


def profile_on(worker: Any) -> None:
    """Begin a profile in vLLM's worker."""
    import torch

    torch.cuda.synchronize()
    worker.moecache_profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    worker.moecache_profile.start()


def profile_off(worker: Any) -> tuple[dict[str, float], float]:
    """µs of each kernel, copy and fill since `profile_on`, and µs in which none of them ran."""
    import torch

    torch.cuda.synchronize()
    worker.moecache_profile.stop()
    with tempfile.TemporaryDirectory() as folder:
        worker.moecache_profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    kernels: dict[str, float] = {}
    idle = until = 0.0
    for event in sorted((each for each in events if each.get("cat") in ON_DEVICE), key=lambda each: each["ts"]):
        kernels[event["name"]] = kernels.get(event["name"], 0.0) + event["dur"]
        idle += max(0.0, event["ts"] - until) if until else 0.0
        until = max(until, event["ts"] + event["dur"])
    return kernels, idle


# --- where the device's time goes ---


def profile(llm: Any, call: Callable[[], Any]) -> Row:
    """Where the device's time goes in one call."""
    llm.collective_rpc(profile_on)
    call()
    ((kernels, idle),) = llm.collective_rpc(profile_off)
    return shares(kernels, set(our_kernels())) | {"idle_us": round(idle, 1)}


def our_kernels() -> Iterator[str]:
    """Names of the functions in our kernels that a device runs."""
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        yield from JIT.findall(file.read_text())


def shares(kernels: Mapping[str, float], ours: Collection[str]) -> Row:
    """Sums of a profile. The MoE layers' kernels are those with a name in `ours` or with one of `THEIRS` in it."""
    total = sum(kernels.values())
    moe = {key: us for key, us in kernels.items() if key in ours or any(name in key for name in THEIRS)}
    most = sorted(kernels.items(), key=lambda item: -item[1])[:SHOWN]
    return {
        "device_us": round(total, 1),
        "moe_us": round(sum(moe.values()), 1),
        "moe_share": round(sum(moe.values()) / total, 4) if total else None,
        "kernels_us": {("moe: " if key in moe else "") + key[:80]: round(us, 1) for key, us in most},
    }


# --- who has the host ---


def cpu_seconds(proc: Path = Path("/proc")) -> dict[str, tuple[str, float]]:
    """CPU seconds of each thread of this machine, with its process's name and its own; of all; and what others took."""
    tick, found = 1 / os.sysconf("SC_CLK_TCK"), dict[str, tuple[str, float]]()
    for file in proc.glob("[0-9]*/task/[0-9]*/stat"):
        try:
            process, (thread, fields) = _stat(file.parents[2] / "stat")[0], _stat(file)
        except OSError:  # it has ended
            continue
        name = process if thread == process else f"{process}: {thread}"
        found[file.parent.name] = name, tick * (int(fields[11]) + int(fields[12]))
    every = (proc / "stat").read_text().split()
    found["all"] = "(whole machine)", tick * sum(map(int, every[1:4]))
    return found | {"stolen": ("(stolen)", tick * int(every[8]))}


def spent(before: Mapping[str, tuple[str, float]], after: Mapping[str, tuple[str, float]]) -> Counter[str]:
    """CPU seconds between, by names: those that threads have now, as the system's own ones change theirs."""
    found: Counter[str] = Counter()
    for thread, (name, seconds) in after.items():
        found[name] += seconds - before.get(thread, ("", 0.0))[1]
    return found


def alive(proc: Path = Path("/proc")) -> Counter[str]:
    """Threads by the name of their process; without the system's own."""
    found: Counter[str] = Counter()
    for file in proc.glob("[0-9]*/stat"):
        try:
            name, fields = _stat(file)
        except OSError:
            continue
        if not int(fields[6]) & OF_SYSTEM:
            found[name] += int(fields[17])
    return found


def _stat(file: Path) -> tuple[str, list[str]]:
    """Name, and the fields behind it."""
    head, _, tail = file.read_text().rpartition(")")
    return head.partition("(")[2], tail.split()


def busy(seconds: Mapping[str, float], wall: float) -> dict[str, float]:
    """Cores, by the names of those that took most."""
    most = sorted(seconds.items(), key=lambda item: -item[1])[:SHOWN]
    return {name: round(each / wall, 2) for name, each in most if each / wall > BUSY}
