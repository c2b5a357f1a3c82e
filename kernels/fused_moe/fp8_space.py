"""Which configs of fused MoE with fp8 weights are worth trying."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from moecache.kernels.activations import panels, word_of
from moecache.kernels.agreed import BLOCK
from moecache.kernels.fused_moe import fp8_tiles as fp8_gpu
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
    return [config("fp8_ring", block=BLOCK, stages=stages, group=g, programs=device.units) for g, stages in ORDERS]


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
