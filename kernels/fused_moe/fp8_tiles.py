"""The Triton variants of fused MoE with fp8 weights: their limits, how they are launched and compiled.

`fp8_tiles` sorts, quantises the tokens, multiplies, multiplies, and adds a token's pairs up. With `fuse` a tile of the
first product quantises its rows itself, which fp8_block alone allows; without, that is one more launch.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moecache.kernels import activations
from moecache.kernels.agreed import BLOCK
from moecache.kernels.contract import Args, Source
from moecache.kernels.formats.fp8 import DTYPES, KINDS, blocks_apart
from moecache.kernels.fused_moe.sizes import Layer, padded
from moecache.kernels.fused_moe.sort_and_sum import add_up, sort_rows
from moecache.kernels.gemm import fp8_tile as fp8
from moecache.kernels.matrix import DTYPES as HIDDEN
from moecache.kernels.matrix import until_summed
from moecache.kernels.signatures import signature_of, sized
from moecache.kernels.sort import op as sort
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, pow2

NAMES = ("n", "k", "stages", "warps")
TRITON = {DTYPES[0]: "fp8e4nv", DTYPES[1]: "fp8e4b8", torch.bfloat16: "bf16", torch.float16: "fp16",
          torch.float32: "fp32"}  # fmt: skip
WIDEST = 8192  # columns of a row that one program holds at a time
BYTES = {2: 40, 1: 64}  # by panels: single bytes a thread that are loaded without spills
KNOBS = {"nvidia": ("launch_pdl",), "amd": ("xcds", "matrix_instr_nonkdim", "kpack", "waves_per_eu")}


@dataclass(frozen=True)
class Case:
    """What of a call decides machine code, beside the config.

    Attributes:
        kind, weights, hidden: of Quant; dtypes of the weights and of the tokens.
        topk, columns, middle: slots of a token, K, N.
        act, on_input, biased: as the call says; `biased` for both products.
        described: whether w1 and w2 can have tensor descriptors.
        apart: gate and up have blocks of scales of their own, and N is no whole number of them.
    """

    kind: str
    weights: torch.dtype
    hidden: torch.dtype
    topk: int
    columns: int
    middle: int
    act: str
    on_input: bool
    biased: tuple[bool, bool]
    described: tuple[bool, bool]
    apart: bool = False

    @property
    def blocked(self) -> bool:
        return self.kind == "fp8_block"


# --- what configs must satisfy ---


def fits(problem: Problem, config: Config, device: Device) -> str:
    """Why not, or ''."""
    c, kind, extra = dict(config.params), problem.dim("quant", ""), dict(config.extra)
    sm = device.arch.removeprefix("sm_")
    sm = int(sm) if device.vendor == "nvidia" and sm.isdigit() else 0
    if config.variant != "fp8_tiles" or kind not in KINDS or problem.dtype not in HIDDEN:
        what = f"{config.variant} with quant={kind or 'none'} and dtype={problem.dtype}"
        return f"{what}: fp8_tiles takes {', '.join(KINDS)}"
    if sm < 89 and device.arch not in ("gfx942", "gfx950"):
        return f"{device.arch} has no fp8 products; allowed are sm_89 and later, gfx942 and gfx950"
    flags = {c[name] for name in ("swap", "tma", "fuse")}
    if c["block"] not in (16, 32, 64, 128) or c["group"] < 1 or not flags <= {0, 1}:
        return f"{config.name}: block is 16, 32, 64 or 128, group at least 1, and swap, tma and fuse are 0 or 1"
    if c["tma"] and (sm < 90 or problem.dim("unaligned")):
        return "tma=1 wants sm_90 or later and rows that start on 16 bytes"
    if c["fuse"] and (kind != "fp8_block" or c["up_n"] not in (64, 128)):
        return f"fuse=1 with quant={kind} and up_n={c['up_n']}; allowed are fp8_block and 64 or 128 columns"
    unknown = set(extra) - set(KNOBS[device.vendor])
    if unknown or extra.get("xcds", 1) < 1:
        return f"{', '.join(sorted(unknown)) or 'xcds under 1'}: {device.vendor} has {', '.join(KNOBS[device.vendor])}"
    return _unfit(problem, c, "up", activations.panels(activations.word_of(problem)), device) or _unfit(
        problem, c, "down", 1, device
    )


def _unfit(problem: Problem, c: dict[str, Any], prefix: str, panels: int, device: Device) -> str:
    """Why one product cannot run; `panels` of weights a tile reads (gate and up: 2)."""
    n, k, stages, warps = (c[f"{prefix}_{name}"] for name in NAMES)
    blocked, lanes = problem.dim("quant") == "fp8_block", warps * device.wave
    depths = (BLOCK,) if blocked else (64, 128, 256)
    if n not in (16, 32, 64, 128) or k not in depths or warps not in (1, 2, 4, 8, 16):
        return f"{prefix}: n={n}, k={k}, warps={warps}; allowed are powers of two, n of 16 to 128, k of {depths}"
    if not 1 <= stages <= 12 or lanes > device.max_threads:
        return f"{prefix}: stages={stages}, {lanes} threads; allowed are 1 to 12 and {device.max_threads}"
    split = blocked and problem.dim("intermediate") % BLOCK and panels == 2 and not problem.dim("apart")
    halves = prefix == "up" and c["fuse"] and n < BLOCK
    most = 32 if split and (halves or c["swap"]) and device.vendor == "nvidia" else 64
    sums, loads, single = panels * c["block"] * n // lanes, (c["block"] + panels * n) * k // lanes, BYTES[panels]
    if sums > most:
        return f"{prefix}: {sums} sums a thread; without spills {most} are possible"
    if problem.dim("unaligned") and (stages > 1 or loads > single):
        return f"{prefix}: {loads} single bytes a thread in {stages} stages; allowed are {single} in one"
    used = shared(c["block"], n, k, stages, panels, device)
    fit = used <= device.shared_bytes
    return "" if fit else f"{prefix}: about {used} bytes of shared memory; the device has {device.shared_bytes}"


def shared(block: int, n: int, k: int, stages: int, panels: int, device: Device) -> int:
    """Shared memory of one program: every stage with its scales, or the sums as they change layout."""
    held = max(1, stages - 1) if device.arch == "gfx942" else stages  # without asynchronous copies one is in registers
    return max(held * ((block + panels * n) * k + 4 * block + 16), 4 * block * n) + 2048


# --- launching ---


def launch(config: Config, args: Args, out: torch.Tensor) -> torch.Tensor:
    """Run one candidate into `out` on the current stream. Workspace: the tokens and the rows between the products in
    fp8 with their scales, those rows in the hidden dtype too unless they are fused, and [T · k, K] before the sum."""
    if not out.numel():
        return out
    x, w1, w2, quant = args["hidden_states"], args["w1"], args["w2"], args["quant"]
    case = Case(
        quant.kind, w1.dtype, x.dtype, args["topk_ids"].shape[1], x.shape[1], w2.shape[2], args["activation"],
        args["on_input"], (args["w1_bias"] is not None, args["w2_bias"] is not None), (_described(w1), _described(w2)),
        blocks_apart(quant, w1, w2),
    )  # fmt: skip
    pdl = bool(dict(config.extra).get("launch_pdl"))
    rows = sort_rows(args, config["block"], pdl)
    steps = _kernels(config, case)
    xq = narrow(len(x), case.columns, w1)
    hq = narrow(rows.sorted_token_ids.numel(), case.middle, w1)
    xs, hs = scales(case, len(xq), case.columns, x), scales(case, len(hq), case.middle, x)
    quantise(steps[0], x, xq, xs, rows, case.columns)
    fused = len(steps) == 3
    h = hq if fused else torch.empty(len(hq), case.middle, dtype=x.dtype, device=x.device)
    _up(config, args, steps[1], rows, xq, xs, h, hs)
    if not fused:
        quantise(steps[2], h, hq, hs, rows, case.middle)
    partial = torch.empty(args["topk_ids"].numel(), case.columns, dtype=until_summed(x.dtype), device=x.device)
    _down(config, args, steps[-1], rows, hq, hs, partial)
    add_up(args, partial, out, pdl)
    return out


def _described(w: torch.Tensor) -> bool:
    """Whether a tensor descriptor over [experts · rows, columns] can stand for the weights."""
    expert, row, column = w.stride()
    even = row > 0 and (len(w) == 1 or expert % row == 0)
    return column == 1 and even and row * w.itemsize % 16 == 0 and w.data_ptr() % 16 == 0


def narrow(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Rows in fp8, each with room for zeros behind it."""
    wide = fp8.WIDE.value
    return torch.empty(rows, ceil(columns / wide) * wide, dtype=like.dtype, device=like.device)


def scales(case: Case, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(rows, ceil(columns / BLOCK) if case.blocked else 1, dtype=torch.float32, device=like.device)


def quantise(step: Any, x: torch.Tensor, q: torch.Tensor, s: torch.Tensor, rows: sort.SortResult, columns: int) -> None:
    fn, c, options = step
    grid = (ceil(len(x) * s.shape[1] / c["BG"]),)
    fn[grid](x, q, s, rows.num_tokens_post_padded, len(x), columns, *x.stride(), q.stride(0), **c, **options)


def _weight(w: torch.Tensor, tma: bool, n: int, k: int) -> tuple[Any, int, int, int, int]:
    """(pointer or descriptor over [experts · rows, columns], rows from one expert to the next in it, strides)."""
    expert, row, column = w.stride()
    if not tma:
        return w, w.shape[1], expert, row, column
    each = expert // row if len(w) > 1 else w.shape[1]
    shape = [(len(w) - 1) * each + w.shape[1], w.shape[2]]
    return TensorDescriptor(w, shape, [row, 1], [n, k]), each, expert, row, column


def _up(
    config: Config, args: Args, step: Any, rows: sort.SortResult, x: torch.Tensor, xs: torch.Tensor, h: torch.Tensor,
    hs: torch.Tensor,
) -> None:  # fmt: skip
    fn, c, options = step
    ids, w1, (middle, columns) = args["topk_ids"], args["w1"], (args["w2"].shape[2], args["w1"].shape[2])
    bias, wide = args["w1_bias"], BLOCK if c["QUANT"] else c["BN"]
    grid = (ceil(len(hs) / c["BLOCK"]) * ceil(middle / wide),)
    w, *strides = _weight(w1, c["TMA"], c["BN"], c["BK"])
    fn[grid](
        x, xs, w, args["quant"].w1_scale.contiguous(), hs if bias is None else bias.contiguous(), h, hs,
        args["topk_weights"].contiguous(), rows.sorted_token_ids, rows.expert_ids, rows.num_tokens_post_padded,
        ids.numel(), x.stride(0), *strides, h.stride(0), middle, columns, args["alpha"], args["limit"],
        **c, **options,
    )  # fmt: skip


def _down(
    config: Config, args: Args, step: Any, rows: sort.SortResult, h: torch.Tensor, hs: torch.Tensor, out: torch.Tensor
) -> None:
    fn, c, options = step
    ids, w2, (columns, middle) = args["topk_ids"], args["w2"], args["w2"].shape[1:]
    bias = args["w2_bias"]
    grid = (ceil(len(hs) / c["BLOCK"]) * ceil(columns / c["BN"]),)
    w, *strides = _weight(w2, c["TMA"], c["BN"], c["BK"])
    ht = TensorDescriptor(h, [len(h), middle], [h.stride(0), 1], [c["BLOCK"], c["BK"]]) if c["TMA_A"] else h
    fn[grid](
        h, ht, hs, w, args["quant"].w2_scale.contiguous(), hs if bias is None else bias.contiguous(), out,
        args["topk_weights"].contiguous(), rows.sorted_token_ids, rows.expert_ids, rows.num_tokens_post_padded,
        ids.numel(), h.stride(0), *strides, columns, middle, **c, **options,
    )  # fmt: skip


# --- constants and sources ---


@lru_cache(maxsize=4096)
def _kernels(c: Config, case: Case) -> tuple[tuple[Any, dict[str, Any], dict[str, Any]], ...]:
    """(jit function, constexprs, launch options) of every kernel between the sort and the sum, in launch order."""
    extra = dict(c.extra)
    pdl, xcds = bool(extra.pop("launch_pdl", 0)), extra.pop("xcds", 1)
    after: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    block, fused, split = c["block"], bool(c["fuse"]), case.middle % BLOCK != 0
    same: dict[str, Any] = {
        "KIND": case.kind, "BLOCK": block, "ON_INPUT": case.on_input, "SWAP": bool(c["swap"]), "GROUP": c["group"],
        "XCDS": xcds, "PDL": pdl,
    }  # fmt: skip
    fmax = torch.finfo(case.weights).max
    tma = [bool(c["tma"]) and described for described in case.described]
    up = same | {
        "FMAX": fmax, "QUANT": fused, "SPLIT": 2 if case.apart else case.blocked and split,
        "HIDDEN": getattr(tl, _NAMES[case.hidden]),
        "TOPK": case.topk, "BN": c["up_n"], "BK": c["up_k"], "ACT": case.act, "BIASED": case.biased[0], "TMA": tma[0],
        "EVEN": case.columns % c["up_k"] == 0, "STAGES": c["up_stages"],
    }  # fmt: skip
    down = same | {
        "BN": c["down_n"], "BK": c["down_k"], "BIASED": case.biased[1], "TMA": tma[1],
        "TMA_A": bool(c["tma"]) and block >= 64, "EVEN": case.middle % c["down_k"] == 0, "STAGES": c["down_stages"],
    }  # fmt: skip
    first = quantising(case, fmax, case.columns, False, pdl, after)
    between = () if fused else (quantising(case, fmax, case.middle, True, pdl, after),)
    knobs = extra | after
    return (
        first, (fp8.up, up, {"num_warps": c["up_warps"], **knobs}), *between,
        (fp8.down, down, {"num_warps": c["down_warps"], **knobs}),
    )  # fmt: skip


_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def quantising(case: Case, fmax: float, columns: int, limited: bool, pdl: bool, options: dict[str, Any]) -> Any:
    wide = BLOCK if case.blocked else min(WIDEST, max(fp8.WIDE.value, pow2(columns)))
    c = {"KIND": case.kind, "FMAX": fmax, "LIMITED": limited, "BG": max(1, 1024 // wide), "BC": wide,
         "ONCE": case.blocked or columns <= wide, "PDL": pdl}  # fmt: skip
    return fp8.quantise, c, {"num_warps": 8 if wide > 2048 else 4, **options}


def sources(problem: Problem, config: Config, device: Device) -> list[Source]:
    """The kernels of a config with the types and constants of this problem, in launch order, without sort and sum."""
    biased, aligned = bool(problem.dim("biased")), not problem.dim("unaligned")
    weights = DTYPES[1] if device.arch == "gfx942" else DTYPES[0]
    case = Case(
        problem.dim("quant"), weights, HIDDEN[problem.dtype], problem.topk, problem.dim("hidden"),
        problem.dim("intermediate"), activations.word_of(problem), bool(problem.dim("on_input")), (biased, biased),
        (aligned, aligned), bool(problem.dim("apart")),
    )  # fmt: skip
    steps = _kernels(config, case)
    return [_source(step, case, problem, i, config["block"]) for i, step in enumerate(steps)]


def _source(step: Any, case: Case, problem: Problem, index: int, block: int) -> Source:
    """Signature by name: pointers in capitals, or descriptors where TMA reads them; sizes and strides as int32."""
    fn, c, options = step
    narrow, hidden = TRITON[case.weights], TRITON[case.hidden]
    types = {"X": hidden if fn is fp8.quantise else narrow, "Q": narrow, "S": "fp32", "W": narrow, "WS": "fp32",
             "HS": "fp32", "HT": narrow, "WEIGHTS": "fp32", "OUT": TRITON[until_summed(case.hidden)],
             "BIAS": hidden if c.get("BIASED") else "fp32",
             "H": hidden if fn is fp8.up and not c["QUANT"] else narrow}  # fmt: skip
    special = {name: f"*{kind}" for name, kind in types.items()} | {"alpha": "fp32", "limit": "fp32"}
    for name, flag, height in (("W", "TMA", "BN"), ("HT", "TMA_A", "BLOCK")):
        if c.get(flag):
            special[name] = f"tensordesc<{narrow}[{c[height]}, {c['BK']}]>"
    own = c | ({"x_col": 1} if fn is fp8.quantise else {"w_col": 1})
    signature = signature_of(fn, own, special)
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return sized(Source(fn, signature, own, options, aligned=aligned), *_lying(fn, c, Layer(problem, block), index))


def _lying(fn: Any, c: dict[str, Any], lie: Layer, index: int) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes and strides, and bytes behind pointers. Rows in fp8 have room behind them."""
    wide = fp8.WIDE.value
    tokens, between = padded(lie.hidden, wide), padded(lie.middle, wide)
    if fn is fp8.quantise:
        plain = index == 0
        columns, x, q = (lie.hidden, lie.x, tokens) if plain else (lie.middle, lie.h, between)
        return {"columns": columns, "x_row": x.row, "q_row": q}, {"X": x.nbytes, "Q": x.rows * q}
    if fn is fp8.up:
        out = lie.sorted * between if c["QUANT"] else lie.h.nbytes
        values = lie.first() | {"x_row": tokens, "h_row": between if c["QUANT"] else lie.middle}
        return values, {"X": lie.x.rows * tokens, "W": lie.w1.nbytes, "H": out}
    held = dict.fromkeys(("H", "HT"), lie.sorted * between) | {"W": lie.w2.nbytes, "OUT": lie.pairs.nbytes}
    return lie.second() | {"h_row": between}, held
