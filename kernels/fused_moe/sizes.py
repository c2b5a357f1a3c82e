"""How a layer's tensors lie in memory where a problem does not say: strides and bytes, on which machine code depends.

As `inputs` makes them: rows one after the other, ids int32, router weights float32, biases in the dtype of the tokens.
A call whose tensors are otherwise may ask for kernels of its own, which its first launch compiles.
"""

from dataclasses import dataclass
from math import ceil

import torch

from moecache.kernels import activations
from moecache.kernels.matrix import DTYPES, gap, until_summed
from moecache.kernels.sort.op import capacity
from moecache.schemas.problem import Problem


def behind(problem: Problem) -> int:
    """Elements behind each row of the tokens and weights of a layer."""
    hidden, dtype = problem.dim("hidden"), DTYPES[problem.dtype]
    weights = torch.float8_e4m3fn if problem.dim("quant", "") else dtype
    return gap(problem, (hidden, dtype), (hidden, weights), (problem.dim("intermediate"), weights))


@dataclass(frozen=True)
class Matrix:
    """One tensor of rows: how many, elements from one to the next, bytes of an element."""

    rows: int
    row: int
    size: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.row * self.size


class Layer:
    """The tensors of a layer with so many rows in a block of its sort: tokens, between the products, pairs, weights."""

    def __init__(self, problem: Problem, block: int) -> None:
        after, size = behind(problem), DTYPES[problem.dtype].itemsize
        self.hidden, self.middle = problem.dim("hidden"), problem.dim("intermediate")
        each = 1 if problem.dim("quant", "") else size
        pairs = problem.tokens * problem.topk
        self.high = activations.panels(activations.word_of(problem)) * self.middle
        self.sorted = capacity(pairs, problem.dim("global", problem.experts), block) if block else pairs
        self.x = Matrix(problem.tokens, self.hidden + after, size)
        self.h = Matrix(self.sorted, self.middle, size)
        self.pairs = Matrix(pairs, self.hidden, until_summed(DTYPES[problem.dtype]).itemsize)
        self.out = Matrix(problem.tokens, self.hidden, size)
        self.w1 = Matrix(problem.experts * self.high, self.hidden + after, each)
        self.w2 = Matrix(problem.experts * self.hidden, self.middle + after, each)

    def first(self, panel: int = 16) -> dict[str, int]:
        """Sizes and strides that the first product is given, by the names that all of its kernels have for them."""
        row = self.w1.row
        return {"N": self.middle, "K": self.hidden, "a_row": self.x.row, "x_row": self.x.row, "out_row": self.middle,
                "rows": self.high, "w_rows": self.high, "w_row": row,
                "second": self.middle if self.high > self.middle else panel,
                "w_expert": self.high * row}  # fmt: skip

    def second(self, panel: int = 16) -> dict[str, int]:
        """Likewise of the second product."""
        row = self.w2.row
        return {"N": self.hidden, "K": self.middle, "a_row": self.middle, "h_row": self.middle, "out_row": self.hidden,
                "rows": self.hidden, "w_rows": self.hidden, "second": panel, "w_row": row,
                "w_expert": self.hidden * row}  # fmt: skip


def padded(columns: int, to: int) -> int:
    return ceil(columns / to) * to
