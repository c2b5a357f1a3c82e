"""Both products of MoE layers alone: `moecache.grouped_gemm` beside torch's grouped product and one dense product.

    python benchmarks/grouped_gemm.py [--shapes qwen3_30b_a3b] [--tokens 1024 4096] [--routing uniform zipf] [--merge]

`up` is [T · topk, K] x [2N, K] with the rows gathered from [T, K] (torch gets them gathered already), `down` is
[T · topk, N] x [K, N]. Rows are sorted by expert beforehand. Timing, checks and limit are those of fused_moe.py.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import moe_grid
import moe_peers
import torch
from moe_case import CHECKED, Case
from moe_clock import dense
from moe_sheet import summarise

import moecache

TOKENS = (1024, 2048, 4096, 8192, 16384)
KEYS = ("shape", "gemm", "T", "routing", "dtype")


@dataclass(frozen=True)
class Product:
    """a [M, K] times w [E, N, K] transposed, by expert; row r of the product is from a[rows[r]], or a[r]."""

    gemm: str
    a: torch.Tensor
    w: torch.Tensor
    offsets: torch.Tensor
    rows: torch.Tensor | None

    @property
    def count(self) -> int:
        return len(self.a if self.rows is None else self.rows)

    @property
    def flops(self) -> int:
        return 2 * self.count * self.w.shape[1] * self.w.shape[2]

    @property
    def bytes(self) -> int:
        """Matrices of the active experts, the rows and the product, each once."""
        active = int((self.offsets.diff() > 0).sum())
        return 2 * (active * self.w[0].numel() + self.a.numel() + self.count * self.w.shape[1])

    def calls(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Ours and torch's."""
        out = self.a.new_empty(self.count, self.w.shape[1])
        layer, gathered, ends = ("benchmark", next(moe_grid.LAYERS)), self.gathered, self.offsets[1:]
        return {
            "ours": lambda: moecache.grouped_gemm(self.a, self.w, self.offsets, rows=self.rows, out=out, layer=layer),
            "torch": lambda: moe_peers.grouped_mm(gathered, self.w, ends),
        }

    @cached_property
    def gathered(self) -> torch.Tensor:
        """[M, K] the rows that are multiplied, in their order."""
        return self.a if self.rows is None else self.a[self.rows]

    def error(self, got: torch.Tensor) -> float:
        """Relative error over some rows, against float32."""
        some = torch.linspace(0, self.count - 1, min(self.count, CHECKED), device=self.a.device).long()
        expert = torch.searchsorted(self.offsets[1:].contiguous(), some, right=True)
        a = self.gathered[some].float()
        want = torch.empty(len(some), self.w.shape[1], device=a.device)
        for e in expert.unique().tolist():
            want[expert == e] = a[expert == e] @ self.w[e].float().T
        return float((got[some].float() - want).norm() / want.norm())


def products(given: Case) -> list[Product]:
    """Both products of a layer."""
    order = moe_peers.sort_of(given)()
    rows = (order.sorted_token_ids // given.topk).to(torch.int32)
    inner = torch.randn(given.P, given.N, device=given.x.device).to(given.x.dtype)
    return [
        Product("up", given.x, given.w1, order.expert_offsets, rows),
        Product("down", inner, given.w2, order.expert_offsets, None),
    ]


def cell(grid: moe_grid.Grid, case: Case, product: Product) -> Path:
    """Measure one product and write it."""
    calls = {name: call for name, call in product.calls().items() if name not in grid.options.skip}
    label = f"{case.weights.shape} {product.gemm} T={case.T} {case.generator}"
    one = dense(product.gathered, product.w[0], case.x.dtype)
    found = grid.compare(label, calls, product.error, one, product.bytes)
    facts = {
        "shape": case.weights.shape, "gemm": product.gemm, "E": case.E, "topk": case.topk, "T": case.T,
        "routing": case.generator, "dtype": "bf16", "M": product.count, "N": product.w.shape[1],
        "K": product.w.shape[2],
    }  # fmt: skip
    rate = {name: us and round(product.flops / us / 1e6, 1) for name, us in found["us"].items()}
    return grid.keep(facts | found | {"tflops": rate})


def main(arguments: Sequence[str] | None = None) -> None:
    options = moe_grid.parse(moe_grid.parser(__doc__, TOKENS), arguments)
    grid, where = moe_grid.Grid(options, "grouped_gemm", "grouped_gemm", KEYS, "bf16"), None
    with grid.tuning():
        for case in grid.cases():
            for product in products(case):
                where = cell(grid, case, product)
            del case, product  # the next shape's weights come when these are gone
    if where:
        print(json.dumps(summarise(grid.sheet.rows), indent=1), where, sep="\n")


if __name__ == "__main__":
    main()
