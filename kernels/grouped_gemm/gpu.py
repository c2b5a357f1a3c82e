"""The Triton variants of the grouped GEMM: one launch lays the blocks out, one multiplies.

`tile` runs on any GPU, `ring` is Hopper's warp-specialised kernel; both are those of the fused MoE's second product.
"""

from math import ceil
from types import SimpleNamespace
from typing import Any

import torch

from moecache.kernels.agreed import REUSE
from moecache.kernels.contract import Args, Source
from moecache.kernels.gemm import tile as gemm
from moecache.kernels.gemm.product import BY_LIST, BY_PAIR, Product, multiply, product, source, unfit
from moecache.kernels.matrix import DTYPES, gap
from moecache.kernels.signatures import signature_of
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem, pow2

VARIANTS = ("tile", "ring")
LAID = 1024  # rows that a program of the first launch writes at a time


def fits(problem: Problem, config: Config, device: Device) -> str:
    """Why not, or ''."""
    if config.variant not in VARIANTS:
        return f"variant {config.variant!r} does not exist; allowed are {', '.join(VARIANTS)}"
    if problem.dtype not in DTYPES:
        return f"dtype={problem.dtype}; allowed are {', '.join(DTYPES)}"
    return unfit(_product(config), device, problem.dtype, problem.dim("hidden"), 1, not problem.dim("unaligned"))


def _product(config: Config) -> Product:
    return product(config, config.variant, "-")


def launch(config: Config, args: Args, out: torch.Tensor) -> torch.Tensor:
    """Run one candidate into `out`. Workspace: four bytes a padded row, at most R + E · (block − 1) of them.

    Raises:
        InvalidInput: elements of a row of weights are not side by side.
    """
    a, b, offsets, listed = args["a"], args["b"], args["offsets"], args["rows"]
    if not out.numel():
        return out
    if b.stride(2) != 1:
        raise InvalidInput(f"b has last stride {b.stride(2)}; allowed is 1")
    p, count, experts = _product(config), len(out), len(b)
    capacity = min(count + experts * (p.block - 1), count * p.block)
    blocks = ceil(capacity / p.block)
    at, last = (ceil(size / 4) * 4 for size in (capacity, blocks))  # on 16 bytes: one compiled kernel for all sizes
    whole = torch.empty(at + last + 12, dtype=torch.int32, device=a.device)
    order, owners, total, tickets = (
        whole[:capacity],
        whole[at : at + blocks],
        whole[at + last :],
        whole[at + last + 4 :],
    )
    constexprs, options = _constants(experts, p)
    gemm.lay_out[(experts,)](offsets, order, owners, total, tickets, count, **constexprs, **options)
    rows = SimpleNamespace(
        sorted_token_ids=order,
        expert_ids=owners,
        num_tokens_post_padded=total,
        counts=total,
        tickets=tickets.view(2, 4),
    )
    bias = None if args["bias"] is None else args["bias"].contiguous()
    multiply(p, a if a.stride(1) == 1 else a.contiguous(), b, rows, out, pairs=count, topk=1,
             source=BY_PAIR if listed is None else BY_LIST, bias=bias, listed=listed)  # fmt: skip
    return out


def sources(problem: Problem, config: Config, device: Device) -> list[Source]:
    """The kernel that multiplies, with the types and constants of this problem."""
    gathered, dtype, p = bool(problem.dim("gathered")), DTYPES[problem.dtype], _product(config)
    hidden, columns = problem.dim("hidden"), problem.dim("intermediate")
    row = hidden + gap(problem, (hidden, dtype))
    height = max(1, problem.tokens // REUSE) if gathered else problem.tokens
    values = {"N": columns, "K": hidden, "a_row": row, "out_row": columns, "rows": columns, "second": p.n, "w_row": row,
              "w_expert": columns * row}  # fmt: skip
    held = dict.fromkeys(("A", "AT"), height * row * dtype.itemsize)
    held |= {"W": problem.experts * columns * row * dtype.itemsize, "OUT": problem.tokens * columns * dtype.itemsize}
    return [
        source(
            p, problem.dtype, hidden, topk=1, source=BY_LIST if gathered else BY_PAIR,
            biased=bool(problem.dim("biased")), values=values, held=held,
        ),
    ]  # fmt: skip


def _constants(experts: int, p: Product) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constexprs, launch options) of the kernel that lays out."""
    constexprs = {"E": experts, "EB": pow2(experts), "BLOCK": p.block, "BR": LAID, "PDL": bool(p.pdl)}
    return constexprs, {"num_warps": 4} | ({"launch_pdl": True} if p.pdl else {})


def laying_out(problem: Problem, config: Config) -> Source:
    """The kernel that lays out."""
    constexprs, options = _constants(problem.experts, _product(config))
    signature = signature_of(gemm.lay_out, constexprs, {})
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return Source(gemm.lay_out, signature, constexprs, options, aligned=aligned)
