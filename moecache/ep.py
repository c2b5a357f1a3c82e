"""Expert parallelism: a layer whose experts are spread over ranks, and how they exchange its tokens."""

from typing import Any

import torch

from moecache.dispatch.exchange import chosen as chosen
from moecache.dispatch.exchange import tune as tune
from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import Rows
from moecache.kernels.ep.layer import ep_moe as with_configs
from moecache.ops import fused_moe


def ep_moe(
    ctx: EpContext,
    x: Rows,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    capacity: int | None = None,
    out: torch.Tensor | None = None,
    exact: bool = False,
    **options: Any,
) -> torch.Tensor:
    """A MoE layer whose experts are spread over the ranks of a context: [T, hidden]. Only `exact` synchronises a hit.

    Args:
        ctx: the ranks.
        x: [T, hidden] of the context's dtype; with the fp8 wire also (fp8, scales [T, hidden / 128] float32).
        w1: weights of this rank's experts, `ctx.experts_of(ctx.rank)`, as `fused_moe` takes them.
        w2: likewise.
        topk_weights: [T, topk], any float dtype.
        topk_ids: [T, topk] int32 or int64, numbers among all experts; −1 chooses nobody.
        capacity: the same on all ranks, at least the tokens of any; default: the context's max_tokens_per_rank.
        out: [T, hidden] to write into.
        exact: hand the experts those rows alone that hold something; the host waits for their number.
        options: further arguments of `fused_moe`: activation, quant, layer, …

    Raises:
        InvalidInput: an argument is out of range.
        TeamLost: at the first call for a token bucket, a rank did not come. Later ones say so in `ctx.check()`.
    """
    there, back = chosen(ctx, ctx.max_tokens if capacity is None else capacity)
    return with_configs(
        ctx, x, w1, w2, topk_weights, topk_ids, fused_moe=fused_moe, capacity=capacity, out=out, dispatch_config=there,
        combine_config=back, exact=exact, **options,
    )  # fmt: skip
