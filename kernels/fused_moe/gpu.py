"""The Triton variants of fused MoE: their limits, how they are launched and compiled.

`decode` is two launches without a sort. The others sort, multiply, multiply, and add up: `tiles` on any GPU, `heights`
with a lower tile for blocks of few rows, `ring` and `tiles_ring` with Hopper's warp-specialised kernel for both
products or the second one. `combine=atomic` adds to the output in the second product, in no fixed order; `sum` writes
each pair and adds them up afterwards. fp8 weights have kernels of their own, in fused_moe/fp8_tiles.py.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil
from typing import Any

import torch

from moecache.kernels.activations import panels, word_of
from moecache.kernels.contract import Args, Source
from moecache.kernels.formats.fp8 import blocks_apart
from moecache.kernels.fused_moe.sizes import Layer
from moecache.kernels.fused_moe.sort_and_sum import add_up, sort_rows
from moecache.kernels.gemm import vector as decode
from moecache.kernels.gemm.product import BY_PAIR, BY_ROW, KERNELS, Product, multiply, product, source, unfit
from moecache.kernels.gemm.vector import DECODE_PAIRS
from moecache.kernels.matrix import DTYPE_NAMES, DTYPES, until_summed
from moecache.kernels.signatures import signature_of, sized
from moecache.kernels.sort.op import SortResult
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem, pow2

MOST = 192  # weights that a thread of decode holds at a time


def fits(problem: Problem, config: Config, device: Device) -> str:
    """Why not, or ''."""
    kind = problem.dim("quant", "")
    if problem.dtype not in DTYPES or (kind and (config.variant != "decode" or kind != "fp8_block")):
        return f"dtype={problem.dtype}, quant={kind or 'none'}: {config.variant} takes bf16, fp16 and fp32"
    if config.variant == "decode":
        return _unfit_decode(problem, config, device)
    if config.variant not in KERNELS:
        return f"variant {config.variant!r} does not exist; allowed are decode, {', '.join(KERNELS)}"
    if config["combine"] not in ("sum", "atomic"):
        return f"combine={config['combine']}; allowed are sum and atomic"
    if config["combine"] == "atomic" and (problem.dim("deterministic") or problem.dtype == "fp32"):
        return "combine=atomic adds in no fixed order"
    if config["combine"] == "atomic" and problem.dtype == "fp16":
        return "combine=atomic adds up in fp16, where a part may be inf of a sum that is not"
    first, second = products(config)
    aligned = not problem.dim("unaligned")
    hidden, middle = problem.dim("hidden"), problem.dim("intermediate")
    most = max(problem.tokens, ceil(problem.tokens * problem.topk / problem.experts))  # a token may name one twice
    if first.block > max(16, 2 * pow2(most)):
        return f"block={first.block}: no expert has more than {most} rows"
    height = panels(word_of(problem))
    return unfit(first, device, problem.dtype, hidden, height, aligned) or unfit(
        second, device, problem.dtype, middle, 1, aligned
    )


def _unfit_decode(problem: Problem, c: Config, device: Device) -> str:
    if problem.tokens * problem.topk > DECODE_PAIRS:
        return f"{problem.tokens} tokens of {problem.topk} experts; decode takes {DECODE_PAIRS} pairs"
    if problem.dim("quant", "") and problem.dim("unaligned"):
        return "unaligned fp8 weights: decode takes rows whose elements lie side by side"
    slots = pow2(problem.topk)
    least = 128 if problem.dim("quant", "") else 64
    up, down = (c["up_n"], c["up_k"], c["up_warps"]), (c["down_n"] * slots, c["down_k"], c["down_warps"])
    for n, k, warps in (up, down):
        lanes = warps * device.wave
        if any(v < 1 or v & (v - 1) for v in (n, k, warps)) or k < least or lanes > device.max_threads:
            return f"n={n}, k={k}, warps={warps}; allowed are powers of two, k from {least}"
        if not 4 <= n * k // lanes <= MOST:
            return f"{n} x {k} weights for {lanes} threads; allowed are 4 to {MOST} each"
    if dict(c.extra).get("launch_pdl") and device.vendor != "nvidia":
        return "launch_pdl=1: only NVIDIA has programmatic dependent launch"
    return ""


def products(config: Config) -> tuple[Product, Product]:
    """(first product, second product) of a sorted variant."""
    first, second = KERNELS[config.variant]
    return product(config, first, "up_"), product(config, second, "down_")


def launch(config: Config, args: Args, out: torch.Tensor) -> torch.Tensor:
    """Run one candidate into `out` on the current stream. Workspace: [T · k, N] for decode, else [sorted rows, N], and
    [T · k, K] unless the products are added up atomically.

    Raises:
        InvalidInput: elements of a row of weights are not side by side.
    """
    if not out.numel():
        return out
    args = side_by_side(args)
    if config.variant == "decode":
        _decode(config, args, out)
    else:
        both = products(config)
        multiplied([both], lambda given: [sort_rows(given, both[0].block, bool(both[0].pdl))], config, args, out)
    return out


def side_by_side(args: Args) -> Args:
    """The arguments with the elements of a row side by side, copied where they are not; `bias1` and `bias2` too.

    Raises:
        InvalidInput: those of a row of weights are not.
    """
    x, w1, w2 = args["hidden_states"], args["w1"], args["w2"]
    if w1.stride(2) != 1 or w2.stride(2) != 1:
        raise InvalidInput(f"weights have last strides {w1.stride(2)} and {w2.stride(2)}; allowed is 1")
    return args | {
        "hidden_states": x if x.stride(1) == 1 else x.contiguous(), "topk_weights": args["topk_weights"].contiguous(),
        "bias1": None if args["w1_bias"] is None else args["w1_bias"].contiguous(),
        "bias2": None if args["w2_bias"] is None else args["w2_bias"].contiguous(),
    }  # fmt: skip


def multiplied(
    both: Sequence[tuple[Product, Product]], sort: Callable[[Args], Sequence[SortResult]], config: Config, args: Args,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """Sort, multiply, multiply, add up into `out` as `config` combines; with the products of one config or of several,
    for each of which `sort` gives the rows."""
    x, w1, w2, ids, scales = (args[name] for name in ("hidden_states", "w1", "w2", "topk_ids", "topk_weights"))
    pairs, topk, on_input, atomic = ids.numel(), ids.shape[1], args["on_input"], config["combine"] == "atomic"
    y = out.zero_() if atomic else torch.empty(pairs, w2.shape[1], dtype=until_summed(x.dtype), device=x.device)
    rows = sort(args)
    h = torch.empty(max(r.sorted_token_ids.numel() for r in rows), w2.shape[2], dtype=x.dtype, device=x.device)
    for (first, second), mine in zip(both, rows, strict=True):
        multiply(
            first, x, w1, mine, h, pairs=pairs, topk=topk, source=BY_PAIR, act=args["activation"], alpha=args["alpha"],
            limit=args["limit"], weights=scales if on_input else None, bias=args["bias1"],
        )  # fmt: skip
        multiply(
            second, h, w2, mine, y, pairs=pairs, topk=topk, source=BY_ROW, weights=None if on_input else scales,
            bias=args["bias2"], atomic=atomic,
        )  # fmt: skip
    if not atomic:
        add_up(args, y, out, bool(both[-1][0].pdl))


def _decode(c: Config, args: Args, out: torch.Tensor) -> None:
    """Matrix-vector products of every pair, then of every token's slots together."""
    x, w1, w2, ids, mapping = args["hidden_states"], args["w1"], args["w2"], args["topk_ids"], args["expert_map"]
    (tokens, topk), n, k = ids.shape, w2.shape[2], w1.shape[2]
    h = torch.empty(tokens * topk, n, dtype=x.dtype, device=x.device)
    up, down, options = _decode_constants(
        c, topk, args["num_experts"], len(w1), mapping is not None, args["activation"], args["on_input"],
        args["bias1"] is not None, args["bias2"] is not None, k, _largest(args), blocks_apart(args["quant"], w1, w2),
    )  # fmt: skip
    quant = args["quant"]
    scales1, scales2 = (ids, ids) if quant is None else (quant.w1_scale.contiguous(), quant.w2_scale.contiguous())
    bias1, bias2, mapping = (ids if t is None else t for t in (args["bias1"], args["bias2"], mapping))
    decode.up[(tokens * topk * ceil(n / c["up_n"]),)](
        x, w1, scales1, bias1, h, ids, mapping, args["topk_weights"], x.stride(0), w1.stride(0), w1.stride(1),
        *ids.stride(), n, k, args["alpha"], args["limit"], **up, num_warps=c["up_warps"], **options,
    )  # fmt: skip
    decode.down[(tokens * ceil(k / c["down_n"]),)](
        h, w2, scales2, bias2, out, ids, mapping, args["topk_weights"], w2.stride(0), w2.stride(1), *ids.stride(),
        out.stride(0), k, n, **down, num_warps=c["down_warps"], **options,
    )  # fmt: skip


def _largest(args: Args) -> float:
    """fp8's largest value; 0 for weights that are no fp8."""
    return 0.0 if args["quant"] is None else torch.finfo(args["w1"].dtype).max


@lru_cache(maxsize=1024)
def _decode_constants(
    c: Config, topk: int, everywhere: int, experts: int, mapped: bool, act: str, on_input: bool, biased1: bool,
    biased2: bool, depth: int, largest: float, apart: bool,
) -> Any:  # fmt: skip
    """(constexprs of up, of down, launch options)."""
    extra = dict(c.extra)
    pdl = bool(extra.get("launch_pdl"))
    both = {"TOPK": topk, "G": everywhere, "E": experts, "MAPPED": mapped, "FMAX": largest, "PDL": pdl}
    up = both | {"BN": c["up_n"], "BK": c["up_k"], "ACT": act, "WEIGHTED": on_input, "BIASED": biased1, "APART": apart,
                 "EVEN": depth % c["up_k"] == 0}  # fmt: skip
    down = both | {
        "SLOTS": pow2(topk),
        "BN": c["down_n"],
        "BK": c["down_k"],
        "WEIGHTED": not on_input,
        "BIASED": biased2,
    }
    return up, down, {"launch_pdl": True} if pdl else {}


def sources(problem: Problem, config: Config, device: Device) -> list[Source]:
    """The kernels of a config with the types and constants of this problem, in launch order, without the sort."""
    hidden, middle, topk = problem.dim("hidden"), problem.dim("intermediate"), problem.topk
    act, biased, on_input = (
        word_of(problem),
        bool(problem.dim("biased")),
        bool(problem.dim("on_input")),
    )
    if config.variant == "decode":
        return _decode_sources(problem, config, act, biased, on_input)
    first, second = products(config)
    atomic, lie = config["combine"] == "atomic", Layer(problem, first.block)
    written = lie.out if atomic else lie.pairs
    return [
        source(
            first, problem.dtype, hidden, topk=topk, source=BY_PAIR, act=act, weighted=on_input, biased=biased,
            values=lie.first(first.n), held={**dict.fromkeys("XA", lie.x.nbytes), "W": lie.w1.nbytes,
                                      **dict.fromkeys(("H", "OUT"), lie.h.nbytes)},
        ),
        source(
            second, problem.dtype, middle, topk=topk, source=BY_ROW, weighted=not on_input, biased=biased,
            atomic=atomic, out=problem.dtype if atomic else DTYPE_NAMES[until_summed(DTYPES[problem.dtype])],
            values=lie.second(second.n), held={**dict.fromkeys(("A", "AT"), lie.h.nbytes), "W": lie.w2.nbytes,
                                               "OUT": written.nbytes},
        ),
    ]  # fmt: skip


def _decode_sources(problem: Problem, c: Config, act: str, biased: bool, on_input: bool) -> list[Source]:
    mapped, kind = bool(problem.dim("mapped")), f"*{problem.dtype}"
    up, down, options = _decode_constants(
        c, problem.topk, problem.dim("global", problem.experts), problem.experts, mapped, act, on_input, biased, biased,
        problem.dim("hidden"), (240.0 if problem.arch == "gfx942" else 448.0) if problem.dim("quant", "") else 0.0,
        bool(problem.dim("apart")),
    )  # fmt: skip
    narrow = "*fp8e4b8" if problem.arch == "gfx942" else "*fp8e4nv"
    quantised = bool(problem.dim("quant", ""))
    special = {"X": kind, "H": kind, "W": narrow if quantised else kind, "OUT": kind, "WEIGHTS": "*fp32",
               "BIAS": kind if biased else "*i32", "WS": "*fp32" if quantised else "*i32", "alpha": "fp32",
               "limit": "fp32"}  # fmt: skip
    found, lie = [], Layer(problem, 0)
    for fn, constexprs, warps, values, held in (
        (decode.up, up, c["up_warps"], lie.first(), {"X": lie.x.nbytes, "W": lie.w1.nbytes}),
        (decode.down, down, c["down_warps"], lie.second(), {"W": lie.w2.nbytes, "OUT": lie.out.nbytes}),
    ):
        signature = signature_of(fn, constexprs, special)
        aligned = tuple(name for name, t in signature.items() if t.startswith("*"))
        plain = Source(fn, signature, constexprs, {"num_warps": warps, **options}, aligned=aligned)
        found.append(sized(plain, values, held))
    return found
