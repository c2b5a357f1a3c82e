"""The grouped products of calls with configs, as arrays: tiles, rounds of tiles, rows. Counted exactly, nothing timed.

Two grouped products, `up` [rows, hidden] x [hidden, 2 · intermediate] (1 · without a gate) and `down` [rows,
intermediate] x [intermediate, hidden], each cut into tiles; one program computes one tile, and a unit (SM, CU) holds
`resident` programs at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from moecache.predict.work import BYTES, Cell, Tile, Work
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput

Array = npt.NDArray[np.float64]
Sizes = dict[str, Array]  # by name, [1, configs]

SIZES = tuple(field.name for field in fields(Tile) if field.name != "kernel")
AROUND = ("atomic", "early", "launches", "row_hidden", "row_inner", "token_hidden")  # of Work
REGISTERS = {"nvidia": 65536, "amd": 131072}  # 32-bit registers of one unit
OWN_REGISTERS = 64  # of a thread, beside its share of the sums: addresses, masks, operands
OWN_SHARED = 1024  # bytes that the runtime keeps for each program
GRAIN = 64  # rows that one group of warps multiplies at a time: of a tile in halves, padding is left out in such steps
ASYNC_ROWS = 64  # from here on Hopper multiplies from shared memory: one more buffer, and a higher rate


@dataclass(frozen=True)
class Candidates:
    """What configs do, as arrays [1, configs]: a search space serves many calls."""

    works: tuple[Work, ...]
    kernels: tuple[tuple[str, ...], tuple[str, ...]]  # of `up` and `down`
    tiles: tuple[Sizes, Sizes]  # by field of Tile
    bodies: tuple[tuple[str, ...], tuple[str, ...]]  # what is compiled, whatever its order
    around: Sizes  # by name in AROUND


def candidates(works: Sequence[Work]) -> Candidates:
    """Works with products, as arrays. A product alone is its own second one, which its calls do not count.

    Raises:
        InvalidInput: there are none, or one has no product.
    """
    if not works or any(work.up is None for work in works):
        raise InvalidInput(f"{len(works)} configs to predict; allowed is 1 and more, each with a grouped product")
    ups = [work.up for work in works if work.up]
    both = ups, [work.down or up for work, up in zip(works, ups, strict=True)]
    first, second = (tuple(tile.kernel for tile in half) for half in both)
    up, down = ({name: _row(getattr(tile, name) for tile in half) for name in SIZES} for half in both)
    for tiles in (up, down):
        tiles["low"] = np.where(tiles["low"] > 0, tiles["low"], tiles["m"])
    names = tuple(tuple(tile.body for tile in half) for half in both)
    around = {name: _row(getattr(work, name) for work in works) for name in AROUND}
    return Candidates(tuple(works), (first, second), (up, down), (names[0], names[1]), around)


def _row(values: Iterable[float]) -> Array:
    return np.array([[float(value) for value in values]])


@dataclass(frozen=True)
class Tiling:
    """One of the two products for cells x configs: arrays that broadcast to [cells, configs]."""

    rows: Array
    active: Array
    size: Array  # bytes of an element
    columns: Array
    depth: Array
    written: Array  # rows of the result
    added: Array  # rows that are added to them
    tile: Sizes
    resident: Array  # programs that one unit holds
    blocks: Array  # tiles along the rows, summed over experts
    short: Array  # of these, the ones that take the lower tile
    filled: Array  # rows that are multiplied: those of all tiles, but for padding that is left out
    uneven: Array  # standard deviation of these from tile to tile, where padding is left out

    @property
    def programs(self) -> Array:
        """Tiles."""
        return self.blocks * np.ceil(self.columns / self.tile["n"])

    @property
    def steps(self) -> Array:
        """Of one tile."""
        return np.ceil(self.depth / self.tile["k"])

    @property
    def weights(self) -> Array:
        """Bytes of one expert's."""
        return self.size * self.columns * self.depth


def products(cells: Sequence[Cell], among: Candidates, device: Device) -> tuple[Tiling, Tiling]:
    """`up` and `down` of every cell with every config."""
    counts = [np.asarray(each.counts) for each in cells]
    sizes = [(BYTES[c.dtype], c.wide, c.intermediate, c.hidden, c.tokens) for c in cells]
    size, wide, inner, hidden, tokens = np.array(sizes, dtype=float).T[:, :, None]
    rows, active = np.array([(c.sum(), np.count_nonzero(c)) for c in counts], dtype=float).T[:, :, None]
    atomic = among.around["atomic"]
    found = []
    for half, columns, depth, written, added in (
        (0, wide, hidden, rows, 0 * rows),
        (1, hidden, inner, np.where(atomic > 0, tokens, rows), atomic * rows),
    ):
        tile = among.tiles[half]
        vector = np.array([[kernel.startswith("vector") for kernel in among.kernels[half]]])
        resident = _resident(tile, vector, float(size.max()), device)
        blocks = _blocks(counts, tile)
        found.append(Tiling(rows, active, size, columns, depth, written, added, tile, resident, **blocks))
    return found[0], found[1]


def _blocks(counts: Sequence[npt.NDArray[np.int_]], tile: Sizes) -> dict[str, Array]:
    """[cells, configs] blocks of rows, how many take the lower tile, rows that are multiplied, and how they differ."""
    grain = np.where(in_halves(tile), GRAIN, tile["m"])
    heights, at = np.unique(np.stack([tile["m"][0], tile["low"][0], grain[0]]), axis=1, return_inverse=True)
    found = np.array([[_cut(c, *height) for height in heights.T] for c in counts])[:, at.reshape(-1)]
    return dict(zip(("blocks", "short", "filled", "uneven"), np.moveaxis(found, 2, 0), strict=True))


def _cut(count: npt.NDArray[np.int_], m: float, low: float, grain: float) -> tuple[float, float, float, float]:
    """Blocks of m rows, those with at most `low` < m, rows that are multiplied in steps of `grain`, and their standard
    deviation from block to block."""
    rest, blocks = count % m, (-(-count // m)).sum()
    last = np.ceil(rest / grain) * grain
    filled = ((count // m) * m + last).sum()
    squares = ((count // m) * m**2 + last**2).sum() / blocks
    short = ((rest > 0) & (rest <= low)).sum() if low < m else 0.0
    return blocks, short, filled, np.sqrt(max(0.0, squares - (filled / blocks) ** 2))


def in_halves(tile: Sizes) -> npt.NDArray[np.bool_]:
    """Whether two groups of warps share a tile."""
    shared: npt.NDArray[np.bool_] = (tile["parts"] > 1) & (tile["m"] > GRAIN)
    return shared


def in_turns(tile: Sizes) -> npt.NDArray[np.bool_]:
    """Whether groups of warps take every other tile: one multiplies while the other ends its own."""
    alternate: npt.NDArray[np.bool_] = (tile["parts"] > 1) & ~in_halves(tile)
    return alternate


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
