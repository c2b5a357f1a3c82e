"""The Triton variants of MoE sorting: their limits, their launches, what is tried, and the work that they make."""

from functools import lru_cache
from itertools import product
from math import ceil
from typing import Any

from moecache.kernels.launch import SLOT, Launch, Operand, Plan, Workspace, launch, planned
from moecache.kernels.sort import kernels as sort_triton
from moecache.predict.rates import alone_us
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, Value, pow2, token_bucket

VARIANTS = ("oneshot", "multiphase")


def padded_pairs(problem: Problem) -> int:
    """Pairs of a full token bucket, as the kernels round them."""
    return pow2(max(16, problem.tokens * problem.topk))


def fits(problem: Problem, config: Config, device: Device) -> str:
    """Why not, or ''."""
    pairs, warps, step = padded_pairs(problem), config["num_warps"], config["step"]
    if warps not in (1, 2, 4, 8, 16, 32) or warps * device.wave > device.max_threads:
        return f"num_warps={warps}: {warps * device.wave} threads; allowed are {device.max_threads} and a power of two"
    if step not in (16, 32, 64, 128):  # 256 spills on CDNA
        return f"step={step}; allowed are 16, 32, 64 and 128: a step compares all pairs with all"
    if dict(config.extra).get("launch_pdl") and device.vendor != "nvidia":
        return "launch_pdl=1: only NVIDIA has programmatic dependent launch"
    if config.variant == "oneshot":
        programs = config["programs"]
        if programs != pow2(programs) or not pairs <= programs * step or programs > 4 * device.units:
            return (
                f"{programs} programs of {step} pairs for {pairs}; allowed are powers of two up to {4 * device.units}"
            )
        if pairs * step > 256 * warps * device.wave:
            return f"{pairs} x {step} comparisons a program; {warps} warps do {256 * warps * device.wave}"
    else:
        chunks, block = config["chunks"], config["block"]
        most = 32 * warps * device.wave
        if chunks != pow2(chunks) or chunks > 4096 or block != pow2(block) or not 16 <= block <= most:
            return f"chunks={chunks}, block={block}; allowed are powers of two up to 4096 and {most}"
        if config["fused"] and (config["scan"] or chunks > device.units):
            return f"a handshake of {chunks} programs; {device.units} units hold one each, and no scan"
        # A barrier of a workgroup does not wait for stores there, and the flag waits for those of its own wave alone.
        if config["fused"] and device.vendor == "amd" and problem.experts > device.wave:
            return f"a handshake with {problem.experts} experts; AMD allows {device.wave}, whose counts one wave stores"
        most = (32 if config["fused"] else 128) * warps * device.wave  # both phases in one kernel need more registers
        if not config["scan"] and chunks * experts_block(problem.experts) > most:
            return f"a table of {chunks} x {problem.experts} counts; {warps} warps hold {most} without spills"
    programs = config["programs"] if config.variant == "oneshot" else config["chunks"]
    padding = max(1, experts_block(problem.experts) // programs) * pow2(problem.dim("block_m", 1))
    if padding > 128 * warps * device.wave:
        return f"{padding} rows of padding a program; {warps} warps hold {128 * warps * device.wave} without spills"
    shared = _shared(problem, config)
    fit = shared <= device.shared_bytes
    return "" if fit else f"about {shared} bytes of shared memory; the device has {device.shared_bytes}"


def _shared(problem: Problem, config: Config) -> int:
    """Shared memory that a program takes at most: histograms, gathers and layout changes, 4 bytes an entry."""
    pairs = padded_pairs(problem) if config.variant == "oneshot" else config["block"]
    return 4 * (4 * experts_block(problem.experts) + 4 * config["step"] + pairs + 256)


def experts_block(experts: int) -> int:
    return max(32, pow2(experts))


@lru_cache(maxsize=4096)
def _constexprs(config: Config, sizes: tuple[int, ...], *given: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constexprs of every kernel of the config, launch options)."""
    (pairs, topk, experts, block), (mapped, keep, limited, packed, weighted) = sizes, given
    extra = dict(config.extra)
    c: dict[str, Any] = {"K": topk, "E": experts, "EB": experts_block(experts), "BM": block, "PB": pow2(block)}
    c |= {"MAPPED": mapped and not keep, "LABELLED": mapped and keep, "LIMITED": limited, "PACKED": packed}
    c |= {"WEIGHTED": weighted, "STEP": config["step"], "PDL": bool(extra.get("launch_pdl"))}
    if config.variant == "oneshot":
        c |= {"B": pow2(max(16, pairs)), "PROGRAMS": config["programs"]}
    else:
        c |= {
            "CHUNKS": config["chunks"],
            "B": config["block"],
            "SCANNED": bool(config["scan"]),
            "FUSED": bool(config["fused"]),
            "WIDTH": 4,
        }
    options: dict[str, Any] = {"num_warps": config["num_warps"]}
    if config.variant == "multiphase" and config["fused"]:
        options["launch_cooperative_grid"] = True  # all programs resident, or the launch fails: never a deadlock
    options |= {k: bool(v) if k == "launch_pdl" else v for k, v in extra.items()}
    return c, options


def count_warps(config: Config, experts: int) -> int:
    """A histogram costs every warp one shared atomic a bin: with many bins one warp is enough."""
    return 1 if experts > 128 and config["block"] <= 256 else int(config["num_warps"])


def results(call: Any, work: Workspace) -> dict[str, Operand]:
    """The parts of a SortResult in memory of the call's own, by name."""
    experts, block = call.num_experts, call.block_m
    pairs = call.topk_ids.numel()
    rows = call.rows or min(pairs + experts * (block - 1), pairs * block)
    sizes = {"sorted_token_ids": rows, "expert_ids": ceil(rows / block), "num_tokens_post_padded": 2}
    sizes |= {"expert_offsets": experts + 1, "counts": experts, "tickets": 8}
    found = {name: work.take("i32", size) for name, size in sizes.items()}
    return found | {"posted": call.posted or work.take("i32", 1)}


def launches(config: Config, call: Any, out: Any, work: Workspace, fused: bool = True) -> list[Launch]:
    """What a config launches for a SortCall, into a SortResult; both of operands.

    Args:
        fused: whether a slot for a handshake is free; without one the phases are launches of their own.
    """
    ids, weights, mapping, limit = call.topk_ids, call.topk_weights, call.expert_map, call.num_tokens
    n, topk, experts = ids.numel(), ids.shape[1], call.num_experts
    sizes = token_bucket(ids.shape[0]) * topk, topk, experts, call.block_m
    given = mapping is not None, call.keep_masked, limit is not None, call.packed, weights is not None
    c, options = _constexprs(config, sizes, *given)
    strides = (*ids.strides, *(weights.strides if weights is not None else (0, 0)))
    none = out.counts
    weights, mapping, limit = (none if t is None else t for t in (weights, mapping, limit))
    outs = out.sorted_token_ids, none if out.sorted_weights is None else out.sorted_weights, out.expert_ids
    outs = (*outs, out.num_tokens_post_padded, out.expert_offsets, out.counts, out.tickets, out.posted)
    rows = out.sorted_token_ids.numel()
    if config.variant == "oneshot":
        args = (ids, weights, mapping, limit, *outs, *strides, n, rows)
        return [launch(sort_triton.oneshot, c["PROGRAMS"], args, c, options)]
    if c["FUSED"] and not fused:
        c, options = c | {"FUSED": False}, {k: v for k, v in options.items() if k != "launch_cooperative_grid"}
    chunks, slot, found = c["CHUNKS"], none, []
    size = ceil(ceil(n / chunks) / c["STEP"]) * c["STEP"]
    table = work.take("i32", chunks * experts)
    counted = work.take("i32", experts) if c["SCANNED"] else none
    if c["FUSED"]:
        slot = Operand(SLOT, "i32", (1,), (1,))
    else:
        counting = options | {"num_warps": count_warps(config, experts)}
        found += [launch(sort_triton.count, chunks, (ids, mapping, limit, table, *ids.strides, n, size), c, counting)]
    if c["SCANNED"]:
        found += [launch(sort_triton.scan, ceil(experts / c["WIDTH"]), (table, counted), c, options)]
    args = (ids, weights, mapping, limit, table, counted, slot, *outs, *strides, n, rows, size)
    return [*found, launch(sort_triton.place, chunks, args, c, options)]


def plan(config: Config, call: Any, out: Any, device: Device) -> Plan:
    """All launches of a config, into the outputs of the op."""
    return planned(lambda work, free: launches(config, call, out, work, free))


# --- what is tried ---


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config; those that do not fit are left out by the op."""
    return _of(padded_pairs(problem), _least(problem), device)


def every(problem: Problem, device: Device) -> list[Config]:
    """The configs of all problems whose winners may answer for this one: tokens and block_m differ by a factor of 4 at
    most. Far fewer programs than a size asks for would take seconds."""
    around = product(_around(problem.tokens), _around(problem.dim("block_m", 1)))
    near = [problem.model_copy(update={"tokens": tokens, "dims": (("block_m", block),)}) for tokens, block in around]
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
    where = {"vendor": device.vendor, "arch": device.arch, "units": device.units, "dims": tuple(dims.items())}
    problem = Problem(op="moe_sort", tokens=tokens, experts=experts, topk=topk, **where)
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
