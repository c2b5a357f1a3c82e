"""The Triton variants of the grouped GEMM: one launch lays the blocks out, one multiplies.

`tile` runs on any GPU, `ring` is Hopper's warp-specialised kernel; both are those of the fused MoE's second product.
"""

from math import ceil
from types import SimpleNamespace
from typing import Any

from moecache.kernels.gemm import tile as gemm
from moecache.kernels.gemm.product import BY_LIST, BY_PAIR, Product, multiply, product, unfit
from moecache.kernels.gemm.work import is_early, tile_of
from moecache.kernels.launch import Operand, Plan, Workspace, launch
from moecache.kernels.matrix import DTYPES
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem, Value, pow2

VARIANTS = ("tile", "ring")
LAID = 1024  # rows that a program of the first launch writes at a time


def fits(problem: Problem, config: Config, device: Device) -> str:
    """Why not, or ''."""
    if problem.dtype not in DTYPES:
        return f"dtype={problem.dtype}; allowed are {', '.join(DTYPES)}"
    return unfit(_product(config), device, problem.dtype, problem.dim("hidden"), 1, not problem.dim("unaligned"))


def _product(config: Config) -> Product:
    return product(config, config.variant, "-")


def plan(config: Config, call: Any, out: Operand, device: Device) -> Plan:
    """Both launches of a config for a ProductCall of operands.

    Workspace: four bytes a padded row, at most R + E · (block − 1) of them.

    Raises:
        InvalidInput: elements of a row of weights are not side by side: they are never copied.
    """
    if call.b.stride(2) != 1:
        raise InvalidInput(f"b has last stride {call.b.stride(2)}; allowed is 1")
    if not out.numel():
        return Plan()
    p, count, experts, work = _product(config), len(out), len(call.b), Workspace()
    capacity = min(count + experts * (p.block - 1), count * p.block)
    order, owners = work.take("i32", capacity), work.take("i32", ceil(capacity / p.block))
    total, tickets = work.take("i32", 4), work.take("i32", 8)
    constexprs, options = _constants(experts, p)
    args = (call.offsets, order, owners, total, tickets, count)
    rows = SimpleNamespace(
        sorted_token_ids=order, expert_ids=owners, num_tokens_post_padded=total, counts=total, tickets=tickets
    )
    source, how = BY_PAIR if call.rows is None else BY_LIST, {"bias": call.bias, "listed": call.rows}
    product = multiply(p, call.a, call.b, rows, out, pairs=count, topk=1, source=source, **how)
    return Plan((launch(gemm.lay_out, experts, args, constexprs, options), product), work.nbytes)


def _constants(experts: int, p: Product) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constexprs, launch options) of the kernel that lays out."""
    constexprs = {"E": experts, "EB": pow2(experts), "BLOCK": p.block, "BR": LAID, "PDL": bool(p.pdl)}
    return constexprs, {"num_warps": 4} | ({"launch_pdl": True} if p.pdl else {})


# --- what is tried ---


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
        small, large = ((16, 64, 128, 4), (32, 64, 64, 4)), ((64, 128, 64, 4), (128, 128, 64, 8), (128, 128, 32, 8))
        found = [one("tile", b, n, k, 2, warps, group) for b, n, k, warps in (*small, *large) for group in (1, 8)]
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
    return Work(tile_of(c, c.variant), early=is_early(c))
