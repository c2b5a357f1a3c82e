"""What a device does in a µs, and with it the time of launches that are no grouped products.

The factors of sorting were fitted to 640 timings on an H200, then set right by 1379 on an H100
(benchmarks/notes/estimates.md); clock, units and the cost of a launch carry them to other devices. Those of a CPU order
its candidates, no more.
"""

from moecache.predict.work import Work
from moecache.schemas.device import CLOCK_MHZ, Device

BANDWIDTH, TFLOPS = 1e6, 100.0  # bytes a µs, and dense bf16, of a GPU that does not say
PER_CLOCK = {"sm_90": 4096, "gfx942": 2048, "gfx950": 4096}  # dense bf16 FLOPs of one unit
BY_DTYPE = {"bf16": 1.0, "fp16": 1.0, "fp8": 2.0, "fp32": 0.25}
SCHEDULERS = 4  # of a unit: each issues an instruction of a warp a clock
FIRST_US = 1.0  # of the first of several launches
BARRIER_US = 0.4
IDLE_US, PROGRAM_US = 2.5, 1.25e-3  # of a product without rows, and of each program that begins there (in_graph.json)
MEETING_US, LINK = 4.7, 358e3  # of a phase of GPUs that exchange rows, and bytes a µs over their link: two H200s
COLLECTIVE_US, GATHER = 13.0, 225e3  # the same with NCCL
# One core, as torch reaches it with AMX or AVX-512: FLOPs and bytes a µs, µs of a call and of an element.
CORE = {"bf16": 90e3, "fp16": 22e3, "fp32": 22e3}
CORE_BANDWIDTH, CALL_US, ELEMENT_US = 8e3, 5.0, 1e-3


def bandwidth(device: Device) -> float:
    """Bytes of device memory that a µs reads."""
    return device.bandwidth_gbs * 1e3 or (CORE_BANDWIDTH if device.vendor == "cpu" else BANDWIDTH)


def peak(device: Device, dtype: str) -> float:
    """FLOPs per µs of the matrix units at full clock, above what a long run sustains."""
    if per_clock := PER_CLOCK.get(device.arch):
        return per_clock * BY_DTYPE[dtype] * device.units * (device.clock_mhz or CLOCK_MHZ)
    return sustained(device, dtype)


def sustained(device: Device, dtype: str) -> float:
    """FLOPs per µs by the device's table."""
    rates = dict(device.peak_tflops)
    if not rates and device.vendor == "cpu":
        return CORE[dtype] * device.units
    return 1e6 * (rates.get(dtype) or rates.get("bf16", TFLOPS) * BY_DTYPE[dtype])


def floor_us(work: Work, device: Device) -> float:
    """The longer of moving the bytes of a work and computing its FLOPs: no launch takes less."""
    return max(work.nbytes / bandwidth(device), sum(n / sustained(device, dtype) for dtype, n in work.flops))


def alone_us(work: Work, device: Device) -> float:
    """µs of a work without grouped products."""
    moved, computed = work.nbytes / bandwidth(device), sum(n / sustained(device, d) for d, n in work.flops)
    moved += work.linked / LINK + work.gathered / GATHER + MEETING_US * work.meetings + COLLECTIVE_US * work.collectives
    if device.vendor == "cpu":
        return CALL_US * work.launches + ELEMENT_US * work.instructions + moved + computed
    issued = work.instructions / (SCHEDULERS * (device.clock_mhz or CLOCK_MHZ))
    waited = BARRIER_US * work.barriers + IDLE_US * work.idle + PROGRAM_US * work.programs
    return FIRST_US * (not work.idle) + device.launch_us * work.launches + issued + waited + moved + computed
