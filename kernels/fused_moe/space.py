"""Which configs of fused MoE are worth trying for a problem, beside those for fp8 alone."""

from math import ceil

from moecache.kernels.activations import panels, word_of
from moecache.kernels.gemm.vector import DECODE_PAIRS
from moecache.kernels.gemm.work import KERNELS
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, Value, pow2


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config worth trying; those that do not fit are left out by the op."""
    return every(problem, device, max(1.0, problem.tokens * problem.topk / problem.experts))  # rows of an expert


def every(problem: Problem, device: Device, rows: float | None = None) -> list[Config]:
    """The configs for that many rows of an expert; None: for any number of tokens."""
    extra: dict[str, Value] = {"launch_pdl": 1} if device.vendor == "nvidia" else {}
    if device.xcds > 1:
        extra["xcds"] = device.xcds
    few = rows is None or problem.tokens * problem.topk <= DECODE_PAIRS
    found = _decode(problem, extra, device) if few else []
    if problem.dim("quant", ""):
        pass  # the rest of fp8 stands in files of its own
    elif problem.dtype == "fp32":
        found += [_tiles(extra, 16, 16, (32, 32, 2, 4), (32, 32, 2, 4), tma=0, swap=0)]
    elif device.vendor == "amd":
        found += _cdna(rows, device.arch, extra)
    else:
        found += _hopper(rows, problem, device, extra)
    return found if panels(word_of(problem)) == 2 else [_widened(c) for c in found]


def _widened(c: Config) -> Config:
    """Without a gate, a panel as wide as gate and up together brings as many bytes a step. A ring has two anyway."""
    if KERNELS.get(c.variant, ("",))[0] == "ring":
        return c
    return config(c.variant, dict(c.extra), **dict(c.params) | {"up_n": 2 * c["up_n"]})


def _decode(problem: Problem, extra: dict[str, Value], device: Device) -> list[Config]:
    """A few whole rows a program; as many bytes on their way as its registers hold."""
    hidden, middle, slots = problem.dim("hidden"), problem.dim("intermediate"), pow2(problem.topk)
    whole = 4096 if 2048 < hidden < 4096 else 1024  # one step where a row is no multiple of shorter ones
    depth = 256 if middle % 1024 and middle % 256 == 0 else 512 if middle % 1024 and middle > 1024 else 1024
    ups = ((2, whole, 4), (1, 1024, 4), (16, 512, 8), (8, 1024, 8), (4, 1024, 8))
    downs = ((max(1, 32 // slots), depth, 8), (max(1, 16 // slots), depth, 8), (max(1, 8 // slots), 1024, 8))
    knobs = {name: value for name, value in extra.items() if name != "xcds"}
    wide = device.wave // 32
    return [
        config("decode", knobs, up_n=n, up_k=max(128, min(k, pow2(hidden))), up_warps=max(1, w // wide),
               down_n=m, down_k=max(128, min(d, pow2(middle))), down_warps=max(1, v // wide))
        for n, k, w in ups for m, d, v in downs
    ]  # fmt: skip


def _tiles(
    extra: dict[str, Value], block: int, low: int, up: tuple[int, int, int, int], down: tuple[int, int, int, int], *,
    group: int = 1, combine: str = "sum", variant: str = "tiles", **more: Value,
) -> Config:  # fmt: skip
    """`up` and `down` are (n, k, stages, warps)."""
    params: dict[str, Value] = {"block": block, "group": group, "combine": combine, **more}
    for prefix, values in (("up", up), ("down", down)):
        params |= {f"{prefix}_{name}": v for name, v in zip(("n", "k", "stages", "warps"), values, strict=True)}
    if low != block:
        variant, params = "heights", params | {"low": low}
    return config(variant, extra, **params)


def _hopper(rows: float | None, problem: Problem, device: Device, extra: dict[str, Value]) -> list[Config]:
    """What won somewhere on an H200 or an H100 (benchmarks/notes/), and its neighbours. Dependent launch serves small
    tiles; a large ring that starts early starves the kernel before it."""
    found: list[Config] = []
    if (
        problem.dim("unaligned") or problem.dim("hidden") % 16 or problem.dim("intermediate") % 16
    ):  # one value at a time
        shapes = ((b, (64, 64, 3, warps)) for b, warps in ((16, 4), (64, 8)))
        found = [_tiles({}, b, b, shape, shape, tma=0, swap=int(b < 64)) for b, shape in shapes]
    if problem.dim("unaligned"):
        return found
    ring: dict[str, Value] = {"tma": 1, "programs": device.units}
    short, deep, flat = (64, 64, 5, 4), (64, 256, 3, 4), (128, 64, 5, 4)
    rung, long, thick = (64, 64, 9, 4), (128, 64, 5, 4), (128, 128, 3, 4)
    if rows is None or rows <= 48:
        for block, ups in ((16, (deep, short)), (32, (short,))):
            found += [_tiles(extra, block, block, up, down, tma=1, swap=1) for up in ups for down in (short, flat)]
        for knobs in (extra, {}):
            for block, up in ((16, deep), (32, (64, 128, 4, 4))):
                found.append(_tiles(knobs, block, block, up, thick, variant="tiles_ring", swap=1, **ring))
            for block, up, down in ((16, thick, rung), (32, thick, rung), (32, rung, long), (32, long, thick)):
                found.append(_tiles(knobs, block, block, up, down, variant="ring", swap=1, **ring))
    if rows is None or 8 < rows <= 128:
        for knobs in (extra, {}):
            found.append(_tiles(knobs, 64, 64, rung, rung, variant="ring", swap=1, **ring))
    if rows is None or rows >= 12:
        turns, whole = ring | {"swap": 0, "parts": 2}, ring | {"swap": 0, "parts": 1}
        narrow, half, tall, less = (64, 64, 6, 4), (64, 64, 4, 4), (128, 64, 4, 8), (128, 64, 3, 4)
        for combine in ("sum", "atomic"):
            ends: dict[str, Value] = {"combine": combine, "variant": "ring", **_sweep(problem, combine)}
            found += [_tiles({}, 64, 64, long, long, group=g, **ends, **turns) for g in (1, 8, 16)]
            found += [_tiles({}, 64, 64, narrow, narrow, group=g, **ends, **turns) for g in (1, 8)]
            found += [_tiles({}, 128, 128, tall, tall, group=g, **ends, **whole) for g in (1, 8, 16)]
            found += [_tiles({}, 256, 256, half, half, group=g, **ends, **turns) for g in (1, 8)]
        if sweep := _sweep(problem, "atomic"):  # short products: fewer slots leave more of L2 to what they add to
            adding: dict[str, Value] = {"combine": "atomic", "variant": "ring", **sweep, **whole}
            found += [_tiles({}, 128, 128, tall, (128, 64, 3, 8), group=g, **adding) for g in (1, 8)]
        found += [_tiles({}, 128, low, tall, less, group=8, tma=1, swap=0) for low in (32, 128)]
        found.append(_tiles({}, 64, 64, (128, 64, 4, 4), (128, 64, 4, 4), group=8, tma=1, swap=0))
    return found


def _sweep(problem: Problem, combine: str) -> dict[str, Value]:
    """Where the second product is short and adds to the output: all blocks take one panel after the other, so that the
    columns added to stay in L2."""
    short = problem.dim("hidden") >= 8 * problem.dim("intermediate")
    return {"down_group": 1024} if short and combine == "atomic" else {}


def _knobs(arch: str) -> list[dict[str, Value]]:
    """Options of AMD's compiler that others tune: size of the matrix instruction, waves, packing (not on gfx950)."""
    packed: list[dict[str, Value]] = [{"matrix_instr_nonkdim": 16, "kpack": 2}] if arch == "gfx942" else []
    return [{"matrix_instr_nonkdim": 16}, {"waves_per_eu": 2}, *packed]


def _cdna(rows: float | None, arch: str, extra: dict[str, Value]) -> list[Config]:
    """Compiled, checked and interpreted, never run on hardware: plain tiles, few of them."""
    found: list[Config] = []
    for block, up, down in (
        (16, (32, 128, 2, 4), (64, 128, 2, 4)), (16, (64, 64, 2, 4), (128, 64, 2, 4)),
        (32, (64, 64, 2, 4), (128, 64, 2, 4)), (64, (64, 64, 2, 4), (128, 64, 2, 4)),
        (128, (64, 64, 2, 8), (128, 64, 2, 8)), (128, (64, 32, 2, 8), (128, 32, 2, 8)),
    ):  # fmt: skip
        near = rows is None or (block <= max(16, 4 * pow2(ceil(rows))) and (block >= 16 * rows / 64 or block == 128))
        for group in (1,) if block < 64 else (1, 8):
            found += [_tiles(extra, block, block, up, down, group=group, tma=0, swap=0)] if near else []
        if near and block >= 64 and up[1] == 64:
            found += [_tiles(extra | knobs, block, block, up, down, group=8, tma=0, swap=0) for knobs in _knobs(arch)]
    if rows is None or rows >= 24:
        found.append(_tiles(extra, 64, 16, (64, 64, 2, 4), (64, 64, 2, 4), group=8, tma=0, swap=0))
    return found
