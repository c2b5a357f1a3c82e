"""Calls of dispatch and combine whose results anybody can work out: every row says whose it is."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sent:
    """What one rank sends."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def sent(rank: int, tokens: int, hidden: int, experts: int, topk: int, seed: int, kind: str = "uniform") -> Sent:
    """Random tokens of a rank, the same for whoever asks; on the CPU.

    Args:
        kind: "uniform" with one id in eight −1; "one" sends all to expert 0; "rank" to the first topk experts; "none"
            has no ids but −1.
    """
    rng = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randn(tokens, hidden, generator=rng)
    weights = torch.rand(tokens, topk, generator=rng) + 0.1
    ids = torch.rand(tokens, experts, generator=rng).topk(topk, 1).indices
    if kind == "uniform":
        ids = torch.where(torch.rand(tokens, topk, generator=rng) < 0.125, -1, ids)
    elif kind == "one":
        ids = torch.full_like(ids, -1)
        ids[:, 0] = 0
    elif kind == "rank":
        ids = torch.arange(topk).expand(tokens, topk).contiguous()
    elif kind == "none":
        ids = torch.full_like(ids, -1)
    return Sent(x, ids.int(), weights)


def wide(ids: torch.Tensor) -> torch.Tensor:
    """The ids as int64, those of nobody as numbers whose low half names an expert."""
    return torch.where(ids < 0, (1 << 32) + 1, ids.long())


def factor(expert: torch.Tensor) -> torch.Tensor:
    """What an expert multiplies with."""
    return 1 + expert.float() / 64


def worked(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums over a rank's experts in the dtype of the rows; NaN where a row has none, and is not read."""
    held = ids >= 0
    scale = torch.where(held, weights * factor(ids), 0).sum(1, keepdim=True)
    return torch.where(held.any(1, keepdim=True), rows.float() * scale, torch.nan).to(rows.dtype)


def expected(one: Sent) -> torch.Tensor:
    """The whole layer's result in float64."""
    ids, weights = one.ids.long(), one.weights.double()
    scale = torch.where(ids >= 0, weights * factor(ids).double(), 0).sum(1, keepdim=True)
    return one.x.double() * scale


def of_rank(ids: torch.Tensor, held: range) -> torch.Tensor:
    """Ids as the rank that holds these experts gets them."""
    return torch.where((ids >= held.start) & (ids < held.stop), ids, -1).int()
