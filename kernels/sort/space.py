"""Which configs of MoE sorting are worth trying on a GPU, and what work each makes."""

from math import ceil

from moecache.kernels.sort.gpu import count_warps, experts_block, fits, padded_pairs
from moecache.predict.rates import alone_us
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, Value, pow2


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config; those that do not fit are left out by the op."""
    return _of(padded_pairs(problem), _least(problem), device)


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
    fitting = [c for c in space(problem, device) if not fits(problem, c, device)]
    best = min(fitting, key=lambda c: alone_us(work(problem, c, device), device))
    return problem, best if early else config(best.variant, None, **dict(best.params))


def work(problem: Problem, config: Config, device: Device) -> Work:
    """Launches, and what the busiest unit issues and waits for."""
    pairs = padded_pairs(problem)
    bins, step, warps = experts_block(problem.experts) / 32, config["step"], config["num_warps"]
    early = bool(dict(config.extra).get("launch_pdl"))
    if config.variant == "oneshot":
        rounds = ceil(config["programs"] / device.units)
        counted = bins >= 8 and pairs * bins * 32 <= 65536  # by comparison, 256 experts at a time
        counting = pairs * bins * 4 if counted else _counting(pairs, bins, warps)
        return Work(launches=1, early=early, instructions=rounds * (pairs * step / 32 * 10.6 + counting))
    chunks, block = config["chunks"], config["block"]
    rounds = max(1.0, chunks / device.units)
    own = max(step, pairs / chunks)
    steps, passes = own / step, warps / 4  # each pass is one barrier of all warps after the other
    counting = max(1.0, own / block) * _counting(min(own, block), bins, count_warps(config, problem.experts))
    placing = passes * (own * step / 32 * 10.6 + (steps - 1) * _counting(step, bins, warps))
    table = chunks * bins * (2.5 if config["scan"] else 29 * rounds + 4.3)
    return Work(
        launches=1 if config["fused"] else 3 if config["scan"] else 2,
        early=early,
        instructions=rounds * (counting + placing) + table,
        barriers=4 * config["fused"] + rounds * passes * (steps - 1) + 0.5 * (rounds - 1),
    )


def _counting(pairs: float, bins: float, warps: int) -> float:
    """Instructions that count pairs into bins · 32 experts: comparisons, or votes and one shared atomic a bin and
    warp."""
    if pairs * bins * 32 <= 8192:
        return pairs * bins * 12
    return max(pairs / 32, warps) * (48 + 15 * bins) + 25 * bins * warps
