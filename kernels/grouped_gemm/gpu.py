"""The Triton variants of the grouped GEMM: one launch lays the blocks out, one multiplies.

`tile` runs on any GPU, `ring` is Hopper's warp-specialised kernel; both are those of the fused MoE's second product.
"""

from math import ceil
from types import SimpleNamespace
from typing import Any

from moecache.kernels.gemm import tile as gemm
from moecache.kernels.gemm.product import BY_LIST, BY_PAIR, Product, multiply, product, unfit
from moecache.kernels.launch import Operand, Plan, Workspace, launch
from moecache.kernels.matrix import DTYPES
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
    product = multiply(
        p,
        call.a,
        call.b,
        rows,
        out,
        pairs=count,
        topk=1,
        source=BY_PAIR if call.rows is None else BY_LIST,
        bias=call.bias,
        listed=call.rows,
    )
    return Plan((launch(gemm.lay_out, experts, args, constexprs, options), product), work.nbytes)


def _constants(experts: int, p: Product) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constexprs, launch options) of the kernel that lays out."""
    constexprs = {"E": experts, "EB": pow2(experts), "BLOCK": p.block, "BR": LAID, "PDL": bool(p.pdl)}
    return constexprs, {"num_warps": 4} | ({"launch_pdl": True} if p.pdl else {})
