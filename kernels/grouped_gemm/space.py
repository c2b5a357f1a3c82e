"""Which configs of the grouped GEMM are worth trying on a GPU, and what each should cost."""

from math import ceil

from moecache.kernels.fused_moe.space import quantiles
from moecache.kernels.matrix import DTYPES
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, Value, pow2


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config worth trying, the lowest predicted time first; those that do not fit are left out by the op."""
    rows, found = problem.tokens / problem.experts, every(problem, device)
    near = [c for c in found if c["block"] <= max(16, 4 * pow2(ceil(rows))) and c["block"] * 16 >= min(rows, 1024)]
    return sorted(dict.fromkeys(near or found), key=lambda c: cost(problem, c, device))


def every(problem: Problem, device: Device) -> list[Config]:
    """The configs of all problems that differ from this one in tokens and routing alone."""
    extra: dict[str, Value] = {"launch_pdl": 1} if device.vendor == "nvidia" else {}
    if device.xcds > 1:
        extra["xcds"] = device.xcds
    tma = int(device.vendor == "nvidia" and not problem.dim("unaligned"))

    def one(variant: str, block: int, n: int, k: int, stages: int, warps: int, group: int, **more: Value) -> Config:
        # a large ring that starts early starves the launch before it
        knobs = {} if variant == "ring" and block >= 64 else extra
        return config(variant, knobs, block=block, n=n, k=k, stages=stages, warps=warps, group=group, **more)

    if problem.dtype == "fp32":
        return [one("tile", 16, 32, 32, 2, 4, 1, tma=0)]
    if device.vendor == "amd":
        found = [one("tile", block, n, k, 2, warps, group)
                 for block, n, k, warps in ((16, 64, 128, 4), (32, 64, 64, 4), (64, 128, 64, 4), (128, 128, 64, 8),
                                            (128, 128, 32, 8))
                 for group in (1, 8)]  # fmt: skip
    else:
        found = []
        if problem.dim("unaligned") or problem.dim("hidden") % 16:  # rows are read one value at a time
            found += [one("tile", 64, n, 64, 3, 8, group, tma=0) for n in (64, 128) for group in (1, 8)]
        found += [
            one("tile", 16, n, k, stages, 4, 1, tma=tma, swap=1)
            for n, k, stages in ((64, 128, 4), (64, 64, 5), (128, 64, 5))
        ]
        found += [one("tile", 64, 128, 64, 4, 4, group, tma=tma) for group in (1, 8)]
        found += [one("tile", 128, 256, 64, 3, 8, 8, tma=tma), one("tile", 128, 128, 64, 3, 4, 8, tma=tma)]
        found += [
            one("ring", 16, n, k, stages, 4, 1, tma=1, swap=1, programs=device.units)
            for n, k, stages in ((64, 64, 9), (128, 128, 3))
        ]
        found += [one("ring", 64, 64, 64, 6, 4, group, tma=1, parts=2, programs=device.units) for group in (1, 8)]
        found += [one("ring", 64, 128, 64, 5, 4, group, tma=1, parts=2, programs=device.units) for group in (1, 8, 16)]
        found += [one("ring", 128, 128, 64, 4, 8, group, tma=1, programs=device.units) for group in (1, 8, 16)]
        found += [one("ring", 256, 64, 64, 4, 4, group, tma=1, parts=2, programs=device.units) for group in (1, 8)]
    return found


def cost(problem: Problem, c: Config, device: Device) -> float:
    """µs: the larger of bytes and operations, with what padding adds."""
    k, n, size = problem.dim("hidden"), problem.dim("intermediate"), DTYPES[problem.dtype].itemsize
    rows = problem.tokens / problem.experts
    active = problem.experts * min(1.0, rows)
    block, mean = c["block"], max(1.0, rows)
    each = quantiles(mean, 1 / mean)
    tiles = active * sum(ceil(count / block) for count in each) / len(each)
    moved = (active * n * k + problem.tokens * (n + k)) * size / ((device.bandwidth_gbs or 1000) * 1e3)
    peak = (dict(device.peak_tflops).get("bf16") or 100.0) * 1e6
    good = 0.7
    if c.variant == "ring":  # the lower tile in turns hides its ends, which counts where products are short
        good = 0.95 if block == 128 else 0.92 if block < 128 and k < 1024 else 0.82
        good *= 1.0 if c["group"] == 8 else 0.98
    rate = peak * good * min(1.0, block / 64) ** 0.8 * (1.0 if block > 128 else min(1.0, c["n"] / 128) ** 0.3)
    return 2 * device.launch_us + 3 + max(moved, tiles * block * n * k * 2.0 / rate)
