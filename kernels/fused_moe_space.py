"""Which configs of fused MoE are worth trying for a problem, and what each should cost."""

from math import ceil, exp, log2

from moecache.kernels.matrix import DTYPES
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, Value, pow2

KERNELS = {  # variant -> kernels of the two products
    "tiles": ("tile", "tile"), "heights": ("tile", "tile"), "ring": ("ring", "ring"), "tiles_ring": ("tile", "ring"),
}  # fmt: skip
DECODE_PAIRS = 64  # a shared expert's weights are read once a pair


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config worth trying, the lowest predicted time first; those that do not fit are left out by the op."""
    rows = max(1.0, problem.tokens * problem.topk / problem.experts)  # of an expert, on average
    extra: dict[str, Value] = {"launch_pdl": 1} if device.vendor == "nvidia" else {}
    if device.xcds > 1:
        extra["xcds"] = device.xcds
    found = [*_decode(problem, extra, device)]
    if problem.dim("quant", ""):
        return found  # the rest of fp8 stands in files of its own
    if problem.dtype == "fp32":
        found += [_tiles(extra, 16, 16, (32, 32, 2, 4), (32, 32, 2, 4), tma=0, swap=0)]
    elif device.vendor == "amd":
        found += _cdna(rows, device.arch, extra)
    else:
        found += _hopper(rows, problem, device, extra)
    return sorted(dict.fromkeys(found), key=lambda c: cost(problem, c, device))


def _decode(problem: Problem, extra: dict[str, Value], device: Device) -> list[Config]:
    """A few whole rows a program; as many bytes on their way as its registers hold."""
    if problem.tokens * problem.topk > DECODE_PAIRS:
        return []
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


def _hopper(rows: float, problem: Problem, device: Device, extra: dict[str, Value]) -> list[Config]:
    """What won somewhere on an H200 (benchmarks/NOTES.md), and its neighbours. Dependent launch serves small tiles; a
    large ring that starts early starves the kernel before it."""
    if problem.dim("unaligned"):
        return [_tiles({}, b, b, (64, 64, 3, 4), (64, 64, 3, 4), tma=0, swap=int(b < 64)) for b in (16, 64)]
    found: list[Config] = []
    ring: dict[str, Value] = {"tma": 1, "programs": device.units}
    short, deep, flat = (64, 64, 5, 4), (64, 256, 3, 4), (128, 64, 5, 4)
    rung, long, thick = (64, 64, 9, 4), (128, 64, 5, 4), (128, 128, 3, 4)
    if rows <= 48:
        for block, ups in ((16, (deep, short)), (32, (short,))):
            found += [_tiles(extra, block, block, up, down, tma=1, swap=1) for up in ups for down in (short, flat)]
        for knobs in (extra, {}):
            for block, up in ((16, deep), (32, (64, 128, 4, 4))):
                found.append(_tiles(knobs, block, block, up, thick, variant="tiles_ring", swap=1, **ring))
            for block, up, down in ((16, thick, rung), (32, thick, rung), (32, rung, long), (32, long, thick)):
                found.append(_tiles(knobs, block, block, up, down, variant="ring", swap=1, **ring))
    if 8 < rows <= 128:
        for knobs in (extra, {}):
            found.append(_tiles(knobs, 64, 64, rung, rung, variant="ring", swap=1, **ring))
    if rows >= 12:
        turns, whole = ring | {"swap": 0, "parts": 2}, ring | {"swap": 0, "parts": 1}
        narrow, half, tall, less = (64, 64, 6, 4), (64, 64, 4, 4), (128, 64, 4, 8), (128, 64, 3, 4)
        for combine in ("sum", "atomic"):
            ends = {"combine": combine, "variant": "ring", **_sweep(problem, combine)}
            found += [_tiles({}, 64, 64, long, long, group=g, **ends, **turns) for g in (1, 8, 16)]
            found += [_tiles({}, 64, 64, narrow, narrow, group=g, **ends, **turns) for g in (1, 8)]
            found += [_tiles({}, 128, 128, tall, tall, group=g, **ends, **whole) for g in (1, 8, 16)]
            found += [_tiles({}, 256, 256, half, half, group=g, **ends, **turns) for g in (1, 8)]
        if _sweep(problem, "atomic"):  # short products: fewer slots leave more of L2 to what they add to
            found += [_tiles({}, 128, 128, tall, (128, 64, 3, 8), group=g, **ends, **whole) for g in (1, 8)]
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


def _cdna(rows: float, arch: str, extra: dict[str, Value]) -> list[Config]:
    """Compiled and checked, never timed: plain tiles, few of them."""
    found: list[Config] = []
    for block, up, down in (
        (16, (32, 128, 2, 4), (64, 128, 2, 4)), (16, (64, 64, 2, 4), (128, 64, 2, 4)),
        (32, (64, 64, 2, 4), (128, 64, 2, 4)), (64, (64, 64, 2, 4), (128, 64, 2, 4)),
        (128, (64, 64, 2, 8), (128, 64, 2, 8)), (128, (64, 32, 2, 8), (128, 32, 2, 8)),
    ):  # fmt: skip
        near = block <= max(16, 4 * pow2(ceil(rows))) and (block >= 16 * rows / 64 or block == 128)
        for group in (1,) if block < 64 else (1, 8):
            found += [_tiles(extra, block, block, up, down, group=group, tma=0, swap=0)] if near else []
        if near and block >= 64 and up[1] == 64:
            found += [_tiles(extra | knobs, block, block, up, down, group=8, tma=0, swap=0) for knobs in _knobs(arch)]
    found += [_tiles(extra, 64, 16, (64, 64, 2, 4), (64, 64, 2, 4), group=8, tma=0, swap=0)] if rows >= 24 else []
    return found


# --- cost: what each launch must move and multiply, at the rates of the device ---


def cost(problem: Problem, c: Config, device: Device) -> float:
    """µs from hardware constants: each product the larger of its bytes and its operations, the second of them softened.

    The shares of the peak that a kernel reaches were set by 60 cells on an H200 (benchmarks/NOTES.md).
    """
    hidden, middle, topk, tokens = problem.dim("hidden"), problem.dim("intermediate"), problem.topk, problem.tokens
    size, pairs = 1 if problem.dim("quant", "") else DTYPES[problem.dtype].itemsize, tokens * topk
    bandwidth = (device.bandwidth_gbs or 1000) * 1e3  # bytes a µs
    if c.variant == "decode":
        slow = 2.0 if size == 1 else 1.067  # fp8 is widened in registers: less is on its way
        order = abs(log2(c["up_n"] / 8)) if size == 1 else 1e-3 * c["up_n"]
        return 2 * device.launch_us + 3 + slow * 3 * pairs * hidden * middle * size / bandwidth + order
    active = problem.experts * (1 - exp(-pairs / problem.experts))
    rows = pairs / max(1.0, active)
    early = bool(dict(c.extra).get("launch_pdl"))
    total = (2.0 if early else 5.0) * device.launch_us + 6 + 0.6 * KERNELS[c.variant].count("ring")
    for prefix, n, k, halves in (("up", middle, hidden, 2), ("down", hidden, middle, 1)):
        total += _product_cost(c, prefix, n, k, halves, rows, active, size, bandwidth, device)
    moved = pairs * hidden * size / bandwidth
    return total + (device.launch_us + 2.1 * moved if c["combine"] == "sum" else 2 + 1.6 * moved)


def _product_cost(
    c: Config, prefix: str, n: int, k: int, halves: int, rows: float, active: float, size: int, bandwidth: float,
    device: Device,
) -> float:  # fmt: skip
    block, width, group = c["block"], c[f"{prefix}_n"], dict(c.params).get(f"{prefix}_group", c["group"])
    ring = KERNELS[c.variant][prefix == "down"] == "ring"
    columns = width * (2 if ring or halves == 2 else 1)
    low = dict(c.params).get("low", block)
    tiles, short = tiles_of(rows, block, low)
    weights = n * halves * k * size
    passes = 1.0
    if weights > (device.l2_bytes or 1 << 25) / 4:  # no block finds the weights that the one before it read
        passes = max(1.0, (tiles + short) / group)
    elif group == 1:
        passes = 1 + 0.02 * (tiles + short - 1)
    moved = active * weights * passes + active * rows * (n + k) * size
    depth = c[f"{prefix}_k"] * c[f"{prefix}_stages"] * columns * size * (1 if ring else 3)
    memory = moved / bandwidth / min(1.0, 0.94 + depth / (1 << 22))
    peak = (dict(device.peak_tflops).get("bf16") or 100.0) * 1e6
    tall = tiles_of(rows, 64, 64)[0] * 64 if block > 128 else tiles * block  # a ring leaves out quarters of padding
    work = 2.0 * active * n * halves * k * (tall + short * low * 2)
    full = work / peak / _reached(c, ring, block, columns)
    return max(memory, full) + 0.3 * min(memory, full)


def tiles_of(rows: float, block: int, low: int) -> tuple[float, float]:
    """(full, low) blocks of an expert that has `rows` on average."""
    count = sum(chance(rows, i * block) for i in range(ceil(4 * rows / block) + 1))
    if low == block:
        return count, 0.0
    short = min(1.0, low / block + chance(low, ceil(rows)) * 0.5)
    return max(0.0, count - short), short


def chance(mean: float, above: float) -> float:
    """Roughly the chance that an expert has more than `above` rows, when it has `mean` on average."""
    if above <= 0:
        return 1.0
    spread = max(1.0, mean) ** 0.5
    return 1 / (1 + exp(max(-50.0, min(50.0, 1.7 * (above + 0.5 - mean) / spread))))


def _reached(c: Config, ring: bool, block: int, columns: int) -> float:
    """Share of the peak that tiles of that shape reach."""
    narrow = min(1.0, columns / 256) ** 0.4
    if c["swap"]:
        return 0.5 * (block / 64) ** 0.75 * narrow
    if ring:
        return (0.95 if block <= 128 else 0.85) * narrow
    return (0.8 if block > 64 else 0.6) * narrow
