"""What the model knows of kernels and a device: nine numbers a kernel, three for all, factors of compiled tiles."""

from pydantic import ConfigDict, Field

from moecache.schemas.device import CLOCK_MHZ, Device
from moecache.schemas.frozen import Frozen, Word

VERSION = 5  # of the model: parameters of another one say nothing here


class Kernel(Frozen):
    """One kernel on one kind of device. Shares are of the device's own rates."""

    model_config = ConfigDict(allow_inf_nan=False)

    matmul: float = Field(gt=0, description="share of the matrix units' peak, tiles of 64 rows")
    tall: float = Field(gt=0, description="the same for more rows")
    small: float = Field(gt=0, description="the same for fewer rows, and transposed")
    latency_us: float = Field(gt=0, description="of one step's loads, shared by stages - 1 steps")
    slice_us: float = Field(gt=0, description="of 64 columns of depth, that one program cannot hide")
    tile_us: float = Field(gt=0, description="to begin and end a tile of 128 columns; half of it grows with them")
    rows_us: float = Field(gt=0, description="to write 8192 elements of a tile's result")
    start_us: float = Field(gt=0, description="to begin and end a GEMM")
    drift: float = Field(gt=0, description="how far neighbours that share weights fall out of step, of a tile's time")


class Parameters(Frozen):
    """What ranks the configs of one kind of device."""

    model_config = ConfigDict(allow_inf_nan=False)

    version: int = VERSION
    arch: Word = ""
    bandwidth: float = Field(gt=0, description="share of device memory's read rate")
    reread: float = Field(gt=0, description="share of weights read again that comes from memory once more")
    early: float = Field(gt=0, description="share of a start that programmatic dependent launch leaves")
    kernels: dict[str, Kernel]
    bodies: dict[str, float] = Field(default={}, description="time factor of a compiled tile, by its sizes")


SHARED = ("bandwidth", "reread", "early")
OWN = tuple(Kernel.model_fields)


def zero_shot(device: Device) -> Parameters:
    """Parameters from the device's constants; the shares and times are round numbers, as an H200 showed them."""
    clock = (device.clock_mhz or CLOCK_MHZ) / 1000
    launch = device.launch_us

    def kernel(*shares: float, latency: float, cycles: float, ends: tuple[float, float, float], drift: float) -> Kernel:
        tile, rows, start = ends
        values = (*shares, latency, cycles / 1000 / clock, tile, rows, launch + start, drift)
        return Kernel(**dict(zip(OWN, values, strict=True)))

    few, wait = (0.35, 1.3) if device.vendor == "nvidia" else (0.75, 0.5)  # Hopper's fast instruction wants 64 rows
    return Parameters(
        arch=device.arch,
        bandwidth=0.98,
        early=0.6,
        reread=1.0 * (1 + (1 - 1 / device.xcds)),  # dies without a common L2 fetch the same weights
        kernels={
            "plain": kernel(0.9, 0.8, few, latency=0.3, cycles=475, ends=(3.0, 0.3, 11), drift=0.0025),
            "tile": kernel(1.0, 1.0, max(few, 0.45), latency=wait, cycles=90, ends=(1.3, 0.4, 3), drift=0.0025),
            "ring": kernel(1.5, 0.7, 0.5, latency=0.7, cycles=170, ends=(0.2, 0.15, 4), drift=0.024),
            "vector": kernel(0.5, 0.5, 0.5, latency=0.04, cycles=20, ends=(0.02, 0.5, 1.7), drift=0.035),
            "tile_fp8": kernel(1.0, 0.4, 0.54 * few, latency=0.7 * wait, cycles=270, ends=(3.5, 0.2, 3), drift=0.0025),
            "ring_fp8": kernel(0.6, 0.9, 0.6, latency=0.3, cycles=75, ends=(0.45, 0.3, 8.4), drift=0.005),
            "vector_fp8": kernel(0.5, 0.5, 0.027, latency=0.05, cycles=90, ends=(0.3, 0.5, 14), drift=0.0025),
        },
    )
