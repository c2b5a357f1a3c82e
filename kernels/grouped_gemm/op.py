"""Grouped GEMM: rows sorted by expert, each group times its expert's matrix. The op, its launch and its checks.

The CPU's variants stand in grouped_gemm/cpu.py, the Triton ones in grouped_gemm/gpu.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moecache.kernels.agreed import REUSE
from moecache.kernels.built_in import BuiltIn
from moecache.kernels.contract import EXTREME
from moecache.kernels.grouped_gemm import cpu as grouped_gemm_torch
from moecache.kernels.launch import rows_of
from moecache.kernels.matrix import (
    DTYPE_NAMES,
    DTYPES,
    ID_DTYPES,
    MAX_EXPERTS,
    TOLERANCE,
    gap,
    random_rows,
    relative_error,
    sensible_on_cpu,
    unaligned,
    unaligned_sizes,
)
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem, token_bucket


@dataclass(slots=True, eq=False)
class ProductCall:
    """The arguments of `moecache.grouped_gemm`; in a plan each tensor is an Operand."""

    a: torch.Tensor
    b: torch.Tensor
    offsets: torch.Tensor
    rows: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def product_rows(call: ProductCall) -> int:
    """R, the rows of the product."""
    rows = call.rows
    return int(call.a.shape[0] if rows is None else rows.shape[0])


def check(call: ProductCall) -> None:
    """Raise InvalidInput for arguments that no kernel may see. About a microsecond: every call pays it.

    The values of `offsets` and `rows` are on the device: they are not read.
    """
    a, b, offsets, rows, bias = call.a, call.b, call.offsets, call.rows, call.bias
    dtype, shape, matrix = a.dtype, a.shape, b.shape
    if len(shape) != 2 or dtype not in DTYPE_NAMES or not shape[1]:
        raise InvalidInput(f"a is {dtype} {list(shape)}; allowed is [rows, hidden] of {', '.join(DTYPES)}")
    if len(matrix) != 3 or matrix[2] != shape[1] or b.dtype != dtype or not matrix[1]:
        raise InvalidInput(f"b is {b.dtype} {list(matrix)}; allowed is {dtype} [experts, columns, {shape[1]}]")
    if not 1 <= matrix[0] <= MAX_EXPERTS:
        raise InvalidInput(f"b has {matrix[0]} experts; allowed are 1 to {MAX_EXPERTS}")
    if offsets.shape != (matrix[0] + 1,) or offsets.dtype not in ID_DTYPES:
        raise InvalidInput(
            f"offsets is {offsets.dtype} {list(offsets.shape)}; allowed is int32 or int64 [{matrix[0] + 1}]"
        )
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int32):
        raise InvalidInput(f"rows is {rows.dtype} {list(rows.shape)}; allowed is int32 [R]")
    if bias is not None and (bias.shape != matrix[:2] or bias.dtype not in DTYPE_NAMES):
        raise InvalidInput(
            f"bias is {bias.dtype} {list(bias.shape)}; allowed is {list(matrix[:2])} of {', '.join(DTYPES)}"
        )
    home = a.device
    if not b.device == offsets.device == home or any(t is not None and t.device != home for t in (rows, bias)):
        raise InvalidInput(f"a is on {home}; b, offsets, rows and bias must be there too")


class GroupedGemm(BuiltIn):
    """The op `grouped_gemm`."""

    name = "grouped_gemm"
    cpu, bodies = grouped_gemm_torch, ("grouped_gemm.gpu",)

    def problem(self, call: ProductCall, device: Device, routing: str) -> Problem:
        """The tuning question that a call asks; its tokens are the rows of the product."""
        a, (experts, columns, hidden) = call.a, call.b.shape
        dims = {"hidden": hidden, "intermediate": columns}
        dims |= {"gathered": 1} if call.rows is not None else {}
        dims |= {"biased": 1} if call.bias is not None else {}
        dims |= {"unaligned": 1} if unaligned(a, call.b) else {}
        return self.question(device, product_rows(call), experts, 1, DTYPE_NAMES[a.dtype], routing, dims)

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        """Both products of a layer, the first one gathered, for tokens · top-k rows spread over its experts."""
        if self.lacks(layer):
            return []
        dtype, found = DTYPES[layer.dtype], {}
        for first in (True, False):
            hidden = layer.hidden if first else layer.intermediate
            columns = (1 + layer.gated) * layer.intermediate if first else layer.hidden
            dims = {"hidden": hidden, "intermediate": columns}
            dims |= {"gathered": 1} if first else {}
            dims |= {"unaligned": 1} if unaligned_sizes(hidden, dtype) else {}
            for count in tokens:
                rows = token_bucket(-(-count * layer.topk * layer.experts // layer.global_experts))
                weights = (2 + layer.gated) * layer.experts * layer.hidden * layer.intermediate
                if device.vendor != "cpu" or sensible_on_cpu(weights * dtype.itemsize, 2.0 * hidden * columns * rows):
                    problem = self.question(device, rows, layer.experts, 1, layer.dtype, "", dims)
                    found[problem.key] = problem
        return list(found.values())

    def lacks(self, layer: Layer) -> str:
        """Why no kernel multiplies the rows of such a layer; '' where one does."""
        if layer.dtype not in DTYPES:
            return f"there are no kernels for {layer.dtype} weights; dtype bf16 tunes the products in bf16"
        return f"at most {MAX_EXPERTS} experts are allowed" if layer.experts > MAX_EXPERTS else ""

    def choices(self, call: ProductCall) -> torch.Tensor:
        """Expert of every row [R, 1], −1 for rows that belong to none."""
        return grouped_gemm_torch.row_experts(call)

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> ProductCall:
        """Random operands with the group sizes of the given routing; what names no expert becomes rows of none."""
        rng = torch.Generator(topk_ids.device).manual_seed(seed)
        experts, hidden, columns = problem.experts, problem.dim("hidden"), problem.dim("intermediate")
        dtype = DTYPES[problem.dtype]
        behind = gap(problem, (hidden, dtype))
        chosen, count = topk_ids.reshape(-1).to(torch.int64), topk_ids.numel()
        chosen = chosen[(chosen >= 0) & (chosen < experts)]
        offsets = torch.zeros(experts + 1, dtype=torch.int32, device=rng.device)
        offsets[1:] = torch.bincount(chosen, minlength=experts).cumsum(0)
        rows, height = None, count
        if problem.dim("gathered"):
            height = max(1, count // REUSE)
            rows = torch.randint(height, (count,), generator=rng, device=rng.device, dtype=torch.int32)
        bias = random_rows((experts, columns), dtype, 0.5, rng) if problem.dim("biased") else None
        a = random_rows((height, hidden), dtype, 1.0, rng, behind)
        b = random_rows((experts, columns, hidden), dtype, hidden**-0.5, rng, behind)
        if seed == EXTREME:
            _stretch(a, b, bias)
        return ProductCall(a, b, offsets, rows, bias)

    def outputs(self, call: ProductCall) -> torch.Tensor:
        """Uninitialised [R, N]."""
        a = call.a
        return torch.empty(product_rows(call), call.b.shape[1], dtype=a.dtype, device=a.device)

    def reference(self, call: ProductCall) -> torch.Tensor:
        """The torch result in float32 (float64 for float32 inputs); NaN in rows that belong to no expert."""
        return grouped_gemm_torch.reference(call)

    def error(self, got: torch.Tensor, want: torch.Tensor) -> float:
        """Relative Frobenius error over the rows that belong to an expert; inf for non-finite values there."""
        if got.shape != want.shape:
            return float("inf")
        rest = want.isnan()
        return relative_error(got.masked_fill(rest, 0), want.masked_fill(rest, 0))

    def tolerance(self, problem: Problem) -> float:
        return TOLERANCE[problem.dtype]

    def operands(self, problem: Problem) -> tuple[Any, Any]:
        """A call and its output as Operands: as `inputs` makes them."""
        count, experts, dtype = problem.tokens, problem.experts, problem.dtype
        hidden, columns, gathered = problem.dim("hidden"), problem.dim("intermediate"), problem.dim("gathered")
        behind = gap(problem, (hidden, DTYPES[dtype]))
        of: Any = rows_of  # stands where a tensor stands in a call
        call = ProductCall(
            of("a", dtype, max(1, count // REUSE) if gathered else count, hidden, behind=behind),
            of("b", dtype, experts, columns, hidden, behind=behind),
            of("offsets", "i32", experts + 1),
            of("rows", "i32", count) if gathered else None,
            of("bias", dtype, experts, columns) if problem.dim("biased") else None,
        )
        return call, of("out", dtype, count, columns)

    def side_by_side(self, call: ProductCall) -> ProductCall:
        """As kernels read it: elements of a row of `a` side by side, small tensors contiguous."""
        a = call.a if call.a.stride(1) == 1 else call.a.contiguous()
        rows, bias = (None if tensor is None else tensor.contiguous() for tensor in (call.rows, call.bias))
        return ProductCall(a, call.b, call.offsets.contiguous(), rows, bias)


GROUPED_GEMM = GroupedGemm()


def _stretch(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Make products that float16 does not hold; where it is the dtype, ones that the bias brings back, or whose second
    half of columns takes back what the first half gives."""
    depth = a.shape[1]
    if bias is not None and a.dtype == torch.float16:  # 8e4 − 6e4
        a.mul_(0.05).add_(1).mul_(16)
        b.mul_(0.05 * depth**0.5).add_(1).mul_(5e3 / depth)
        bias.mul_(1e3).sub_(6e4)
        return
    half = depth // 2
    a.mul_(64)
    b.mul_(2.0**11.5)
    if a.dtype == torch.float16:
        b[..., half:].mul_(1 / 128)
        a[:, half : 2 * half] = a[:, :half]
        b[..., half : 2 * half] -= b[..., :half]
