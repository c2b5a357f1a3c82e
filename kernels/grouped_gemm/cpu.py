"""Grouped GEMM in plain torch: the reference, and the CPU's candidates with their search space, limits and costs."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from moecache.kernels.matrix import DTYPES, MATH, grouped_mm, math_of, missing_grouped_mm, unfit_math, until_summed
from moecache.kernels.own_mode import computing, own_mode
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem

ROWS = 8192  # rows that the reference computes at a time: one expert may have all of them


def row_experts(args: Any) -> torch.Tensor:
    """Expert of every row of the product [R, 1] int64, −1 for rows that belong to none. Does not synchronise."""
    offsets, gather = args.offsets, args.rows
    count = args.a.shape[0] if gather is None else gather.shape[0]
    row = torch.arange(count, device=offsets.device)
    expert = torch.searchsorted(offsets[1:].to(torch.int64).contiguous(), row, right=True)
    none = (row < offsets[0]) | (expert >= offsets.numel() - 1)
    return torch.where(none, -1, expert)[:, None]


def _gathered(args: Any, first: int, last: int) -> torch.Tensor:
    gather = args.rows
    return args.a[first:last] if gather is None else args.a[gather[first:last].to(torch.int64)]


@own_mode()
def reference(args: Any) -> torch.Tensor:
    """[R, N] in float32, in float64 for float32 inputs; NaN in rows that belong to no expert."""
    a, b, bias = args.a, args.b, args.bias
    wide = torch.float64 if a.dtype == torch.float32 else torch.float32
    count = a.shape[0] if args.rows is None else args.rows.shape[0]
    out = torch.full((count, b.shape[1]), float("nan"), dtype=wide, device=a.device)
    for expert, (first, last) in enumerate(pairwise(args.offsets.tolist())):
        for at in range(first, last, ROWS):
            end = min(last, at + ROWS)
            out[at:end] = _gathered(args, at, end).to(wide) @ b[expert].to(wide).T
            if bias is not None:
                out[at:end] += bias[expert].to(wide)
    return out


def by_expert(args: Any, out: torch.Tensor, offsets: list[int], dtype: torch.dtype) -> None:
    """One product an active expert."""
    b, bias = args.b, args.bias
    for expert, (first, last) in enumerate(pairwise(offsets)):
        if last > first:
            part = _gathered(args, first, last).to(dtype) @ b[expert].to(dtype).T
            out[first:last] = part if bias is None else part.float() + bias[expert].float()


def grouped(args: Any, out: torch.Tensor, offsets: list[int]) -> None:
    """One of torch's grouped products over all experts."""
    first, last = offsets[0], offsets[-1]
    if last <= first:
        return
    ends, dtype = torch.tensor(offsets[1:], device=out.device) - first, until_summed(out.dtype)
    part = grouped_mm(_gathered(args, first, last).to(dtype), args.b.to(dtype), ends)
    if args.bias is not None:
        counts = torch.tensor([b - a for a, b in pairwise(offsets)], device=out.device)
        part = part.float() + torch.repeat_interleave(args.bias.float(), counts, dim=0)
    out[first:last] = part


VARIANTS: dict[str, Callable[..., None]] = {
    "by_expert": lambda args, out, offsets, c: by_expert(args, out, offsets, math_of(c, out.dtype)),
    "grouped_mm": lambda args, out, offsets, c: grouped(args, out, offsets),
}


@computing
def launch(config: Config, args: Any, out: torch.Tensor) -> torch.Tensor:
    """One variant on the CPU."""
    VARIANTS[config.variant](args, out, args.offsets.tolist(), config)
    return out


def space(problem: Problem) -> list[Config]:
    """Every config; those that do not fit are left out by the op. The first is the default."""
    return [*(config("by_expert", math=math) for math in MATH), config("grouped_mm")]


def fits(problem: Problem, config: Config) -> str:
    """Why not, or ''."""
    if config.variant == "by_expert":
        return unfit_math(problem, config)
    if config.variant != "grouped_mm":
        return f"variant {config.variant!r} does not run on a CPU; allowed are {', '.join(VARIANTS)}"
    if problem.dim("unaligned"):
        return "grouped_mm wants rows that start on 16 bytes"
    return missing_grouped_mm(problem.dtype)


def work(problem: Problem, config: Config, device: Device) -> Work:
    """Calls of torch, weights read once, or widened first, and products in a dtype that the CPU has."""
    hidden, columns = problem.dim("hidden"), problem.dim("intermediate")
    narrow = config.variant != "by_expert" or config["math"] == "native"
    native = "bf16" if narrow and problem.dtype == "bf16" else "fp32"
    weights = hidden * columns * DTYPES[problem.dtype].itemsize * (3 if native != problem.dtype else 1)
    loop = config.variant == "by_expert"
    read = min(problem.experts, max(1, problem.tokens)) if loop else problem.experts
    flops = ((native, 2.0 * problem.tokens * hidden * columns),)
    return Work(launches=3 * read if loop else 8, nbytes=read * weights, flops=flops)
