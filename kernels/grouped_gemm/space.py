"""Which configs of the grouped GEMM are worth trying on a GPU, and what work each makes."""

from math import ceil

from moecache.kernels.gemm.work import tile_of
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, Value, pow2


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config worth trying; those that do not fit are left out by the op."""
    rows, found = problem.tokens / problem.experts, every(problem, device)
    near = [c for c in found if c["block"] <= max(16, 4 * pow2(ceil(rows))) and c["block"] * 16 >= min(rows, 1024)]
    return near or found


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


def work(problem: Problem, c: Config, device: Device) -> Work:
    """One product."""
    return Work(tile_of(c, c.variant), early=bool(dict(c.extra).get("launch_pdl")))
