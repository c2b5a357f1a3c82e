"""One MoE layer and one call of it: weights, routing, the float32 reference, and the bytes and FLOPs that it needs."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from moecache import routing

SHAPES = {  # experts, top-k, hidden, intermediate, as one GPU sees them
    "qwen3_30b_a3b": (128, 8, 2048, 768),
    "dsv3_tp8": (256, 8, 7168, 256),
    "gptoss_120b": (128, 4, 2880, 2880),
    "mixtral_8x7b": (8, 2, 4096, 14336),
}
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
CHECKED = 192  # tokens that are compared with the reference
GROUP, FP8_MAX = 128, 448.0  # of fp8 weights in 128x128 blocks and activations in groups of 128 columns
TOLERANCE = {"bf16": 1e-2, "fp8_block": 5e-2}


@dataclass(frozen=True)
class Weights:
    """w1 [E, 2N, K] (gate rows, then up) and w2 [E, K, N], bf16 or fp8 e4m3 with float32 scales of 128x128 blocks."""

    shape: str
    w1: torch.Tensor
    w2: torch.Tensor
    w1_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # other forms, made by hooks

    @property
    def dtype(self) -> str:
        return "bf16" if self.w1_scale is None else "fp8_block"

    @property
    def bytes_of_expert(self) -> int:
        """Both matrices of one expert with their scales."""
        parts = (self.w1, self.w2, self.w1_scale, self.w2_scale)
        return sum(t[0].numel() * t.element_size() for t in parts if t is not None)

    def dense(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both matrices of an expert in float32."""
        if self.w1_scale is None or self.w2_scale is None:
            return self.w1[expert].float(), self.w2[expert].float()
        return (
            self.w1[expert].float() * _spread(self.w1_scale[expert], self.w1[expert]),
            self.w2[expert].float() * _spread(self.w2_scale[expert], self.w2[expert]),
        )


def weights(name: str, device: str, *, fp8: bool = False, shape: tuple[int, int, int, int] | None = None) -> Weights:
    """Random weights of a shape; activations keep their size through them."""
    experts, _, hidden, inner = shape or SHAPES[name]
    rng = torch.Generator(device).manual_seed(1)
    if not fp8:
        w1, w2 = (torch.empty(experts, *size, device=device, dtype=torch.bfloat16) for size in _sizes(hidden, inner))
        w1.normal_(generator=rng).mul_(hidden**-0.5)
        w2.normal_(generator=rng).mul_(inner**-0.5)
        return Weights(name, w1, w2)
    parts: list[torch.Tensor] = []
    for (rows, columns), size in zip(_sizes(hidden, inner), (hidden, inner), strict=True):
        pairs = [
            _quantised(torch.randn(rows, columns, device=device, generator=rng) * size**-0.5) for _ in range(experts)
        ]
        parts += [torch.stack(each) for each in zip(*pairs, strict=True)]
    return Weights(name, parts[0], parts[2], parts[1], parts[3])


def _sizes(hidden: int, inner: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (2 * inner, hidden), (hidden, inner)


def _quantised(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 of a float32 matrix and the scales of its 128x128 blocks."""
    rows, columns = (-(-size // GROUP) for size in w.shape)
    padded = torch.zeros(rows * GROUP, columns * GROUP, device=w.device)
    padded[: w.shape[0], : w.shape[1]] = w
    most = padded.view(rows, GROUP, columns, GROUP).abs().amax((1, 3))
    scale = most.clamp_min(1e-10) / FP8_MAX
    return (w / _spread(scale, w)).to(torch.float8_e4m3fn), scale


def _spread(scale: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The scale of every element of a matrix, from those of its blocks."""
    wide = scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    return wide[: w.shape[0], : w.shape[1]]


def _through_fp8(x: torch.Tensor) -> torch.Tensor:
    """float32 rows as fp8 holds them, with one scale for 128 columns."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % GROUP)).view(rows, -1, GROUP)
    scale = padded.abs().amax(-1, keepdim=True).clamp_min(1e-10) / FP8_MAX
    return ((padded / scale).to(torch.float8_e4m3fn).float() * scale).view(rows, -1)[:, :columns]


@dataclass(frozen=True)
class Case:
    """One call: x [T, K] bf16, ids [T, topk] int32, wts [T, topk] float32, and the weights.

    The short names are those of the field; peers brought by a hook read them.
    """

    weights: Weights
    generator: str  # of the routing
    x: torch.Tensor
    ids: torch.Tensor
    wts: torch.Tensor

    w1 = property(lambda self: self.weights.w1)
    w2 = property(lambda self: self.weights.w2)
    E = property(lambda self: self.weights.w1.shape[0])
    K = property(lambda self: self.weights.w1.shape[2])
    N = property(lambda self: self.weights.w2.shape[2])
    T = property(lambda self: self.x.shape[0])
    topk = property(lambda self: self.ids.shape[1])
    P = property(lambda self: self.ids.numel())

    @cached_property
    def counts(self) -> torch.Tensor:
        """[E] pairs of each expert."""
        return torch.bincount(self.ids.flatten().long(), minlength=self.E)

    @property
    def flops(self) -> int:
        return 2 * self.P * 3 * self.N * self.K

    @property
    def bytes(self) -> int:
        """Weights of the active experts, x and the output once, the activated rows written and read once."""
        inner = 2 * self.P * self.N * self.w2.element_size()
        return int((self.counts > 0).sum()) * self.weights.bytes_of_expert + 4 * self.T * self.K + inner

    @cached_property
    def checked(self) -> torch.Tensor:
        """The tokens that are compared: the first, the last and some between."""
        some = torch.randperm(self.T, generator=torch.Generator().manual_seed(5))[:CHECKED].tolist()
        return torch.tensor(sorted({*some, 0, self.T - 1}), device=self.x.device)

    @cached_property
    def reference(self) -> torch.Tensor:
        """[checked, K] float32. With fp8 weights, activations go through fp8 too, as every implementation's do."""
        x, ids, wts = self.x[self.checked].float(), self.ids[self.checked].long(), self.wts[self.checked]
        fp8 = self.weights.dtype != "bf16"
        x = _through_fp8(x) if fp8 else x
        out = torch.zeros(len(x), self.K, device=x.device)
        for expert in ids.unique().tolist():
            row, slot = (ids == expert).nonzero(as_tuple=True)
            w1, w2 = self.weights.dense(expert)
            gate, up = (x[row] @ w1.T).split(self.N, dim=1)
            inner = torch.nn.functional.silu(gate) * up
            inner = _through_fp8(inner.to(self.x.dtype).float()) if fp8 else inner
            out.index_add_(0, row, (inner @ w2.T) * wts[row, slot, None])
        return out

    def error(self, out: torch.Tensor) -> float:
        """Relative error of a result [T, K] over the checked tokens."""
        found = out.view(self.T, self.K)[self.checked].float()
        return float((found - self.reference).norm() / self.reference.norm())


def case(weights: Weights, generator: str, tokens: int, topk: int) -> Case:
    """A call with fresh activations and a draw of `moecache.routing`."""
    experts, _, hidden = weights.w1.shape
    device = weights.w1.device
    rng = torch.Generator(device).manual_seed(1000 + tokens)
    x = torch.randn(tokens, hidden, device=device, generator=rng).to(torch.bfloat16)
    ids = routing.draw(generator, tokens, experts, topk).to(device)
    wts = torch.randn(tokens, topk, device=device, generator=rng).softmax(-1)
    return Case(weights, generator, x, ids, wts)
