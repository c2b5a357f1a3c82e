"""Which configs of fused MoE are worth trying for a problem, and what each should cost."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, log, log2, sqrt
from statistics import NormalDist

from moecache.kernels.activations import panels, word_of
from moecache.kernels.gemm.product import KERNELS
from moecache.kernels.gemm.vector import DECODE_PAIRS
from moecache.kernels.matrix import DTYPES
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import BUCKETS, Problem, Value, bucket_levels, pow2


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config worth trying, the lowest predicted time first; those that do not fit are left out by the op."""
    rows = max(1.0, problem.tokens * problem.topk / problem.experts)  # of an expert, on average
    return sorted(dict.fromkeys(every(problem, device, rows)), key=lambda c: cost(problem, c, device))


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


# --- cost: what each launch must move and multiply, at the rates of the device ---

# Set by 185 problems of a warm-up, up to 16384 tokens, and by 40 calls x 85 configs of the kernels before, on an H100
# (benchmarks/notes/estimates.md), rounded; none of them is of one model or one config.
REACHED = 0.9  # of the matrix units' sustained rate
LOW = 0.4  # of that for the lower tile of mixed heights
HALVES = 0.885  # of that for two groups that do not keep in step
LATENCY_US = 2.2  # of the loads of a step, shared by the stages that are on their way
SLICE_US = {"ring": 0.013, "tile": 0.054}  # of 64 columns of depth, that one program cannot hide
END_US = {"ring": 0.013, "tile": 0.08}  # of a tile of 128 columns; a ring loads the next one meanwhile
START_US = {"ring": 4.4, "tile": 0.0}  # of a persistent launch: barriers, descriptors, the first loads of all units
AGAIN = 0.19  # share of an expert's weights that blocks outside of a group bring once more
KEPT = 0.345  # when this share of the last cache has gone by, half of what was there is lost
APART = {"ring": 0.061, "tile": 0.0012}  # how far programs that share weights are apart, of what all of them load
FLIGHT = 4700  # bytes on their way on a unit at which device memory reaches half of its rate
DRIFT = 0.10  # by this share, every full round makes an idle part of the last one matter less
LEVELS = tuple(NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16))


def cost(problem: Problem, c: Config, device: Device) -> float:
    """µs from hardware constants: for each product the slower of its tiles and its bytes; launches; the sum."""
    hidden, middle, tokens = problem.dim("hidden"), problem.dim("intermediate"), problem.tokens
    size = 1 if problem.dim("quant", "") else DTYPES[problem.dtype].itemsize
    bandwidth = (device.bandwidth_gbs or 1000) * 1e3  # bytes a µs
    if c.variant == "decode":
        slow = 1.5 if size == 1 else 1.0  # fp8 is widened in registers: less is on its way
        order = (abs(log2(c["up_n"] / 8)) if size == 1 else 1e-3 * c["up_n"]) + abs(log2(c["down_n"] / 4))
        moved = (1 + panels(word_of(problem))) * tokens * problem.topk * hidden * middle * size
        return 2 * device.launch_us + 3 + slow * moved / bandwidth + order
    load = expected(tokens, problem.experts, problem.topk, problem.dim("global"), problem.routing)
    total = 6 + (2 if dict(c.extra).get("launch_pdl") else 5) * device.launch_us
    total += _product_us(
        c, "up", Work(load, tokens, panels(word_of(problem)) * middle, hidden, middle, size), device, bandwidth
    )
    total += _product_us(c, "down", Work(load, tokens, hidden, middle, hidden, size), device, bandwidth)
    if c["combine"] == "sum":
        total += device.launch_us + 1.1 * (load.pairs + tokens) * hidden * size / bandwidth
    return total


@dataclass(frozen=True)
class Load:
    """What experts are asked for: rows in all, experts that have some, and 16 quantiles of theirs."""

    pairs: float
    active: float
    rows: tuple[float, ...]


@lru_cache(maxsize=1024)
def expected(tokens: int, experts: int, topk: int, everywhere: int, routing: str) -> Load:
    """Rows as the routing bucket spreads them, which names shares of the experts; balanced where it is unknown.

    Level 1, 2, 3 of a share stand for a half, a quarter, an eighth. Without them rows vary as chance has it.
    """
    pairs = max(1.0, tokens * topk * experts / max(experts, everywhere))
    level, uneven = bucket_levels(routing) if routing in BUCKETS else (0, 0)
    reachable = min(experts, pairs)
    active = max(1.0, reachable * 0.5**level if level else experts * (1 - exp(-pairs / experts)))
    mean = pairs / active
    variance = max(1 / mean, active / (reachable * 0.5**uneven) - 1 if uneven else 0.0)  # of rows over their mean
    return Load(pairs, active, quantiles(mean, variance))


def quantiles(mean: float, variance: float) -> tuple[float, ...]:
    """Of a log-normal distribution; `variance` is relative to the mean."""
    spread = sqrt(log(1 + variance))
    return tuple(mean * exp(spread * level - spread**2 / 2) for level in LEVELS)


@lru_cache(maxsize=4096)
def blocks_of(load: Load, block: int, low: int, grain: int) -> tuple[float, float, float]:
    """Blocks of rows, how many of them take the lower tile, and rows that the others multiply: the last block of an
    expert leaves out padding in steps of `grain`."""
    blocks, short, filled = 0, 0, 0
    for rows in load.rows:
        whole = max(1, ceil(rows / block)) - 1
        last = rows - whole * block
        lower = last <= low < block
        blocks, short = blocks + whole + 1, short + lower
        filled += whole * block + (0 if lower else ceil(last / grain) * grain)
    each = load.active / len(load.rows)
    return blocks * each, short * each, filled * each


@dataclass(frozen=True)
class Work:
    """One of the two products: columns and depth, columns that it writes, bytes of an element."""

    load: Load
    tokens: int
    columns: int
    depth: int
    written: int
    size: int


@dataclass(frozen=True)
class Cut:
    """How a config cuts it: kernel, columns of a tile, group, blocks, tiles that share a unit, and whether tiles take
    turns or are added up."""

    kernel: str
    wide: int
    group: float
    blocks: float
    resident: int
    turns: bool
    adds: bool


def _product_us(c: Config, prefix: str, w: Work, device: Device, bandwidth: float) -> float:
    """A step multiplies and waits for its loads; tiles come in rounds of as many as the device holds."""
    known = dict(c.params)
    block, low, parts = c["block"], known.get("low", c["block"]), known.get("parts", 1)
    kernel = KERNELS[c.variant][prefix == "down"]
    depth, stages = c[f"{prefix}_k"], c[f"{prefix}_stages"]
    wide = c[f"{prefix}_n"] * (2 if kernel == "ring" else w.columns // w.written)
    blocks, short, filled = blocks_of(w.load, block, low, 64 if parts == 2 and block > 64 else block)
    held = max(1, stages - (device.vendor == "amd"))  # without asynchronous copies one stage is in registers
    fit = device.shared_bytes // (held * (block + wide) * depth * w.size + 1024)
    resident = 1 if kernel == "ring" else max(1, min(4, fit))
    cut = Cut(kernel, wide, min(known.get(f"{prefix}_group", c["group"]), blocks), blocks, resident,
              parts == 2 and block <= 64, prefix == "down" and c["combine"] == "atomic")  # fmt: skip
    peak = (dict(device.peak_tflops).get("bf16") or 100.0) * 1e6 * REACHED
    halves = HALVES if parts == 2 and block > 64 else 1.0
    rate = peak * (min(1.0, block / 64) ** 0.5 if c["swap"] else 2.0 if cut.turns else halves)  # turns: half hidden
    tiles = blocks * ceil(w.columns / wide)
    multiply = 2.0 * w.columns * w.depth * (filled / rate + short * low / (peak * LOW))
    rounds = tiles / (device.units * resident)
    wait = LATENCY_US / max(1, stages - 1) + SLICE_US[kernel] * depth / 64
    wait *= rounds * w.depth / depth
    ends = 0.0 if cut.turns else rounds * END_US[kernel] * wide / 128
    busy = (multiply**2 + wait**2) ** 0.5 + ends
    busy *= 1 + (ceil(rounds) - rounds) * exp(-DRIFT * int(rounds)) / rounds
    flying = resident * stages * depth * wide * w.size
    memory = _moved(w, cut, device) / bandwidth * (1 + FLIGHT / flying)
    slow, fast = max(busy, memory), min(busy, memory)
    return slow * (1 + (fast / slow) ** 6) ** (1 / 6) + START_US[kernel]


def _moved(w: Work, cut: Cut, device: Device) -> float:
    """Bytes from device memory and to it, some of them again. The tiles of a group of blocks come panel by panel."""
    load, blocks, group, expert = w.load, cut.blocks, cut.group, w.columns * w.depth * w.size  # bytes of weights
    panels, at_once = ceil(w.columns / cut.wide), device.units * cut.resident
    l2 = device.l2_bytes or 1 << 25
    kept = KEPT * max(device.llc_bytes, l2)
    together = max(1.0, at_once / panels)  # blocks that run at a time

    def experts(of: float) -> float:
        return min(load.active, 1 + (of - 1) * load.active / blocks)

    # weights: blocks of an expert share them where they run at a time or lie in one group, as far as they keep step
    window = max(together, min(group, at_once))
    panel, alone = expert / panels, 1 / max(group, together)
    loading = panel * min(at_once * experts(window) / window, load.active * panels)
    far = APART[cut.kernel] * loading * (2 if cut.turns else 1) * (1 if group > 1 else panels**0.5)
    lost = AGAIN * alone + (1 - alone) * far / (far + kept)
    moved = expert * (load.active + max(0.0, blocks - load.active) * min(1.0, lost))
    # rows: a group asks for its own once for all panels that run at a time
    rows, sweeps = load.pairs * w.depth * w.size, min(max(panels * group / at_once, 1.0), panels)
    between = rows * group / blocks + experts(group) * panel
    moved += rows * (1 + (sweeps - 1) * between / (between + kept))
    if not cut.adds:
        return moved + load.pairs * w.written * w.size
    # additions: read and written once more, unless the cache holds what another expert of the token added
    out, passes = w.tokens * w.written * w.size, sweeps if group >= blocks else 1.0
    between = (load.active * expert / passes + rows + out / passes) * w.tokens / load.pairs
    return moved + out + 2 * load.pairs * w.written * w.size * between / (between + kept)
