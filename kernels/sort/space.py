"""Which configs of MoE sorting are worth trying on a GPU, and what each should cost."""

from math import ceil

from moecache.kernels.sort.gpu import count_warps, experts_block, fits, padded_pairs
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, Value, pow2


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config, the lowest predicted time first; those that do not fit are left out by the op."""
    found = _of(padded_pairs(problem), _least(problem), device)
    return sorted(dict.fromkeys(found), key=lambda c: cost(problem, c, device))


def every(problem: Problem, device: Device) -> list[Config]:
    """The configs of all problems whose winners may answer for this one: tokens and block_m differ by a factor of 4 at
    most. Far fewer programs than a size asks for would take seconds."""
    near = [problem.model_copy(update={"tokens": tokens, "dims": (("block_m", block),)})
            for tokens in _around(problem.tokens) for block in _around(problem.dim("block_m", 1))]  # fmt: skip
    sizes = {(padded_pairs(each), _least(each)) for each in near}
    return [c for pairs, least in sizes for c in _of(pairs, least, device)]


def _around(n: int) -> tuple[int, ...]:
    return tuple(max(1, n * factor // 4) for factor in (1, 2, 4, 8, 16))


def _least(problem: Problem) -> int:
    """Programs of `oneshot` that the padding wants."""
    return experts_block(problem.experts) * pow2(problem.dim("block_m", 1)) // 8192


def _of(pairs: int, least: int, device: Device) -> list[Config]:
    """The configs for so many pairs."""
    extra: dict[str, Value] = {"launch_pdl": 1} if device.vendor == "nvidia" else {}
    space = []
    few = max(16, pairs // 16, least)
    for programs in sorted({few, max(64, few)}):
        space += [config("oneshot", extra, programs=programs, step=16, num_warps=warps) for warps in (4, 8)]
    for step, warps in ((32, 4), (128, 4), (128, 8)):
        both = {"step": step, "num_warps": warps}
        chunks = min(1024, max(1, pairs // step))
        space.append(config("multiphase", extra, chunks=chunks, block=step, scan=1, fused=0, **both))
        for few in sorted({min(chunks, 128), min(chunks, 64)}):
            block = min(1024, max(step, pairs // few))
            space.append(config("multiphase", extra, chunks=few, block=block, scan=0, fused=0, **both))
            space.append(config("multiphase", chunks=few, block=block, scan=0, fused=1, **both))
    return space


def of_layer(
    device: Device, tokens: int, topk: int, experts: int, block: int, *, mapped: bool, early: bool
) -> tuple[Problem, Config]:
    """How a layer sorts its rows: nothing is measured for a few per cent of its time. `tokens`: a bucket; `early`: the
    launches around it overlap."""
    dims = {"block_m": block} | ({"mapped": 1} if mapped else {})
    problem = Problem(op="moe_sort", vendor=device.vendor, arch=device.arch, units=device.units, tokens=tokens,
                      experts=experts, topk=topk, dims=tuple(dims.items()))  # fmt: skip
    best = next(c for c in space(problem, device) if not fits(problem, c, device))
    return problem, best if early else config(best.variant, None, **dict(best.params))


def cost(problem: Problem, config: Config, device: Device) -> float:
    """Launches, a fixed latency, and what the busiest unit issues, in warp instructions on four schedulers.

    The factors were fitted to 640 timings on an H200, then set right by 1379 on an H100
    (benchmarks/notes/estimates.md); clock, units and the cost of a launch carry them to other devices.
    """
    pairs = padded_pairs(problem)
    issue = 1 / (4 * (device.clock_mhz or 2000))  # µs a warp instruction
    bins, step, warps = experts_block(problem.experts) / 32, config["step"], config["num_warps"]
    if config.variant == "oneshot":
        rounds = ceil(config["programs"] / device.units)
        comparing = pairs * step / 32 * 10.6 * issue
        if bins >= 8 and pairs * bins * 32 <= 65536:  # counted by comparison, 256 experts at a time
            return device.launch_us + 1.0 + rounds * (comparing + pairs * bins * 4 * issue)
        return device.launch_us + 1.0 + rounds * (comparing + _histogram_cost(pairs, bins, warps, issue))
    chunks = config["chunks"]
    rounds = max(1.0, chunks / device.units)
    own, block = max(step, pairs / chunks), config["block"]
    counting = max(1.0, own / block) * _histogram_cost(
        min(own, block), bins, count_warps(config, problem.experts), issue
    )
    steps = own / step
    placing = own * step / 32 * 10.6 * issue + (steps - 1) * (0.4 + _histogram_cost(step, bins, warps, issue))
    placing *= warps / 4  # each pass is one barrier of all warps after the other
    table = chunks * bins * 32 * 10e-6 if config["scan"] else chunks * bins * (29 * rounds * issue + 32 * 17e-6)
    phases = 1 if config["fused"] else 3 if config["scan"] else 2
    return (
        device.launch_us * phases
        + 1.6 * config["fused"]
        + 1.0
        + rounds * (counting + placing)
        + 0.2 * (rounds - 1)
        + table
    )


def _histogram_cost(pairs: float, bins: float, warps: int, issue: float) -> float:
    """µs to count pairs into bins · 32 experts: comparisons, or votes and one shared atomic a bin and warp."""
    if pairs * bins * 32 <= 8192:
        return pairs * bins * 12 * issue
    return (max(pairs / 32, warps) * (48 + 15 * bins) + 25 * bins * warps) * issue
