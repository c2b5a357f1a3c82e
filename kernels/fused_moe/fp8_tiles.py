"""The `fp8_tiles` variant of fused MoE, for fp8 weights of every kind on any GPU with fp8 products.

It sorts, quantises the tokens, multiplies, multiplies, and adds a token's pairs up. With `fuse` a tile of the
first product quantises its rows itself, which fp8_block alone allows; without, that is one more launch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Any

import triton.language as tl

from moecache.kernels import activations
from moecache.kernels.agreed import BLOCK
from moecache.kernels.formats.fp8 import FMAX, FORMATS
from moecache.kernels.fused_moe.call import blocks_apart, format_of
from moecache.kernels.fused_moe.sort_and_sum import add_up, sort_rows
from moecache.kernels.gemm import fp8_tile as fp8
from moecache.kernels.gemm.work import is_early, tile_of
from moecache.kernels.launch import Box, Launch, Operand, Plan, Workspace, launch, planned
from moecache.kernels.matrix import DTYPES as HIDDEN
from moecache.kernels.matrix import until_summed_name
from moecache.kernels.sort import op as sort
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, Value, pow2

VARIANTS = ("fp8_tiles",)
NAMES = ("n", "k", "stages", "warps")
Shape = tuple[int, int, int, int]  # columns of a tile, depth of a step, stages, warps
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
    weights: str
    hidden: str
    topk: int
    columns: int
    middle: int
    act: str
    on_input: bool
    biased: tuple[bool, bool]
    described: tuple[bool, bool]
    apart: bool = False

    @classmethod
    def of(cls, call: Any) -> "Case":
        """That of a LayerCall of operands."""
        x, w1, w2 = call.hidden_states, call.w1, call.w2
        biased = (call.w1_bias is not None, call.w2_bias is not None)
        kind, sizes = call.quant.kind, (call.topk_ids.shape[1], x.shape[1], w2.shape[2])
        rest = call.activation, call.on_input, biased, (_described(w1), _described(w2)), blocks_apart(call)
        return cls(kind, w1.dtype, x.dtype, *sizes, *rest)

    @property
    def blocked(self) -> bool:
        return self.kind == "fp8_block"


# --- what configs must satisfy ---


def fits(problem: Problem, whole: Config, device: Device) -> str:
    """Why not, or ''."""
    c, kind, extra = dict(whole.params), problem.dim("quant", ""), dict(whole.extra)
    sm = device.arch.removeprefix("sm_")
    sm = int(sm) if device.vendor == "nvidia" and sm.isdigit() else 0
    if kind not in FORMATS or problem.dtype not in HIDDEN:
        return f"quant={kind or 'none'} and dtype={problem.dtype}: fp8_tiles takes {', '.join(FORMATS)}"
    if sm < 89 and device.arch not in ("gfx942", "gfx950"):
        return f"{device.arch} has no fp8 products; allowed are sm_89 and later, gfx942 and gfx950"
    flags = {c[name] for name in ("swap", "tma", "fuse")}
    if c["block"] not in (16, 32, 64, 128) or c["group"] < 1 or not flags <= {0, 1}:
        return f"{whole.name}: block is 16, 32, 64 or 128, group at least 1, and swap, tma and fuse are 0 or 1"
    if c["tma"] and (sm < 90 or problem.dim("unaligned")):
        return "tma=1 wants sm_90 or later and rows that start on 16 bytes"
    if c["fuse"] and (kind != "fp8_block" or c["up_n"] not in (64, 128)):
        return f"fuse=1 with quant={kind} and up_n={c['up_n']}; allowed are fp8_block and 64 or 128 columns"
    empty = problem.dim("intermediate") % BLOCK == BLOCK // 2 and _shares_blocks(problem)
    if c["fuse"] and c["up_n"] < BLOCK and empty:
        return f"fuse=1 with up_n={c['up_n']}: half of the last tile is empty, and would read a scale past the last one"
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
    split = _shares_blocks(problem) and panels == 2
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


def _shares_blocks(problem: Problem) -> bool:
    """Whether a block of scales holds rows of gate and of up."""
    gated = activations.panels(activations.word_of(problem)) == 2
    return format_of(problem).two_layouts(problem.dim("intermediate"), gated) and not problem.dim("apart")


def shared(block: int, n: int, k: int, stages: int, panels: int, device: Device) -> int:
    """Shared memory of one program: every stage with its scales, or the sums as they change layout."""
    held = max(1, stages - 1) if device.arch == "gfx942" else stages  # without asynchronous copies one is in registers
    return max(held * ((block + panels * n) * k + 4 * block + 16), 4 * block * n) + 2048


def work(problem: Problem, c: Config, device: Device) -> Work:
    """Sort, sum, and what quantises the tokens and, unless a tile does it, the rows between the products."""
    fused, gated = bool(c["fuse"]), activations.panels(activations.word_of(problem)) == 2
    up, down = tile_of(c, "tile_fp8", "up_", gated=gated), tile_of(c, "tile_fp8", "down_")
    up = replace(up, n=max(up.n, (1 + gated) * BLOCK)) if fused else up  # a tile holds all that share a scale
    around = {"launches": 4 - fused, "row_hidden": 1.5, "row_inner": 0 if fused else 2, "token_hidden": 2.5}
    return Work(up, down, early=is_early(c), **around)


# --- what is tried ---


def space(problem: Problem, device: Device) -> list[Config]:
    """Configs for the rows that an expert has on average, the static default first."""
    rows = problem.tokens * problem.topk / problem.dim("global", problem.experts)
    height = min(128, max(16, pow2(ceil(0.75 * rows))))
    found = _tiles_of((height, max(16, height // 2), min(128, 2 * height)), problem, device)
    return [c for c in dict.fromkeys(found) if not fits(problem, c, device)][:16]


def every(problem: Problem, device: Device) -> list[Config]:
    """The configs of all problems that differ from this one in tokens and routing alone."""
    return _tiles_of((16, 32, 64, 128), problem, device)


def _tiles_of(heights: Sequence[int], problem: Problem, device: Device) -> list[Config]:
    """Tiles of these numbers of rows."""
    if problem.dim("quant", "") not in FORMATS:
        return []
    own, extra = (_cdna, {"xcds": device.xcds}) if device.vendor == "amd" else (_hopper, {"launch_pdl": 1})
    tma = int(device.vendor == "nvidia" and not problem.dim("unaligned"))
    found = [tiles(extra, tma=tma, **shape) for shape in _unaligned() if problem.dim("unaligned")]
    for block in heights:
        shapes = own(block, problem.dim("quant") == "fp8_block")
        found += [tiles(extra, tma=tma, **shape) for shape in shapes]
        if device.vendor == "amd" and block > 16:  # products of 16 rows, where 32 are usual
            found += [tiles(extra | {"matrix_instr_nonkdim": 16}, tma=tma, **shape) for shape in shapes[:3]]
    if activations.panels(activations.word_of(problem)) == 2:
        return found
    # without a gate, panels as wide as gate and up together
    return [config(c.variant, dict(c.extra), **dict(c.params) | {"up_n": min(128, 2 * c["up_n"])}) for c in found]


def tiles(
    extra: dict[str, Value], block: int, up: Shape, down: Shape, *, group: int = 1, swap: int = 0, tma: int = 0,
    fuse: int = 0,
) -> Config:  # fmt: skip
    """A config in full. `block`: rows of a tile; `up`, `down`: columns of a tile, depth of a step, stages and warps;
    `group`: blocks that share a panel of weights; `swap`: products transposed; `fuse`: as above."""
    params: dict[str, Value] = {"block": block, "group": group, "swap": swap, "tma": tma, "fuse": fuse}
    for prefix, values in (("up", up), ("down", down)):
        params |= {f"{prefix}_{name}": value for name, value in zip(NAMES, values, strict=True)}
    return config("fp8_tiles", extra, **params)


def _hopper(block: int, blocked: bool) -> list[dict[str, Any]]:
    """Few rows wait for weights: small panels, deep pipelines. Many rows want large tiles that reuse them in L2."""
    deep, wide = (64, 128, 6, 4), (128, 128, 4, 4)
    if block <= 32:
        found = [(deep, deep, 0), (deep, wide, 0), ((64, 128, 4, 4), (64, 128, 4, 4), 0)]
        blocks, rows = [(wide, wide, 1), (wide, deep, 1), (deep, deep, 1)], [((64, 256, 3, 4), (64, 256, 3, 4), 0)]
        found += blocks if blocked else rows
        return [{"block": block, "up": up, "down": down, "fuse": fuse, "swap": 1} for up, down, fuse in found]
    warps = block // 16
    half, down = (64, 128, 4, warps), (128, 128, 4, warps)
    found = [(half, down, 1), (half, down, 0)] if blocked else [(half, down, 0)]
    found += [((128, 128, 3, 8), (128, 128, 3, 4), 1)] if blocked and block == 64 else []
    found += [((64, 128, 3, warps), (128, 128, 3, warps), int(blocked))]
    return [{"block": block, "up": u, "down": d, "fuse": f, "group": g} for u, d, f in found for g in (8, 1)]


def _cdna(block: int, blocked: bool) -> list[dict[str, Any]]:
    """Compiled, checked and interpreted, never run on hardware: few, of plain shapes."""
    warps = 8 if block == 128 else 4
    half, wide = (64, 128, 2, warps), (128, 128, 2, warps)
    found = [(half, wide, 0), (half, half, 0)]
    found += [((32, 128, 2, 4), half, 0)] if block == 16 else []
    found += [(half if block > 32 else wide, wide, 1)] if blocked else []
    groups = (1,) if block < 64 else (8, 1)
    return [{"block": block, "up": u, "down": d, "fuse": f, "group": g} for u, d, f in found for g in groups]


def _unaligned() -> list[dict[str, Any]]:
    """Weights come one byte at a time: only small tiles have registers enough."""
    return [
        {"block": 16, "up": (32, 128, 1, 8), "down": (64, 128, 1, 8), "swap": 1},
        {"block": 16, "up": (16, 128, 1, 8), "down": (32, 128, 1, 8), "swap": 0},
        {"block": 32, "up": (16, 128, 1, 8), "down": (32, 128, 1, 8), "swap": 0},
    ]


# --- launching ---


def plan(c: Config, call: Any, out: Operand, device: Device) -> Plan:
    """All launches of a config for a LayerCall of operands.

    Workspace: the tokens and the rows between the products in fp8 with their scales, those rows in the hidden dtype too
    unless they are fused, and [T · k, K] before the sum.
    """
    if not out.numel():
        return Plan()
    x, w1, case = call.hidden_states, call.w1, Case.of(call)
    steps = _kernels(c, case)
    pdl, fused = bool(dict(c.extra).get("launch_pdl")), len(steps) == 3

    def build(work: Workspace, free: bool) -> list[Launch]:
        rows, sorting = sort_rows(call, c["block"], pdl, device, work, free)
        most = rows.sorted_token_ids.numel()
        xq, hq = narrow(work, w1.dtype, len(x), case.columns), narrow(work, w1.dtype, most, case.middle)
        xs, hs = scales(work, case, len(x), case.columns), scales(work, case, most, case.middle)
        h = hq if fused else work.take(x.dtype, most, case.middle)
        partial = work.take(until_summed_name(x.dtype), call.topk_ids.numel(), case.columns)
        found = [*sorting, quantise(steps[0], x, xq, xs, rows, case.columns), _up(call, steps[1], rows, xq, xs, h, hs)]
        found += [] if fused else [quantise(steps[2], h, hq, hs, rows, case.middle)]
        return [*found, _down(call, steps[-1], rows, hq, hs, partial), add_up(call, partial, out, pdl)]

    return planned(build)


def _described(w: Operand) -> bool:
    """Whether a tensor descriptor over [experts · rows, columns] can stand for the weights."""
    expert, row, column = w.strides
    even = row > 0 and (len(w) == 1 or expert % row == 0)
    return column == 1 and even and row * w.size % 16 == 0 and w.aligned


def narrow(work: Workspace, dtype: str, rows: int, columns: int) -> Operand:
    """Rows in fp8, each with room for zeros behind it."""
    wide = fp8.WIDE.value
    return work.take(dtype, rows, ceil(columns / wide) * wide)


def scales(work: Workspace, case: Case, rows: int, columns: int) -> Operand:
    return work.take("fp32", rows, ceil(columns / BLOCK) if case.blocked else 1)


def quantise(step: Any, x: Operand, q: Operand, s: Operand, rows: sort.SortResult, columns: int) -> Launch:
    fn, c, options = step
    args = (x, q, s, rows.num_tokens_post_padded, len(x), columns, *x.strides, q.strides[0])
    return launch(fn, ceil(len(x) * s.shape[1] / c["BG"]), args, c, options)


def _weight(w: Operand, tma: bool, n: int, k: int) -> tuple[Any, int, int, int, int]:
    """(operand or descriptor over [experts · rows, columns], rows from one expert to the next in it, strides)."""
    expert, row, column = w.strides
    if not tma:
        return w, w.shape[1], expert, row, column
    each = expert // row if len(w) > 1 else w.shape[1]
    shape = ((len(w) - 1) * each + w.shape[1], w.shape[2])
    return Box(w, shape, (row, 1), (n, k)), each, expert, row, column


def _up(call: Any, step: Any, rows: sort.SortResult, x: Operand, xs: Operand, h: Operand, hs: Operand) -> Launch:
    fn, c, options = step
    ids, middle, columns, bias = call.topk_ids, call.w2.shape[2], call.w1.shape[2], call.w1_bias
    w, *strides = _weight(call.w1, c["TMA"], c["BN"], c["BK"])
    tensors = x, xs, w, call.quant.w1_scale, hs if bias is None else bias, h, hs, call.topk_weights
    sizes = x.strides[0], *strides, h.strides[0], middle, columns, float(call.alpha), float(call.limit)
    args = (*tensors, rows.sorted_token_ids, rows.expert_ids, rows.num_tokens_post_padded, ids.numel(), *sizes)
    return launch(fn, ceil(len(hs) / c["BLOCK"]) * ceil(middle / (BLOCK if c["QUANT"] else c["BN"])), args, c, options)


def _down(call: Any, step: Any, rows: sort.SortResult, h: Operand, hs: Operand, out: Operand) -> Launch:
    fn, c, options = step
    (columns, middle), bias = call.w2.shape[1:], call.w2_bias
    w, *strides = _weight(call.w2, c["TMA"], c["BN"], c["BK"])
    ht = Box(h, (len(h), middle), (h.strides[0], 1), (c["BLOCK"], c["BK"])) if c["TMA_A"] else h
    tensors = h, ht, hs, w, call.quant.w2_scale, hs if bias is None else bias, out, call.topk_weights
    sizes = call.topk_ids.numel(), h.strides[0], *strides, columns, middle
    args = (*tensors, rows.sorted_token_ids, rows.expert_ids, rows.num_tokens_post_padded, *sizes)
    return launch(fn, ceil(len(hs) / c["BLOCK"]) * ceil(columns / c["BN"]), args, c, options)


# --- constants ---


@lru_cache(maxsize=4096)
def _kernels(c: Config, case: Case) -> tuple[tuple[Any, dict[str, Any], dict[str, Any]], ...]:
    """(jit function, constexprs, launch options) of every kernel between the sort and the sum, in launch order."""
    extra = dict(c.extra)
    pdl, xcds = bool(extra.pop("launch_pdl", 0)), extra.pop("xcds", 1)
    after: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    block, fused, split = c["block"], bool(c["fuse"]), case.middle % BLOCK != 0
    same: dict[str, Any] = {"KIND": case.kind, "BLOCK": block, "ON_INPUT": case.on_input, "SWAP": bool(c["swap"])}
    same |= {"GROUP": c["group"], "XCDS": xcds, "PDL": pdl}
    fmax = FMAX[case.weights]
    tma = [bool(c["tma"]) and described for described in case.described]
    up = same | {"FMAX": fmax, "QUANT": fused, "SPLIT": 2 if case.apart else case.blocked and split}
    up |= {"HIDDEN": getattr(tl, _NAMES[case.hidden]), "TOPK": case.topk, "BN": c["up_n"], "BK": c["up_k"]}
    up |= {"ACT": case.act, "BIASED": case.biased[0], "TMA": tma[0]}
    up |= {"EVEN": case.columns % c["up_k"] == 0, "STAGES": c["up_stages"]}
    down = same | {"BN": c["down_n"], "BK": c["down_k"], "BIASED": case.biased[1], "TMA": tma[1]}
    down |= {"TMA_A": bool(c["tma"]) and block >= 64}
    down |= {"EVEN": case.middle % c["down_k"] == 0, "STAGES": c["down_stages"]}
    first = quantising(case, fmax, case.columns, False, pdl, after)
    between = () if fused else (quantising(case, fmax, case.middle, True, pdl, after),)
    one, two = ({"num_warps": c[f"{half}_warps"], **extra, **after} for half in ("up", "down"))
    return first, (fp8.up, up, one), *between, (fp8.down, down, two)


_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def quantising(case: Case, fmax: float, columns: int, limited: bool, pdl: bool, options: dict[str, Any]) -> Any:
    wide = BLOCK if case.blocked else min(WIDEST, max(fp8.WIDE.value, pow2(columns)))
    c = {"KIND": case.kind, "FMAX": fmax, "LIMITED": limited, "BG": max(1, 1024 // wide), "BC": wide}
    c |= {"ONCE": case.blocked or columns <= wide, "PDL": pdl}
    return fp8.quantise, c, {"num_warps": 8 if wide > 2048 else 4, **options}
