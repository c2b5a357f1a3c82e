"""Expert parallelism by collectives of torch.distributed: what every engine has, and what the kernels must beat.

`gather` and `scatter` are all-gather and reduce-scatter; `swap` and `swap_back` are all-to-all with rows for everybody.
Both give rows in the order of `exchange.dispatch`: by source rank and token. All ranks pass as many rows, so shapes are
fixed and a graph can hold them. Rows also travel to ranks that have no use for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from moecache.kernels.ep.context import EpContext

# torch 2.13 has given them other names, and warns of the old ones
GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
Rows = tuple[torch.Tensor, ...]  # rows and, if they are fp8, their scales; then ids and weights


def padded(tensor: torch.Tensor, capacity: int, value: float = 0) -> torch.Tensor:
    """The tensor with rows of `value` behind, up to the capacity; itself where it is full."""
    missing = capacity - tensor.shape[0]
    return tensor if not missing else torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), value)])


def gather(ctx: EpContext, *sent: torch.Tensor) -> Rows:
    """Each of the tensors [capacity, …] from all ranks: [world · capacity, …]."""
    found = tuple(each.new_empty(ctx.world * each.shape[0], *each.shape[1:]) for each in sent)
    with _together(ctx):
        for into, each in zip(found, sent, strict=True):
            GATHER(into, each, group=ctx.group)
    return found


def scatter(ctx: EpContext, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The sum over ranks of what each has computed for this rank's rows: [capacity, hidden], in the dtype of `y`.

    Rows for which a rank has no expert must be zero there, as `fused_moe` leaves them.
    """
    out = y.new_empty(y.shape[0] // ctx.world, y.shape[1]) if out is None else out
    SCATTER(out, y, group=ctx.group)
    return out


def swap(ctx: EpContext, *sent: torch.Tensor) -> Rows:
    """As `gather`, by all-to-all: every rank sends its rows to each."""
    parts = [each.repeat(ctx.world, *[1] * (each.dim() - 1)) for each in sent]
    found = tuple(torch.empty_like(each) for each in parts)
    with _together(ctx):
        for into, each in zip(found, parts, strict=True):
            dist.all_to_all_single(into, each, group=ctx.group)
    return found


def swap_back(ctx: EpContext, y: torch.Tensor) -> torch.Tensor:
    """As `scatter`, by all-to-all and a sum in float32."""
    back = torch.empty_like(y)
    dist.all_to_all_single(back, y, group=ctx.group)
    return back.view(ctx.world, -1, y.shape[1]).sum(0, dtype=torch.float32).to(y.dtype)


@contextmanager
def _together(ctx: EpContext) -> Iterator[Any]:
    """One launch for several collectives, where the backend can do that."""
    if ctx.device.type != "cuda":
        yield
        return
    with dist._coalescing_manager(group=ctx.group, device=ctx.device):
        yield
