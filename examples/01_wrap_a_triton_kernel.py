"""Your own Triton kernel is tuned, cached and served. The last part of this file wraps it.

TRITON_INTERPRET=1 python examples/01_wrap_a_triton_kernel.py      # without a GPU
python examples/01_wrap_a_triton_kernel.py                         # on an NVIDIA or AMD GPU
"""

import torch
import triton
import triton.language as tl

import moecache


@triton.jit
def _silu_and_mul(X, Y, width, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(X + row * 2 * width + column, mask=inside).to(tl.float32)
    up = tl.load(X + row * 2 * width + width + column, mask=inside).to(tl.float32)
    tl.store(Y + row * width + column, (gate / (1 + tl.exp(-gate)) * up).to(Y.dtype.element_ty), mask=inside)


def silu_and_mul(x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
    """The activation between the two GEMMs of an MoE layer: x [rows, 2 · width] -> [rows, width]."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grid = (rows, triton.cdiv(width, config["BLOCK"]))
    _silu_and_mul[grid](x, y, width, BLOCK=config["BLOCK"], num_warps=config["num_warps"])
    return y


# --- the wrapping ---


def reference(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


fast_silu_and_mul = moecache.wrap(
    silu_and_mul,
    op="silu_and_mul",
    configs=[{"BLOCK": block, "num_warps": warps} for block in (128, 512, 2048) for warps in (4, 8)],
    key=lambda x: {"tokens": x.shape[0], "width": x.shape[1] // 2, "dtype": x.dtype},
    reference=reference,
)


if __name__ == "__main__":
    device, rows = ("cuda", 4096) if torch.cuda.is_available() else ("cpu", 2)  # the interpreter is slow
    x = torch.randn(rows, 2 * 768, device=device)
    y = fast_silu_and_mul(x)  # the first call tunes this problem; later calls, also of later processes, do not
    assert torch.allclose(y, reference(x), rtol=1e-3, atol=1e-3)
    explanation = fast_silu_and_mul.explain(x)
    print(explanation.problem.key)
    print(f"{explanation.choice.tier}: {explanation.choice.config}, {explanation.choice.reason}")
    for timing, _ in explanation.timings:
        print(f"  {timing.config.name:40} {timing.status:8} {timing.median_us or 0:10.1f} µs  {timing.reason}")
