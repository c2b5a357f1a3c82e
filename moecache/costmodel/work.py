"""What a config makes a device do for one call: tiles, rounds of tiles, bytes. Counted exactly, nothing timed.

Two grouped GEMMs, `up` [rows, hidden] x [hidden, 2 · intermediate] (1 · without a gate) and `down` [rows, intermediate]
x [intermediate, hidden], each cut into tiles; one program computes one tile, and a unit (SM, CU) holds `resident`
programs at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moecache.costmodel.tiles import FLAGS, SIZES, body, kernels_of, tiles
from moecache.kernels.activations import panels, word_of
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem

Array = npt.NDArray[np.float64]
Sizes = dict[str, Array]  # by name, [1, configs]

BYTES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
REGISTERS = {"nvidia": 65536, "amd": 131072}  # 32-bit registers of one unit
OWN_REGISTERS = 64  # of a thread, beside its share of the sums: addresses, masks, operands
OWN_SHARED = 1024  # bytes that the runtime keeps for each program
GRAIN = 64  # rows that one group of warps multiplies at a time: of a tile in halves, padding is left out in such steps
ASYNC_ROWS = 64  # from here on Hopper multiplies from shared memory: one more buffer, and a higher rate


@dataclass(frozen=True)
class Cell:
    """One call of one layer, as one GPU sees it: `counts` are its rows per expert. Not `whole`: `up` alone. Not
    `gated`: w1 has no rows of a gate."""

    hidden: int
    intermediate: int
    tokens: int
    counts: tuple[int, ...]
    dtype: str = "bf16"
    whole: bool = True
    gated: bool = True

    @property
    def wide(self) -> int:
        """Columns of `up`."""
        return self.intermediate * (2 if self.gated else 1)

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
        """Where a call lies among others, in octaves: rows of an active expert, and how much there is of `up` and of
        `down`, active experts times columns. Layers of other shapes are near where these are."""
        active = sum(count > 0 for count in self.counts)
        sizes = (sum(self.counts) / active, active * self.wide / 2, active * self.hidden)
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
        gated=panels(word_of(problem)) == 2,
    )  # fmt: skip


@dataclass(frozen=True)
class Candidates:
    """Configs with what the model reads of them, read once: a search space serves many calls."""

    names: tuple[str, ...]
    kernels: tuple[tuple[str, ...], tuple[str, ...]]  # of `up` and `down`
    up: Sizes  # by field of Tile
    down: Sizes
    bodies: tuple[tuple[str, ...], tuple[str, ...]]  # what is compiled, whatever its order
    flags: Sizes  # by name in FLAGS: 1 or 0


def candidates(configs: Sequence[Config], gated: bool = True) -> Candidates:
    """Read configs, for layers with a gate or without.

    Raises:
        InvalidInput: none, or one names no tile.
    """
    if not configs:
        raise InvalidInput("no configs to predict: at least one is wanted")
    pairs = list(zip(*(tiles(config, gated) for config in configs), strict=True))
    kernels = list(zip(*map(kernels_of, configs), strict=True))
    bodies = [
        tuple(body(config, kernel, tile) for config, kernel, tile in zip(configs, named, part, strict=True))
        for named, part in zip(kernels, pairs, strict=True)
    ]
    up, down = ({name: _row(getattr(tile, name) for tile in part) for name in SIZES} for part in pairs)
    known = [dict(config.params) | dict(config.extra) for config in configs]
    flags = {name: _row(holds(each) for each in known) for name, holds in FLAGS.items()}
    return Candidates(
        tuple(config.name for config in configs), (kernels[0], kernels[1]), up, down, (bodies[0], bodies[1]), flags
    )


def _row(values: Iterable[float]) -> Array:
    return np.array([[float(value) for value in values]])


@dataclass(frozen=True)
class Product:
    """One of the two GEMMs for cells x configs: arrays that broadcast to [cells, configs]."""

    rows: Array
    active: Array
    blocks: Array  # tiles along the rows, summed over experts
    short: Array  # of these, the ones that take the lower tile
    filled: Array  # rows that are multiplied: those of all tiles, but for padding that is left out
    uneven: Array  # standard deviation of these from tile to tile
    written: Array  # rows of the result
    added: Array  # rows that are added to them
    programs: Array
    columns: Array
    depth: Array
    size: Array  # bytes of an element
    steps: Array  # of one tile
    resident: Array  # programs that one unit holds
    tile: Sizes

    @property
    def weights(self) -> Array:
        """Bytes of one expert's."""
        return self.size * self.columns * self.depth


def products(cells: Sequence[Cell], among: Candidates, device: Device) -> tuple[Product, Product]:
    """`up` and `down` of every cell with every config."""
    counts = [np.asarray(each.counts) for each in cells]
    rows = np.array([[float(c.sum())] for c in counts])
    shared = {
        "rows": rows,
        "active": np.array([[float((c > 0).sum())] for c in counts]),
        "size": np.array([[float(BYTES[each.dtype])] for each in cells]),
    } | _blocks(counts, among.up)
    wide = np.array([[float(each.wide)] for each in cells])
    inner = np.array([[float(each.intermediate)] for each in cells])
    hidden = np.array([[float(each.hidden)] for each in cells])
    tokens = np.array([[float(each.tokens)] for each in cells])
    atomic = among.flags["atomic"]
    up = {"columns": wide, "depth": hidden, "written": rows, "added": 0 * rows}
    down = {"columns": hidden, "depth": inner, "written": np.where(atomic > 0, tokens, rows), "added": atomic * rows}
    return _product(among, 0, shared | up, device), _product(among, 1, shared | down, device)


def _blocks(counts: Sequence[npt.NDArray[np.int_]], tile: Sizes) -> dict[str, Array]:
    """[cells, configs] blocks of rows, how many take the lower tile, and rows that are multiplied."""
    grain = np.where(in_halves(tile), GRAIN, tile["m"])
    heights, at = np.unique(np.stack([tile["m"][0], tile["low"][0], grain[0]]), axis=1, return_inverse=True)
    at = at.reshape(-1)  # numpy 2.0 gives it a second axis
    found = {
        "blocks": [[(-(-c // m)).sum() for m in heights[0]] for c in counts],
        "short": [[((c % m > 0) & (c % m <= low)).sum() * (low < m) for m, low, _ in heights.T] for c in counts],
        "filled": [[(-(-c // g)).sum() * g for g in heights[2]] for c in counts],
        "uneven": [[_spread(c, *height) for height in heights.T] for c in counts],
    }
    return {name: np.array(each, dtype=float)[:, at] for name, each in found.items()}


def _spread(count: npt.NDArray[np.int_], m: float, low: float, grain: float) -> float:
    """Standard deviation of the rows that blocks of m multiply, the last of an expert in steps of `grain`, or `low`."""
    if low == grain:
        return 0.0
    rest = count % m
    last = np.where((rest > 0) & (rest <= low) & (low < m), low, np.ceil(rest / grain) * grain)
    blocks = (-(-count // m)).sum()
    mean, squares = (((count // m) * m**power + last**power).sum() / blocks for power in (1, 2))
    return float(np.sqrt(max(0.0, squares - mean**2)))


def in_halves(tile: Sizes) -> npt.NDArray[np.bool_]:
    """Whether two groups of warps share a tile."""
    shared: npt.NDArray[np.bool_] = (tile["parts"] > 1) & (tile["m"] > GRAIN)
    return shared


def in_turns(tile: Sizes) -> npt.NDArray[np.bool_]:
    """Whether groups of warps take every other tile: one multiplies while the other ends its own."""
    alternate: npt.NDArray[np.bool_] = (tile["parts"] > 1) & ~in_halves(tile)
    return alternate


def _product(among: Candidates, half: int, sizes: dict[str, Array], device: Device) -> Product:
    t = (among.up, among.down)[half]
    vector = np.array([[kernel == "vector" for kernel in among.kernels[half]]])
    return Product(
        **sizes, programs=sizes["blocks"] * np.ceil(sizes["columns"] / t["n"]), steps=np.ceil(sizes["depth"] / t["k"]),
        resident=_resident(t, vector, float(sizes["size"].max()), device), tile=t,
    )  # fmt: skip


def _resident(t: Sizes, vector: npt.NDArray[np.bool_], size: float, device: Device) -> Array:
    """Programs that shared memory, registers and warps of a unit allow at a time; at least one."""
    asynchronous = ((t["m"] >= ASYNC_ROWS) | (t["swap"] > 0)) & (device.vendor == "nvidia")
    buffers = np.where(asynchronous, t["stages"], np.maximum(1, t["stages"] - 1))
    shared = buffers * (t["m"] + t["n"]) * t["k"] * size + OWN_SHARED
    lanes = t["warps"] * device.wave
    held = np.where(vector, t["n"] * t["k"] * size / 4, t["m"] * t["n"])  # weights, or sums
    registers = lanes * np.minimum(255, held / lanes + OWN_REGISTERS)
    limits = (
        np.where(vector, np.inf, (device.shared_bytes + OWN_SHARED) / shared),
        REGISTERS.get(device.vendor, 65536) / registers,
        device.waves_per_unit / t["warps"],
        np.where(t["programs"] > 0, t["programs"] / device.units, np.inf),
    )
    found: Array = np.maximum(1.0, np.floor(np.minimum.reduce(np.broadcast_arrays(*limits))))
    return found
