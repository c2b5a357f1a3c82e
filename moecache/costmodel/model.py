"""The time of one MoE layer: rounds of tiles, each as slow as its slowest resource. Nine numbers a kernel and device.

A tile takes `tile_us` and its steps. A step of `j` programs on one unit takes what is slowest among multiplying for
all of them, loading for all of them from L2, and the latency that the pipeline of one cannot hide. A round is as many
tiles as the device holds at a time; it is no faster than device memory brings its bytes. The last round is seldom full.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from moecache.costmodel.work import Array, Candidates, Cell, Product, candidates, products
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Word

VERSION = 1
STEP, ROUND = 2.5, 3.0  # how sharply the slowest resource decides: infinity = max, 1 = sum
STEADY = 0.4  # by this share, every full round before the last makes the last one matter less: rounds drift apart
L2_BYTES_PER_CLOCK = 64  # that one unit can load
SMALL = 64  # rows below which a tile multiplies at `small_matmul`
PER_CLOCK = {"sm_90": 4096, "gfx942": 2048, "gfx950": 4096}  # dense bf16 FLOPs of one unit
BY_DTYPE = {"bf16": 1.0, "fp16": 1.0, "fp8": 2.0, "fp32": 0.25}
CLOCK_MHZ = 2000  # where the device does not say
DTYPE = {1.0: "fp8", 2.0: "bf16", 4.0: "fp32"}  # by bytes of an element
OTHER_LAUNCHES = 3  # sort, activation, sum


class Parameters(BaseModel):
    """What the model knows of one kernel variant on one kind of device. Shares are of the device's own rates."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = VERSION
    variant: Word = ""
    arch: Word = ""
    bandwidth: float = Field(gt=0, description="share of device memory's read rate")
    matmul: float = Field(gt=0, description="share of the matrix units' peak, tiles of 64 rows or more")
    small_matmul: float = Field(gt=0, description="the same for fewer rows")
    l2: float = Field(gt=0, description="share of 64 bytes per clock and unit")
    latency_us: float = Field(gt=0, description="of one step's loads, shared by stages - 1 steps")
    slice_us: float = Field(gt=0, description="of 64 columns of depth, that one program cannot hide")
    tile_us: float = Field(gt=0, description="to begin and end a tile of 128 columns; half of it grows with them")
    reread: float = Field(gt=0, description="share of an expert's weights that each further block of rows reads again")
    start_us: float = Field(gt=0, description="to begin and end a GEMM")
    bodies: dict[str, float] = Field(default={}, description="time factor of a compiled tile, by its sizes")


SHARED = tuple(name for name, field in Parameters.model_fields.items() if field.annotation is float)


def zero_shot(device: Device, variant: str = "") -> Parameters:
    """Parameters from the device's constants; the shares and times are round numbers, as an H200 showed them.

    Raises:
        InvalidInput: the device is no GPU, or its bandwidth is unknown.
    """
    if device.vendor == "cpu" or not device.bandwidth_gbs:
        raise InvalidInput(f"{device.name}: no cost model without a GPU's rates; bandwidth_gbs={device.bandwidth_gbs}")
    return Parameters(
        variant=variant, arch=device.arch, bandwidth=0.95, matmul=0.75,
        small_matmul=0.35 if device.vendor == "nvidia" else 0.75,  # Hopper's fast instruction wants 64 rows
        l2=0.8, latency_us=0.5, slice_us=300 / (device.clock_mhz or CLOCK_MHZ), tile_us=3.0,
        reread=0.15 + 0.3 * (1 - 1 / device.xcds),  # dies without a common L2 fetch the same weights
        start_us=device.launch_us + 9,
    )  # fmt: skip


def peak(device: Device, dtype: str) -> float:
    """FLOPs per µs of the matrix units at full clock, above what a long run sustains.

    Raises:
        InvalidInput: neither the architecture nor the device's table tells.
    """
    if per_clock := PER_CLOCK.get(device.arch):
        return per_clock * BY_DTYPE[dtype] * device.units * (device.clock_mhz or CLOCK_MHZ)
    if rate := _sustained(device, dtype):
        return rate
    raise InvalidInput(f"{device.name} ({device.arch}) has no {dtype} rate in peak_tflops")


def _sustained(device: Device, dtype: str) -> float:
    """FLOPs per µs by the device's table; 0 where it is silent."""
    rates = dict(device.peak_tflops)
    return 1e6 * (rates.get(dtype) or rates.get("bf16", 0.0) * BY_DTYPE[dtype])


@dataclass(frozen=True)
class Parts:
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
    largest: Array = np.maximum.reduce(np.broadcast_arrays(*times))
    total: Array = largest * sum((time / largest) ** power for time in times) ** (1 / power)
    return total


def gemm(p: Mapping[str, float], w: Product, device: Device, factor: Array) -> Parts:
    """One product of all cells with all configs, by the parameters named in SHARED and the bodies' factors."""
    clock, units = device.clock_mhz or CLOCK_MHZ, device.units
    dtypes = [DTYPE[size] for size in w.size[:, 0]]
    rate = np.array([[peak(device, dtype) / units] for dtype in dtypes])
    matmul = 2 * w.m * w.n * w.k / (rate * np.where(w.m < SMALL, p["small_matmul"], p["matmul"]))
    l2 = w.size * (w.rows / w.blocks + w.n) * w.k / (L2_BYTES_PER_CLOCK * clock * p["l2"])
    wait = p["latency_us"] / np.maximum(1, w.stages - 1) + p["slice_us"] * w.k / 64

    def tile(programs: Array) -> Array:
        return p["tile_us"] * (1 + w.n / 128) / 2 + w.steps * _slowest(STEP, matmul * programs, l2 * programs, wait)

    weights, bandwidth = w.size * w.columns * w.depth, device.bandwidth_gbs * 1e3  # bytes, bytes per µs
    least = weights * w.active + w.size * w.rows * (w.columns + w.depth)
    again = weights * (w.blocks - w.active) * np.where(w.group > 1, 0.5, 1.0)  # in groups, half are neighbours
    memory = (least + p["reread"] * again) / (bandwidth * p["bandwidth"])
    steady, waste = _rounds(w, units, tile, memory)
    sustained = np.array([[_sustained(device, dtype) or peak(device, dtype)] for dtype in dtypes])
    floor = np.maximum(least / bandwidth, 2 * w.rows * w.columns * w.depth / sustained)
    each = w.steps * w.programs / units
    return Parts(
        start=np.full(steady.shape, p["start_us"]), rounds=np.maximum(factor * steady, floor - factor * waste),
        last=factor * waste, memory=memory, matmul=matmul * each, l2=l2 * each,
    )  # fmt: skip


def _rounds(w: Product, units: int, tile: Callable[[Array], Array], memory: Array) -> tuple[Array, Array]:
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


def other_us(cells: Sequence[Cell], device: Device) -> Array:
    """[cells, 1] µs of the sort, the activation and the sum over top-k, as three kernels; 0 for `up` alone."""
    bandwidth = device.bandwidth_gbs * 1e3 * 0.8
    found = []
    for each in cells:
        rows = sum(each.counts)
        moved = 2 * (3 * rows * each.intermediate + (rows + each.tokens) * each.hidden)
        found.append([each.whole * (OTHER_LAUNCHES * (device.launch_us + 1) + moved / bandwidth)])
    return np.array(found)


def halves(p: Parameters, device: Device, cells: Sequence[Cell], among: Candidates) -> tuple[Parts, Parts]:
    """`up` and `down` of every cell with every config."""
    up, down = products(cells, among, device)
    first, second = (np.array([p.bodies.get(name, 1.0) for name in names]) for names in among.bodies)
    known = {name: getattr(p, name) for name in SHARED}
    return gemm(known, up, device, first), gemm(known, down, device, second)


def times(p: Parameters, device: Device, cells: Sequence[Cell], among: Candidates) -> Array:
    """[cells, configs] µs of whole layers, or of `up` where a cell says so."""
    up, down = halves(p, device, cells, among)
    return up.us + whole(cells) * down.us + other_us(cells, device)


def whole(cells: Sequence[Cell]) -> Array:
    """[cells, 1] 1 where all kernels of the layer count, 0 where `up` alone does."""
    return np.array([[float(each.whole)] for each in cells])


@dataclass(frozen=True)
class Prediction:
    """µs of one call with one config. `up`, `down` and `other` add up to it; their parts are named as in `Parts`."""

    us: float
    up: dict[str, float]
    down: dict[str, float]
    other: float


def predict(p: Parameters, device: Device, cell: Cell, config: Config) -> Prediction:
    """The time of one call with its parts.

    Raises:
        InvalidInput: the config names no tile.
    """
    among = candidates([config])
    up, down = (
        {name: float(getattr(part, name)[0, 0]) for name in ("us", *Parts.__dataclass_fields__)}
        for part in halves(p, device, [cell], among)
    )
    other = float(other_us([cell], device)[0, 0])
    return Prediction(up["us"] + cell.whole * down["us"] + other, up, down, other)
