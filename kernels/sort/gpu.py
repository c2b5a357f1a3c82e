"""The Triton variants of MoE sorting: their limits, how they are launched and compiled."""

from functools import lru_cache
from math import ceil
from typing import Any

import torch

from moecache.kernels.contract import Args, Source
from moecache.kernels.signatures import signature_of
from moecache.kernels.sort import handshake
from moecache.kernels.sort import kernels as sort_triton
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, pow2, token_bucket


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
    elif config.variant == "multiphase":
        chunks, block = config["chunks"], config["block"]
        if (
            chunks != pow2(chunks)
            or chunks > 4096
            or block != pow2(block)
            or not 16 <= block <= 32 * warps * device.wave
        ):
            most = 32 * warps * device.wave
            return f"chunks={chunks}, block={block}; allowed are powers of two up to 4096 and {most}"
        if config["fused"] and (config["scan"] or chunks > device.units):
            return f"a handshake of {chunks} programs; {device.units} units hold one each, and no scan"
        # A barrier of a workgroup does not wait for stores there, and the flag waits for those of its own wave alone.
        if config["fused"] and device.vendor == "amd" and problem.experts > device.wave:
            return f"a handshake with {problem.experts} experts; AMD allows {device.wave}, whose counts one wave stores"
        most = (32 if config["fused"] else 128) * warps * device.wave  # both phases in one kernel need more registers
        if not config["scan"] and chunks * experts_block(problem.experts) > most:
            return f"a table of {chunks} x {problem.experts} counts; {warps} warps hold {most} without spills"
    else:
        return f"variant {config.variant!r} does not exist; allowed are oneshot and multiphase"
    programs = config["programs"] if config.variant == "oneshot" else config["chunks"]
    padding = max(1, experts_block(problem.experts) // programs) * pow2(problem.dim("block_m", 1))
    if padding > 128 * warps * device.wave:
        return f"{padding} rows of padding a program; {warps} warps hold {128 * warps * device.wave} without spills"
    shared = _shared(problem, config)
    return (
        ""
        if shared <= device.shared_bytes
        else f"about {shared} bytes of shared memory; the device has {device.shared_bytes}"
    )


def _shared(problem: Problem, config: Config) -> int:
    """Shared memory that a program takes at most: histograms, gathers and layout changes, 4 bytes an entry."""
    pairs = padded_pairs(problem) if config.variant == "oneshot" else config["block"]
    return 4 * (4 * experts_block(problem.experts) + 4 * config["step"] + pairs + 256)


def experts_block(experts: int) -> int:
    return max(32, pow2(experts))


@lru_cache(maxsize=4096)
def _constexprs(
    config: Config, pairs: int, topk: int, experts: int, block_m: int, mapped: bool, keep: bool, limited: bool,
    packed: bool, weighted: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """(constexprs of every kernel of the config, launch options)."""
    extra = dict(config.extra)
    c: dict[str, Any] = {
        "K": topk, "E": experts, "EB": experts_block(experts), "BM": block_m, "PB": pow2(block_m),
        "MAPPED": mapped and not keep, "LABELLED": mapped and keep, "LIMITED": limited, "PACKED": packed,
        "WEIGHTED": weighted, "STEP": config["step"], "PDL": bool(extra.get("launch_pdl")),
    }  # fmt: skip
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


def _only(constexprs: dict[str, Any], fn: Any) -> dict[str, Any]:
    return {k: v for k, v in constexprs.items() if k in fn.arg_names}


def launch(config: Config, args: Args, out: Any) -> None:
    """Launch the kernels of a config into `out`, a SortResult, on the current stream."""
    ids, weights, mapping, limit = (
        args["topk_ids"],
        args["topk_weights"],
        args["expert_map"],
        args["num_tokens"],
    )
    n, topk, experts = ids.numel(), ids.shape[1], args["num_experts"]
    c, options = _constexprs(
        config, token_bucket(ids.shape[0]) * topk, topk, experts, args["block_m"], mapping is not None,
        args["keep_masked"], limit is not None, args["packed"], weights is not None,
    )  # fmt: skip
    strides = (*ids.stride(), *(weights.stride() if weights is not None else (0, 0)))
    none = out.counts
    weights, mapping, limit = (none if t is None else t for t in (weights, mapping, limit))
    outs = (out.sorted_token_ids, none if out.sorted_weights is None else out.sorted_weights, out.expert_ids,
            out.num_tokens_post_padded, out.expert_offsets, out.counts, out.tickets, out.posted)  # fmt: skip
    rows = out.sorted_token_ids.numel()
    if config.variant == "oneshot":
        fn = sort_triton.oneshot
        fn[(c["PROGRAMS"],)](ids, weights, mapping, limit, *outs, *strides, n, rows, **_only(c, fn), **options)
        return
    chunks, slot = c["CHUNKS"], none
    size = ceil(ceil(n / chunks) / c["STEP"]) * c["STEP"]
    table = torch.empty(chunks * experts, dtype=torch.int32, device=ids.device)
    counted = torch.empty(experts, dtype=torch.int32, device=ids.device) if c["SCANNED"] else none
    if c["FUSED"]:
        slot = handshake.slot(ids.device)
        if slot is None:  # a capture with no slot left: the same work in two launches
            c, slot = c | {"FUSED": False}, none
            options = {k: v for k, v in options.items() if k != "launch_cooperative_grid"}
    if not c["FUSED"]:
        counting = options | {"num_warps": count_warps(config, experts)}
        sort_triton.count[(chunks,)](
            ids, mapping, limit, table, *ids.stride(), n, size, **_only(c, sort_triton.count), **counting
        )
    if c["SCANNED"]:
        sort_triton.scan[(ceil(experts / c["WIDTH"]),)](table, counted, **_only(c, sort_triton.scan), **options)
    fn = sort_triton.place
    fn[(chunks,)](
        ids,
        weights,
        mapping,
        limit,
        table,
        counted,
        slot,
        *outs,
        *strides,
        n,
        rows,
        size,
        **_only(c, fn),
        **options,
    )


def sources(problem: Problem, config: Config, device: Device) -> list[Source]:
    """The kernels of a config with the types and constants of this problem, in launch order."""
    c, options = _constexprs(
        config, problem.tokens * problem.topk, problem.topk, problem.experts, problem.dim("block_m"),
        bool(problem.dim("mapped")), False, False, False, bool(problem.dim("weighted")),
    )  # fmt: skip
    fns = [sort_triton.oneshot]
    if config.variant == "multiphase":
        fns = [sort_triton.count] * (not c["FUSED"]) + [sort_triton.scan] * c["SCANNED"] + [sort_triton.place]
    ids = "*i64" if problem.dtype == "int64" else "*i32"
    counting = (
        options | {"num_warps": count_warps(config, problem.experts)} if config.variant == "multiphase" else options
    )
    return [_source(fn, ids, c, counting if fn is sort_triton.count else options) for fn in fns]


def _source(fn: Any, ids: str, constexprs: dict[str, Any], options: dict[str, Any]) -> Source:
    """Signature by name: pointers in capitals, sizes and strides as int32."""
    weights = "*fp32" if constexprs["WEIGHTED"] else "*i32"
    special = {"IDS": ids, "WEIGHTS": weights, "SORTED_WEIGHTS": weights}
    own = _only(constexprs, fn)
    signature = signature_of(fn, own, special)
    pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return Source(fn, signature, own, options, aligned=pointers)
