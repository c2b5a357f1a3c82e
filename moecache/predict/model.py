"""The time of one MoE layer: rounds of tiles, each as slow as its slowest resource.

A tile takes its beginning and end, and its steps. A step of `j` programs on one unit takes what is slowest among
multiplying for all of them, loading for all of them from L2, and the latency that the pipeline of one cannot hide. A
round is as many tiles as the device holds at a time; it is no faster than device memory brings its bytes, some of them
again (`again`). The last round is seldom full. Sort, activation and sum are launches and bytes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from moecache.predict.parameters import OWN, Parameters
from moecache.predict.products import Array, Candidates, Tiling, in_turns, products
from moecache.predict.rates import bandwidth, peak, sustained
from moecache.predict.work import Cell
from moecache.schemas.device import CLOCK_MHZ, Device
from moecache.schemas.errors import InvalidInput

STEP, ROUND = 2.0, 6.0  # how sharply the slowest resource decides: infinity = max, 1 = sum
STEADY = 0.4  # by this share, every full round before the last makes the last one matter less: rounds drift apart
L2_BYTES_PER_CLOCK = 64  # that one unit can load
FAST_ROWS = 64  # of a tile: fewer multiply at the share `small`, more at `tall`
COPY = 1.1  # launches that only copy: over the bytes at device memory's read rate
ADDED = 0.6  # the same for adding to the output atomically, where it stays in L2
DTYPE = {1.0: "fp8", 2.0: "bf16", 4.0: "fp32"}  # by bytes of an element
CACHED = 0.1  # weights of an expert that are this share of L2 survive there, half of them, until they are read again
KEPT = 0.5  # when this share of the last cache has gone by, half of what was there is lost: Hopper's halves hold copies


@dataclass(frozen=True)
class GemmTime:
    """Where the time of one GEMM goes, µs, arrays [cells, configs].

    The first three add up to it; the others are what one resource alone would take.
    """

    start: Array
    rounds: Array  # as if the last were full
    last: Array  # what the last one wastes
    memory: Array
    matmul: Array
    l2: Array

    @property
    def us(self) -> Array:
        return self.start + self.rounds + self.last


def _slowest(power: float, *times: Array) -> Array:
    """A soft maximum: never below the largest."""
    largest = reduce(np.maximum, times)
    total: Array = largest * reduce(np.add, ((time / largest) ** power for time in times)) ** (1 / power)
    return total


def _rows(own: Mapping[str, Array], w: Tiling) -> Array:
    """Rows that a block takes the time of, at the matrix units' full rate."""
    m, low = w.tile["m"], w.tile["low"]
    share = np.where(m > FAST_ROWS, own["tall"], own["matmul"])
    full = w.filled / np.maximum(1, w.blocks) / np.where((m < FAST_ROWS) | (w.tile["swap"] > 0), own["small"], share)
    rows: Array = full + (low / own["small"] - full) * w.short / np.maximum(1, w.blocks)
    return rows


def gemm(shared: Mapping[str, float], own: Mapping[str, Array], w: Tiling, device: Device, factor: Array) -> GemmTime:
    """One product of all cells with all configs.

    Args:
        shared, own: parameters for all kernels, and of each config's kernel. factor: of its body.
    """
    clock, units, t = device.clock_mhz or CLOCK_MHZ, device.units, w.tile
    dtypes = [DTYPE[size] for size in w.size[:, 0]]
    rate = np.array([[peak(device, dtype) / units] for dtype in dtypes])
    matmul = 2 * _rows(own, w) * t["n"] * t["k"] / rate
    l2 = w.size * (w.rows / w.blocks + t["n"]) * t["k"] / (L2_BYTES_PER_CLOCK * clock)
    wait = own["latency_us"] / np.maximum(1, t["stages"] - 1) + own["slice_us"] * t["k"] / 64
    out = np.where(t["gated"] > 0, 0.5, 1.0)  # columns of the result for one of the product
    ends = own["tile_us"] * (1 + t["n"] / 128) / 2 + own["rows_us"] * w.rows / w.blocks * t["n"] * out / 8192

    def tile(programs: Array) -> Array:
        steps = w.steps * _slowest(STEP, matmul * programs, l2 * programs, wait)
        return np.asarray(np.where(in_turns(t), _slowest(ROUND, steps, (ends + steps) / 2), ends + steps))

    reads = bandwidth(device)
    least = w.weights * w.active + w.size * (w.rows * w.depth + w.written * w.columns * out)
    memory = (least + again(w, shared["reread"], own, device)) / (reads * shared["bandwidth"])
    steady, waste = _rounds(w, units, tile, memory)
    waste = waste + _uneven(own, w, units, rate)
    dense = np.array([[sustained(device, dtype)] for dtype in dtypes])
    floor = np.maximum(least / reads, 2 * w.rows * w.columns * w.depth / dense)
    each = w.steps * w.programs / units
    rounds = np.maximum(factor * steady, floor - factor * waste)
    start = np.broadcast_to(own["start_us"], steady.shape)
    return GemmTime(start, rounds, factor * waste, memory, matmul * each, l2 * each)


def _rounds(w: Tiling, units: int, tile: Callable[[Array], Array], memory: Array) -> tuple[Array, Array]:
    """µs of all tiles as if every round were full, and what the last round adds.

    Args:
        tile: time of one of so many tiles on a unit. memory: time in which device memory brings what all tiles need.
    """
    capacity = units * w.resident
    full = _slowest(ROUND, tile(w.resident), memory * capacity / w.programs)
    count = np.floor(w.programs / capacity)
    rest = w.programs - count * capacity
    crowd = np.maximum(1, np.ceil(rest / units))  # programs of the busiest unit
    last = np.where(rest > 0, _slowest(ROUND, tile(crowd), memory * np.maximum(rest, 1) / w.programs), 0)
    steady = full * w.programs / capacity
    return steady, (count * full + last - steady) * np.exp(-STEADY * count)


def _uneven(own: Mapping[str, Array], w: Tiling, units: int, rate: Array) -> Array:
    """µs that the busiest unit multiplies longer than others, where tiles have unequal rows, as they leave out padding
    or some are low: a standard deviation of the sum of its tiles. Where the device hands tiles out, later ones even it
    out."""
    each, share = w.programs / units, w.short / np.maximum(1, w.blocks)
    lower = np.abs(w.tile["m"] / own["tall"] - w.tile["low"] / own["small"]) * np.sqrt(share * (1 - share))
    apart = np.where(w.tile["programs"] > 0, np.sqrt(np.maximum(1, each)), np.exp(-each))
    late: Array = 2 * (w.uneven / own["tall"] + lower) * apart * w.tile["n"] * w.tile["k"] * w.steps / rate
    return late


def starts(early: float, among: Candidates) -> Array:
    """[1, configs] what a launch takes of its time alone: less where it begins before the one before it ends."""
    return np.where(among.around["early"] > 0, early, 1.0)


def around_us(early: float, cells: Sequence[Cell], among: Candidates, device: Device) -> Array:
    """[cells, configs] µs of what stands around the products: launches, what they move, and additions to the output.
    0 for `up` alone."""
    sizes = [(sum(c.counts), c.tokens, c.hidden, c.intermediate, 4 if c.dtype == "fp32" else 2) for c in cells]
    rows, tokens, hidden, inner, size = np.array(sizes, dtype=float).T[:, :, None]
    a = among.around
    copied = (a["row_hidden"] * rows + a["token_hidden"] * tokens) * hidden + a["row_inner"] * rows * inner
    moved = size * (COPY * copied + ADDED * (a["atomic"] * rows * hidden)) / bandwidth(device)
    total: Array = whole(cells) * (moved + a["launches"] * device.launch_us * starts(early, among))
    return total


def whole(cells: Sequence[Cell]) -> Array:
    """[cells, 1] 1 where all kernels of the layer count, 0 where `up` alone does."""
    return np.array([[float(each.whole)] for each in cells])


def halves(p: Parameters, device: Device, cells: Sequence[Cell], among: Candidates) -> tuple[GemmTime, GemmTime]:
    """`up` and `down` of every cell with every config."""
    shared, begun = {"bandwidth": p.bandwidth, "reread": p.reread}, starts(p.early, among)
    found = []
    for w, kernels, bodies in zip(products(cells, among, device), among.kernels, among.bodies, strict=True):
        own = spread(p, kernels)
        own["start_us"] = own["start_us"] * begun
        found.append(gemm(shared, own, w, device, np.array([p.bodies.get(name, 1.0) for name in bodies])))
    return found[0], found[1]


def times(p: Parameters, device: Device, cells: Sequence[Cell], among: Candidates) -> Array:
    """[cells, configs] µs of whole layers, or of `up` where a cell says so.

    Raises:
        InvalidInput: a kernel that the parameters do not know.
    """
    up, down = halves(p, device, cells, among)
    return up.us + whole(cells) * down.us + around_us(p.early, cells, among, device)


def spread(p: Parameters, kernels: Iterable[str]) -> dict[str, Array]:
    """Every number of the kernels, [1, configs] in the order of `kernels`.

    Raises:
        InvalidInput: a kernel that the parameters do not know.
    """
    named = list(kernels)
    if unknown := set(named) - p.kernels.keys():
        raise InvalidInput(f"no parameters of kernel {', '.join(sorted(unknown))}; known are {', '.join(p.kernels)}")
    order = {kernel: at for at, kernel in enumerate(dict.fromkeys(named))}
    at = np.array([order[kernel] for kernel in named])
    return {name: np.array([getattr(p.kernels[kernel], name) for kernel in order])[None, at] for name in OWN}


# --- bytes that device memory brings a second time, as they are asked for again after the caches have lost them ---
#
# Tiles are taken in groups of blocks of rows; a group takes one panel of columns after the other. So blocks of an
# expert that run at a time ask for the same weights, all panels ask for the same rows, and experts add to the same
# output.


def again(w: Tiling, reread: float, own: Mapping[str, Array], device: Device) -> Array:
    """Bytes beside those that are read and written once, [cells, configs]."""
    order = _Order(w, device)
    return order.weights(reread, own["drift"]) + order.rows() + order.added()


class _Order:
    """In which order the tiles of a product come, and what the caches make of it."""

    def __init__(self, w: Tiling, device: Device) -> None:
        self._w, self._l2 = w, max(device.l2_bytes, 1 << 20)
        self._last = max(device.llc_bytes, self._l2)  # the cache before device memory
        self._panels = np.ceil(w.columns / w.tile["n"])
        self._at_once = device.units * w.resident  # tiles
        self._group = np.minimum(w.tile["group"], np.maximum(1, w.blocks))
        self._slab = w.size * w.tile["n"] * w.depth  # a panel of one expert's weights

    def _lost(self, gone_by: Array) -> Array:
        """Share of something that the last cache loses while so many bytes go by."""
        return gone_by / (gone_by + KEPT * self._last)

    def _experts(self, blocks: Array) -> Array:
        """Whose rows lie in so many blocks."""
        return np.minimum(self._w.active, 1 + (blocks - 1) * self._w.active / np.maximum(1, self._w.blocks))

    def weights(self, reread: float, drift: Array) -> Array:
        """Blocks of an expert share its weights where they run at a time or lie in one group, as far as they stay in
        step: the less, the more tiles lie between them, and the more bytes are on their way."""
        w, together = self._w, np.maximum(1, self._at_once / self._panels)
        window = np.maximum(together, np.minimum(self._group, self._at_once))  # blocks that run at a time
        slabs = np.minimum(self._at_once * self._experts(window) / window, w.active * self._panels)
        turns = np.where(in_turns(w.tile), w.tile["parts"], 1)  # tiles that a program has begun
        between = turns * np.sqrt(np.where(self._group > 1, 1, self._panels))
        apart = 1 / np.maximum(w.tile["group"], together)  # share of neighbours that neither run nor lie together
        cold = reread * apart * w.weights / (w.weights + CACHED * self._l2)
        late = (1 - apart) * self._lost(drift * between * slabs * self._slab)
        return (w.blocks - w.active) * w.weights * np.minimum(1, cold + late)

    def _sweeps(self) -> Array:
        """How often a group asks for its rows: once for all panels that run at a time."""
        return np.clip(self._panels * self._group / self._at_once, 1, self._panels)

    def rows(self) -> Array:
        """Every further sweep asks for the rows of its group."""
        w = self._w
        rows = w.size * w.rows * w.depth
        between = rows * self._group / np.maximum(1, w.blocks) + self._experts(self._group) * self._slab
        return (self._sweeps() - 1) * rows * self._lost(between)

    def added(self) -> Array:
        """What is added to the output is read and written once more, unless the cache still holds what another expert
        of the token added: they follow each other within a sweep, if that takes all blocks, else within the product."""
        w = self._w
        sweeps = np.where(self._group >= w.blocks, self._sweeps(), 1)
        moved = w.weights * w.active / sweeps + w.size * (w.rows * w.depth + w.written * w.columns / sweeps)
        return 2 * w.size * w.added * w.columns * self._lost(moved * w.written / w.rows)
