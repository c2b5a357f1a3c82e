"""A whole expert-parallel layer: dispatch, the experts of this rank, combine."""

from collections.abc import Callable
from typing import Any

import torch

from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import (
    CombineConfig,
    DispatchConfig,
    Rows,
    combine,
    default_combine,
    dequantised,
    dispatch,
)


def ep_moe(
    ctx: EpContext, x: Rows, w1: torch.Tensor, w2: torch.Tensor,
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, *, fused_moe: Callable[..., torch.Tensor],
    capacity: int | None = None, out: torch.Tensor | None = None, dispatch_config: DispatchConfig | None = None,
    combine_config: CombineConfig | None = None, exact: bool = False, **options: Any,
) -> torch.Tensor:  # fmt: skip
    """A MoE layer whose experts are spread over the ranks of a context: [T, hidden]. Never synchronises by itself.

    Args:
        ctx: the ranks' shared memory.
        x: as for `dispatch`.
        w1: weights of this rank's experts (`ctx.experts_of(ctx.rank)`), as `fused_moe` takes them.
        w2: likewise.
        topk_weights: [T, topk], any float dtype.
        topk_ids: [T, topk] int32 or int64, numbers among all experts; −1 chooses nobody.
        fused_moe: `moecache.fused_moe`, or a function with its first five parameters, `out` and `expert_map`. It must
            leave out ids of −1, and not read rows that have no other.
        capacity: as for `dispatch`.
        out: [T, hidden] to write into.
        dispatch_config: as for `dispatch`.
        combine_config: as for `combine`.
        exact: as for `dispatch`.
        options: further arguments of `fused_moe`.
    """
    got = dispatch(ctx, x, topk_ids, topk_weights, capacity=capacity, config=dispatch_config, exact=exact)
    chosen = combine_config or default_combine(ctx.hidden, got.handle.capacity)
    into = got.sums if chosen.how == "pull" else None
    # Numbers among all experts: those among the own ones would hide from the tuner that most slots are of other ranks.
    y = fused_moe(dequantised(ctx, got), w1, w2, got.weights, got.ids, out=into, expert_map=ctx.expert_map, **options)
    return combine(ctx, y, got.handle, out, config=chosen)
