"""What a config makes a device do for one call: tiles, rounds of tiles, bytes. Counted exactly, nothing timed.

Two grouped GEMMs, `up` [rows, hidden] x [hidden, 2 · intermediate] and `down` [rows, intermediate] x [intermediate,
hidden], each cut into tiles; one program computes one tile, and a unit (SM, CU) holds `resident` programs at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem

Array = npt.NDArray[np.float64]

BYTES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
REGISTERS = {"nvidia": 65536, "amd": 131072}  # 32-bit registers of one unit
OWN_REGISTERS = 64  # of a thread, beside its share of the sums: addresses, masks, operands
OWN_SHARED = 1024  # bytes that the runtime keeps for each program
ASYNC_ROWS = 64  # from here on Hopper multiplies from shared memory: one more buffer, and a higher rate


@dataclass(frozen=True)
class Cell:
    """One call of one layer, as one GPU sees it: `counts` are its rows per expert. Not `whole`: `up` alone."""

    hidden: int
    intermediate: int
    tokens: int
    counts: tuple[int, ...]
    dtype: str = "bf16"
    whole: bool = True

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.intermediate, self.tokens, sum(self.counts))
        if min(sizes) < 1 or min(self.counts) < 0 or self.dtype not in BYTES:
            given = (
                f"hidden={self.hidden}, intermediate={self.intermediate}, tokens={self.tokens}, dtype={self.dtype!r}"
            )
            raise InvalidInput(
                f"{given}, {sum(self.counts)} rows; allowed are sizes from 1, counts from 0 and {', '.join(BYTES)}"
            )

    @property
    def features(self) -> tuple[float, ...]:
        """Where a call lies among others, in octaves: tokens, active experts, hidden, intermediate, experts."""
        active = sum(count > 0 for count in self.counts)
        sizes = (self.tokens, active, self.hidden, self.intermediate, len(self.counts))
        return tuple(float(np.log2(size)) for size in sizes)


def cell(problem: Problem, counts: Sequence[int]) -> Cell:
    """The call that a `fused_moe` or `grouped_gemm` problem asks about, with its rows per expert.

    Raises:
        InvalidInput: the problem's dims lack hidden or intermediate, or no row is counted.
    """
    alone = problem.op == "grouped_gemm"
    return Cell(
        hidden=problem.dim("hidden"), intermediate=problem.dim("intermediate") // (2 if alone else 1),
        tokens=max(1, sum(counts) // problem.topk), counts=tuple(counts),
        dtype="fp8" if problem.dim("quant", "") else problem.dtype or "bf16", whole=not alone,
    )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """Rows (m), columns (n) and depth of one step (k) of a tile, and how it is computed."""

    m: int
    n: int
    k: int
    group: int = 1
    warps: int = 4
    stages: int = 2
    programs: int = 0  # of a persistent launch; 0 = one a tile


NAMES = {  # by field of Tile: what the kernels call it
    "m": ("BLOCK_SIZE_M", "block_m", "block"),
    "n": ("BLOCK_SIZE_N", "block_n", "n"),
    "k": ("BLOCK_SIZE_K", "block_k", "k"),
    "group": ("GROUP_SIZE_M", "group_m", "group"),
    "warps": ("num_warps", "warps"),
    "stages": ("num_stages", "stages"),
    "programs": ("programs",),
}


def tiles(config: Config) -> tuple[Tile, Tile]:
    """The tiles of `up` and `down`. Parameters named `up_…` and `down_…` belong to one of them, others to both.

    A config without rows is a matrix-vector kernel: every row is a tile of its own. Kernels that name `up_n` apply the
    activation themselves, so that a tile has that many columns of the gate and as many beside them.

    Raises:
        InvalidInput: n or k are missing or no whole numbers.
    """
    known = dict(config.params)
    found = []
    for prefix in ("up_", "down_"):
        own = {name.removeprefix(prefix): value for name, value in known.items() if name.startswith(prefix)}
        sizes = {field: _first(known | own, names) for field, names in NAMES.items()}
        given = {field: value for field, value in sizes.items() if value is not None}
        if not {"n", "k"} <= given.keys() or min(v for f, v in given.items() if f != "programs") < 1:
            raise InvalidInput(
                f"{config.name} names no tile: wanted are its columns ({', '.join(NAMES['n'])}) and its depth "
                f"({', '.join(NAMES['k'])}), from 1"
            )
        gated = 2 if prefix == "up_" and "up_n" in known else 1
        found.append(Tile(**{"m": 1} | given | {"n": gated * given["n"]}))
    return found[0], found[1]


def _first(known: dict[str, int | str | bool], names: Sequence[str]) -> int | None:
    return next((value for name in names if isinstance(value := known.get(name), int)), None)


Sizes = dict[str, Array]  # by field of Tile, [1, configs]


@dataclass(frozen=True)
class Candidates:
    """Configs with what the model reads of them, read once: a search space serves many calls."""

    names: tuple[str, ...]
    variants: tuple[str, ...]
    up: Sizes
    down: Sizes
    bodies: tuple[tuple[str, ...], tuple[str, ...]]  # of `up` and `down`: what is compiled, whatever its order


def candidates(configs: Sequence[Config]) -> Candidates:
    """Read configs.

    Raises:
        InvalidInput: none, or one names no tile.
    """
    if not configs:
        raise InvalidInput("no configs to predict: at least one is wanted")
    pairs = list(zip(*map(tiles, configs), strict=True))
    up, down = (
        {field.name: np.array([[float(getattr(tile, field.name)) for tile in part]]) for field in fields(Tile)}
        for part in pairs
    )
    bodies = [
        tuple(f"{c.variant}:{t.m}x{t.n}x{t.k}.w{t.warps}.s{t.stages}" for c, t in zip(configs, part, strict=True))
        for part in pairs
    ]
    every = tuple(config.name for config in configs), tuple(config.variant for config in configs)
    return Candidates(*every, up, down, (bodies[0], bodies[1]))


@dataclass(frozen=True)
class Product:
    """One of the two GEMMs for cells x configs: arrays that broadcast to [cells, configs]."""

    rows: Array
    active: Array
    blocks: Array  # tiles along the rows, summed over experts
    programs: Array
    columns: Array
    depth: Array
    size: Array  # bytes of an element
    steps: Array  # of one tile
    m: Array
    n: Array
    k: Array
    group: Array
    stages: Array
    resident: Array  # programs that one unit holds


def products(cells: Sequence[Cell], among: Candidates, device: Device) -> tuple[Product, Product]:
    """`up` and `down` of every cell with every config."""
    counts = [np.asarray(each.counts) for each in cells]
    high = {m: np.array([[(-(-c // m)).sum()] for c in counts], dtype=float) for m in np.unique(among.up["m"])}
    shared = {
        "rows": np.array([[float(c.sum())] for c in counts]),
        "active": np.array([[float((c > 0).sum())] for c in counts]),
        "size": np.array([[float(BYTES[each.dtype])] for each in cells]),
        "blocks": np.concatenate([high[m] for m in among.up["m"][0]], axis=1),
    }
    wide = np.array([[2.0 * each.intermediate] for each in cells])
    hidden = np.array([[float(each.hidden)] for each in cells])
    return (
        _product(among.up, shared, wide, hidden, device),
        _product(among.down, shared, hidden, wide / 2, device),
    )


def _product(t: Sizes, shared: dict[str, Array], columns: Array, depth: Array, device: Device) -> Product:
    return Product(
        **shared, columns=columns, depth=depth, programs=shared["blocks"] * np.ceil(columns / t["n"]),
        steps=np.ceil(depth / t["k"]), resident=_resident(t, float(shared["size"].max()), device),
        **{name: t[name] for name in ("m", "n", "k", "group", "stages")},
    )  # fmt: skip


def _resident(t: dict[str, Array], size: float, device: Device) -> Array:
    """Programs that shared memory, registers and warps of a unit allow at a time; at least one."""
    asynchronous = (t["m"] >= ASYNC_ROWS) & (device.vendor == "nvidia")
    buffers = np.where(asynchronous, t["stages"], np.maximum(1, t["stages"] - 1))
    shared = buffers * (t["m"] + t["n"]) * t["k"] * size + OWN_SHARED
    lanes = t["warps"] * device.wave
    registers = lanes * np.minimum(255, t["m"] * t["n"] / lanes + OWN_REGISTERS)
    limits = (
        (device.shared_bytes + OWN_SHARED) / shared,
        REGISTERS.get(device.vendor, 65536) / registers,
        device.waves_per_unit / t["warps"],
        np.where(t["programs"] > 0, t["programs"] / device.units, np.inf),
    )
    found: Array = np.maximum(1.0, np.floor(np.minimum.reduce(np.broadcast_arrays(*limits))))
    return found
