"""Which configs of fused MoE with fp8 weights are worth trying, and what each should cost."""

from collections.abc import Sequence
from math import ceil, exp
from typing import Any

from moecache.kernels.activations import panels, word_of
from moecache.kernels.agreed import BLOCK
from moecache.kernels.fused_moe import fp8_ring
from moecache.kernels.fused_moe import fp8_tiles as fp8_gpu
from moecache.kernels.matrix import DTYPES as HIDDEN
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, Value, pow2

Shape = tuple[int, int, int, int]  # columns of a tile, depth of a step, stages, warps
ORDERS = ((8, 4), (8, 3), (1, 4), (16, 3), (32, 3), (1, 3))  # blocks that share a panel; slots: fewer leave more of L2


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config worth trying beside `decode`; those that do not fit are left out by the op."""
    return _tile_space(problem, device) + _ring_space(problem, device)


def every(problem: Problem, device: Device) -> list[Config]:
    """The configs of all problems that differ from this one in tokens and routing alone, `decode` left out."""
    return _tiles_of((16, 32, 64, 128), problem, device) + _rings(device)


def _ring_space(problem: Problem, device: Device) -> list[Config]:
    """A few orders of the tiles, where experts have rows enough."""
    if problem.tokens * problem.topk <= 8 * problem.experts:
        return []
    return _rings(device)


def _rings(device: Device) -> list[Config]:
    return [
        config(fp8_ring.VARIANT, block=2 * fp8_ring.ROWS, stages=stages, group=g, programs=device.units)
        for g, stages in ORDERS
    ]


def _tile_space(problem: Problem, device: Device) -> list[Config]:
    """Configs for the rows that an expert has on average, the static default first."""
    rows = problem.tokens * problem.topk / problem.dim("global", problem.experts)
    height = min(128, max(16, pow2(ceil(0.75 * rows))))
    found = _tiles_of((height, max(16, height // 2), min(128, 2 * height)), problem, device)
    return [c for c in dict.fromkeys(found) if not fp8_gpu.fits(problem, c, device)][:16]


def _tiles_of(heights: Sequence[int], problem: Problem, device: Device) -> list[Config]:
    """Tiles of these numbers of rows."""
    own, extra = (_cdna, {"xcds": device.xcds}) if device.vendor == "amd" else (_hopper, {"launch_pdl": 1})
    tma = int(device.vendor == "nvidia" and not problem.dim("unaligned"))
    found = [tiles(extra, tma=tma, **shape) for shape in _unaligned() if problem.dim("unaligned")]
    for block in heights:
        shapes = own(block, problem.dim("quant") == "fp8_block")
        found += [tiles(extra, tma=tma, **shape) for shape in shapes]
        if device.vendor == "amd" and block > 16:  # products of 16 rows, where 32 are usual
            found += [tiles(extra | {"matrix_instr_nonkdim": 16}, tma=tma, **shape) for shape in shapes[:3]]
    if panels(word_of(problem)) == 2:
        return found
    # without a gate, panels as wide as gate and up together
    return [config(c.variant, dict(c.extra), **dict(c.params) | {"up_n": min(128, 2 * c["up_n"])}) for c in found]


def tiles(
    extra: dict[str, Value], block: int, up: Shape, down: Shape, *, group: int = 1, swap: int = 0, tma: int = 0,
    fuse: int = 0,
) -> Config:  # fmt: skip
    """A config in full. `block`: rows of a tile; `up`, `down`: columns of a tile, depth of a step, stages and warps;
    `group`: blocks that share a panel of weights; `swap`: products transposed; `fuse`: fused_moe/fp8_tiles.py says."""
    params: dict[str, Value] = {"block": block, "group": group, "swap": swap, "tma": tma, "fuse": fuse}
    for prefix, values in (("up", up), ("down", down)):
        params |= {f"{prefix}_{name}": value for name, value in zip(fp8_gpu.NAMES, values, strict=True)}
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
    return [{"block": 16, "up": (32, 128, 1, 8), "down": (64, 128, 1, 8), "swap": 1},
            {"block": 16, "up": (16, 128, 1, 8), "down": (32, 128, 1, 8), "swap": 0},
            {"block": 32, "up": (16, 128, 1, 8), "down": (32, 128, 1, 8), "swap": 0}]  # fmt: skip


# --- cost ---


def cost(problem: Problem, config: Config, device: Device) -> float:
    """Predicted µs."""
    own = _ring_cost if config.variant == fp8_ring.VARIANT else _tile_cost
    return own(problem, config, device)


def _ring_cost(problem: Problem, c: Config, device: Device) -> float:
    """µs: the larger of bytes and operations, with the rows that fill the blocks up."""
    hidden, middle, pairs = problem.dim("hidden"), problem.dim("intermediate"), problem.tokens * problem.topk
    speed = (device.bandwidth_gbs or 1000) * 1e3
    peak = (dict(device.peak_tflops).get("fp8") or 200.0) * 1e6
    active = min(problem.experts, pairs)
    tall = active * (pairs / active + fp8_ring.ROWS)
    matrices = 1 + panels(word_of(problem))
    weights = matrices * active * hidden * middle
    large = weights > 1e9  # then few slots leave more of L2, and few blocks want the next panel while it is there
    few = tall <= 32 * 2 * fp8_ring.ROWS  # all blocks in one group: each panel is read once
    group = (32 if few else 1 if pairs <= 128 * active else 8) if large else 8
    order = (c["group"] != group) + 0.5 * (c["stages"] != (3 if large else 4))
    total = 12 + 6 * device.launch_us + pairs * (2 * middle + 4 * hidden) / speed + order
    return total + max(weights / speed, 2.0 * matrices * tall * hidden * middle / (0.6 * peak))


HIDDEN_LESS = 0.1  # of the faster of bytes and operations: of tiles that wait for weights alike, the lower come first


def _tile_cost(problem: Problem, config: Config, device: Device) -> float:
    """µs from hardware constants alone: per product the larger of bytes and operations, bytes of the rows, launches."""
    c, hidden, middle = dict(config.params), problem.dim("hidden"), problem.dim("intermediate")
    size, experts = HIDDEN[problem.dtype].itemsize, problem.experts
    mine = problem.tokens * problem.topk * experts / max(experts, problem.dim("global", experts))  # pairs
    active = max(1.0, experts * (1 - exp(-mine / experts)))
    tall = active * max(1.0, mine / active / c["block"] + 0.35)  # blocks: experts differ
    speed = (device.bandwidth_gbs or 1000) * 1e3  # bytes a µs
    peak = (dict(device.peak_tflops).get("fp8") or 200.0) * 1e6
    row = middle * (1 if c["fuse"] else 2 + 2 * size) + 2 * hidden * size  # bytes that a pair's row is moved about
    moved = problem.tokens * hidden * (size + 1) + mine * row
    total = (5 + (not c["fuse"])) * device.launch_us + 14 + moved / speed
    each = panels(word_of(problem))
    for prefix, columns, depth, side in (("up", middle, hidden, each), ("down", hidden, middle, 1)):
        n, k, stages = (c[f"{prefix}_{name}"] for name in fp8_gpu.NAMES[:3])
        wide = BLOCK if prefix == "up" and c["fuse"] else n
        units = tall * ceil(columns / wide)
        waves = max(units, device.units) / units if units else 1.0  # units that stand idle
        reached = min(1.0, 0.75 + k * min(stages, 4) / 4096 + n / 4096) / max(1.0, waves / 4)
        read = active * columns * side * depth + mine * depth
        rate = peak * min(1.0, c["block"] / 64) ** 0.8 * min(1.0, side * n / 128) ** 0.3 * 0.4 / waves
        memory, busy = read / speed / reached, 2.0 * units * c["block"] * wide * side * depth / rate
        total += max(memory, busy) + HIDDEN_LESS * min(memory, busy)
    return total
