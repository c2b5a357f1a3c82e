"""Which configs of the grouped GEMM are worth trying on a GPU, and what each should cost."""

from math import ceil

from moecache.kernels.fused_moe_space import Work, expected, product_us
from moecache.kernels.matrix import DTYPES
from moecache.kernels.moe_product import product
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, Value, pow2


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config worth trying, the lowest predicted time first; those that do not fit are left out by the op."""
    extra: dict[str, Value] = {"launch_pdl": 1} if device.vendor == "nvidia" else {}
    if device.xcds > 1:
        extra["xcds"] = device.xcds
    rows, tma = problem.tokens / problem.experts, int(device.vendor == "nvidia" and not problem.dim("unaligned"))

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
        found = [
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
    near = [c for c in found if c["block"] <= max(16, 4 * pow2(ceil(rows))) and c["block"] * 16 >= min(rows, 1024)]
    return sorted(dict.fromkeys(near or found), key=lambda c: cost(problem, c, device))


def cost(problem: Problem, c: Config, device: Device) -> float:
    """µs: two launches, and what a layer's product of this shape costs."""
    columns = problem.dim("intermediate")
    load = expected(problem.tokens, problem.experts, 1, 0, problem.routing)
    work = Work(load, problem.tokens, columns, problem.dim("hidden"), columns, DTYPES[problem.dtype].itemsize)
    return 2 * device.launch_us + 3 + product_us(product(c, c.variant, "-"), work, device)
