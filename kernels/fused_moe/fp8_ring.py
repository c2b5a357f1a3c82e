"""The `fp8_ring` variant of fused MoE: Hopper's warp-specialised kernel for both products, fp8 weights in blocks.

Sort, quantise the tokens, multiply and quantise, multiply, add a token's pairs up.
"""

from functools import lru_cache
from math import ceil
from typing import Any

import torch

from moecache.kernels.activations import panels, word_of
from moecache.kernels.agreed import BLOCK
from moecache.kernels.contract import Args, Source
from moecache.kernels.fused_moe import fp8_tiles as tiled
from moecache.kernels.fused_moe.fp8_tiles import Case
from moecache.kernels.fused_moe.sizes import Layer, padded
from moecache.kernels.fused_moe.sort_and_sum import add_up, sort_rows
from moecache.kernels.gemm.product import ring_layout
from moecache.kernels.matrix import until_summed
from moecache.kernels.signatures import signature_of, sized
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem

VARIANT = "fp8_ring"
ROWS, PANEL = 64, BLOCK  # rows of a multiplying group, of which a tile has two; columns of a panel, of which it has two


def fits(problem: Problem, c: Config, device: Device) -> str:
    """Why not, or ''."""
    hidden, middle = problem.dim("hidden"), problem.dim("intermediate")
    if device.arch != "sm_90" or problem.dim("quant", "") != "fp8_block" or problem.dim("unaligned"):
        return "fp8_ring wants sm_90, fp8_block and rows that start on 16 bytes"
    if hidden % BLOCK or middle % BLOCK or problem.dtype not in ("bf16", "fp16"):
        sizes = f"hidden={hidden}, intermediate={middle}, dtype={problem.dtype}"
        return f"{sizes}; allowed are multiples of {BLOCK}, and two-byte dtypes"
    if c["block"] != 2 * ROWS or not 2 <= c["stages"] <= 4 or c["group"] < 1 or c["programs"] < 1:
        return f"{c.name}: a ring has blocks of {2 * ROWS} rows and 2 to 4 stages"
    return ""


def launch(c: Config, args: Args, out: torch.Tensor) -> torch.Tensor:
    """Run the candidate into `out`. Workspace: tokens and sorted rows in fp8 with their scales, and [T · k, K]."""
    if not out.numel():
        return out
    x, w1, w2, ids, quant = args["hidden_states"], args["w1"], args["w2"], args["topk_ids"], args["quant"]
    (tokens, topk), hidden, middle = ids.shape, x.shape[1], w2.shape[2]
    case = Case(quant.kind, w1.dtype, x.dtype, topk, hidden, middle, args["activation"], args["on_input"],
                (args["w1_bias"] is not None, args["w2_bias"] is not None), (True, True))  # fmt: skip
    before, up, down = _kernels(c, case)
    rows = sort_rows(args, c["block"], False)
    most = rows.sorted_token_ids.numel()
    xq, xs = tiled.narrow(tokens, hidden, w1), tiled.scales(case, tokens, hidden, x)
    h = torch.empty(most, middle, dtype=w1.dtype, device=x.device)
    hs = torch.empty(middle // BLOCK, most, dtype=torch.float32, device=x.device)
    partial = torch.empty(ids.numel(), hidden, dtype=until_summed(x.dtype), device=x.device)
    tiled.quantise(before, x, xq, xs, rows, hidden)
    _multiply(up, xq, xs, w1, quant.w1_scale, h, hs, args["w1_bias"], rows, args)
    _multiply(down, h, hs, w2, quant.w2_scale, partial, hs, args["w2_bias"], rows, args)
    add_up(args, partial, out, False)
    return out


def _multiply(
    step: Any, a: Any, scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out: torch.Tensor,
    out_scales: torch.Tensor, bias: torch.Tensor | None, rows: Any, args: Args,
) -> None:  # fmt: skip
    """One product. The scales of the tokens stand by row; those between the products by block of columns."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    fn, c, programs, options = step
    experts, height, depth = w.shape
    n = height // panels(c["ACT"])
    each = w.stride(0) // w.stride(1) if experts > 1 else height
    whole = [(experts - 1) * each + height, depth]
    described = TensorDescriptor(w, whole, [w.stride(1), 1], [PANEL, BLOCK], ring_layout(8))
    a_row, (s_row, s_step) = a.stride(0), scales.stride() if c["GATHER"] else scales.stride()[::-1]
    if not c["GATHER"]:
        a = TensorDescriptor(a, [len(a), depth], [a_row, 1], [ROWS, BLOCK], ring_layout(8))
    tiles = ceil(rows.sorted_token_ids.numel() / (2 * ROWS)) * ceil(n / c["STEP"])
    fn[(min(programs, tiles),)](
        a, scales, described, w_scales.contiguous(), out, out_scales, scales if bias is None else bias.contiguous(),
        args["topk_weights"].contiguous(), rows.sorted_token_ids, rows.expert_ids, rows.num_tokens_post_padded,
        args["topk_ids"].numel(), a_row, s_row, s_step, out.stride(0), out_scales.stride(0), each,
        n if panels(c["ACT"]) == 2 else PANEL, n, depth, args["alpha"], args["limit"], **options | c,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _kernels(c: Config, case: Case) -> tuple[Any, Any, Any]:
    """Quantise, first product, second product: each with its constexprs and options."""
    from moecache.kernels.gemm import fp8_ring as ring

    fmax = torch.finfo(case.weights).max
    same = {"TOPK": case.topk, "BM": ROWS, "BN": PANEL, "BK": BLOCK, "GROUP": c["group"], "STAGES": c["stages"],
            "FMAX": fmax, "num_warps": 4}  # fmt: skip
    up = same | {
        "STEP": PANEL * (3 - panels(case.act)),
        "GATHER": True,
        "ACT": case.act,
        "WEIGHTED": case.on_input,
        "BIASED": case.biased[0],
    }
    down = same | {"STEP": 2 * PANEL, "GATHER": False, "ACT": "", "WEIGHTED": not case.on_input,
                   "BIASED": case.biased[1]}  # fmt: skip
    options = {"num_warps": 4}
    return (
        tiled.quantising(case, fmax, case.columns, False, False, {}), (ring.product, up, c["programs"], options),
        (ring.product, down, c["programs"], options),
    )  # fmt: skip


def sources(problem: Problem, c: Config, device: Device) -> list[Source]:
    """The two products, with the types and constants of this problem."""
    biased = bool(problem.dim("biased"))
    case = Case("fp8_block", torch.float8_e4m3fn, tiled.HIDDEN[problem.dtype], problem.topk, problem.dim("hidden"),
                problem.dim("intermediate"), word_of(problem), bool(problem.dim("on_input")),
                (biased, biased), (True, True))  # fmt: skip
    _, up, down = _kernels(c, case)
    return [_source(step, problem.dtype, Layer(problem, c["block"])) for step in (up, down)]


def _source(step: Any, kind: str, lie: Layer) -> Source:
    fn, c, _, options = step
    panel, half = (f"tensordesc<fp8e4nv[{high}, {BLOCK}],{ring_layout(8)!r}>" for high in (PANEL, ROWS))
    rows = "fp8e4nv" if c["ACT"] else tiled.TRITON[until_summed(tiled.HIDDEN[kind])]
    special = {"A": "*fp8e4nv" if c["GATHER"] else half, "W": panel, "OUT": f"*{rows}",
               "BIAS": f"*{kind}" if c["BIASED"] else "*fp32", "alpha": "fp32", "limit": "fp32"}  # fmt: skip
    special |= dict.fromkeys(("SCALES", "OUT_SCALES", "W_SCALES", "WEIGHTS"), "*fp32")
    signature = signature_of(fn, c, special)
    aligned = tuple(name for name, t in signature.items() if t.startswith("*"))
    values = lie.first() | {"a_row": padded(lie.hidden, tiled.fp8.WIDE.value)} if c["ACT"] else lie.second()
    return sized(Source(fn, signature, c, options, aligned=aligned), values, {})  # Hopper addresses all of its memory
