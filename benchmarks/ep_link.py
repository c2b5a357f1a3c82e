"""What the link between NVIDIA GPUs carries, without flags: for benchmarks/ep.py, which times it.

The same bytes go from each rank to the next one, as rows of a dispatch would: by copy engines (`copies`), by programs
that store them there (`stores`) or load them from there (`loads`), and by the bulk copy unit (TMA) of programs
(`bulk_stores`, `bulk_loads`). On all ranks at once, and on rank 0 alone. What arrives is checked.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moecache.kernels.ep.context import EpContext

load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
CALLS = 4  # in a graph
BLOCK, ROWS, COLUMNS, STAGES = 4096, 8, 256, 6  # int32: of a chunk, and of a box of the bulk copy unit


@triton.jit
def chunks(SRC, DST, n, BLOCK: tl.constexpr):
    """Each program moves every so many chunks, and loads one ahead."""
    me, step, at = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    value = tl.load(SRC + me * BLOCK + at, mask=me * BLOCK + at < n, other=0, cache_modifier=".cg")
    for item in range(me, n // BLOCK, step):
        ahead = (item + step) * BLOCK + at
        after = tl.load(SRC + ahead, mask=ahead < n, other=0, cache_modifier=".cg")
        tl.store(DST + item * BLOCK + at, value)
        value = after


@gluon.jit
def boxes(SRC, DST, n, R: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr):
    """Boxes of [R, C] go into shared memory and out of it by the bulk copy unit."""
    smem = gl.allocate_shared_memory(gl.int32, [STAGES, R, C], SRC.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    me, step = gl.program_id(0), gl.num_programs(0)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    for i in gl.static_range(STAGES - 1):
        mbarrier.expect(full.index(i), R * C * 4, pred=me + i * step < n)
        load_box(SRC, [(me + i * step) * R, 0], full.index(i), smem.index(i), pred=me + i * step < n)
    for item in range(me, n, step):
        k = (item - me) // step
        mbarrier.wait(full.index(k % STAGES), (k // STAGES) & 1)
        store_box(DST, [item * R, 0], smem.index(k % STAGES))
        tma.store_wait(1)  # the store before has read its slot
        ahead, free = item + (STAGES - 1) * step, (k + STAGES - 1) % STAGES
        mbarrier.expect(full.index(free), R * C * 4, pred=ahead < n)
        load_box(SRC, [ahead * R, 0], full.index(free), smem.index(free), pred=ahead < n)
    tma.store_wait(0)


def links(ctx: EpContext, tokens: int, captured: Callable[..., Any], timed: Callable[..., Any]) -> Iterator[Any]:
    """A row for all ranks at once and one for rank 0 alone: as many bytes as rows of so many tokens."""
    n = tokens * ctx.hidden * 2 // 4 // BLOCK * BLOCK
    shared, peer = (
        ctx.peers.handle.get_buffer(rank, (4 * n,), torch.uint8, ctx.parts.first_slot).view(torch.int32)
        for rank in (ctx.rank, (ctx.rank + 1) % ctx.world)
    )
    local, here = torch.arange(n, dtype=torch.int32, device=ctx.device) + ctx.rank, torch.empty_like(shared)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)

    def boxed(source: torch.Tensor, target: torch.Tensor) -> None:
        both = (TensorDescriptor(each, [n // COLUMNS, COLUMNS], [COLUMNS, 1], [ROWS, COLUMNS], layout)
                for each in (source, target))  # fmt: skip
        boxes[(132,)](*both, n // (ROWS * COLUMNS), R=ROWS, C=COLUMNS, STAGES=STAGES, num_warps=1)

    ways: dict[str, Callable[[], Any]] = {
        "copies": lambda: peer.copy_(local),
        "stores": lambda: chunks[(128,)](local, peer, n, BLOCK=BLOCK, num_warps=8),
        "bulk_stores": partial(boxed, local, peer),
        "loads": lambda: chunks[(256,)](peer, here, n, BLOCK=BLOCK, num_warps=8),  # of what the last stores have left
        "bulk_loads": partial(boxed, peer, here),
    }
    graphs = {}
    for name, way in ways.items():
        came, sender = (here, ctx.rank) if "loads" in name else (shared, (ctx.rank - 1) % ctx.world)
        barrier()
        came.zero_()
        barrier()
        way()
        barrier()
        assert torch.equal(came - sender, local - ctx.rank), f"{name} brings something else"
        graphs[name] = captured(ctx, lambda number, way=way: way(), CALLS)
    for at_once in (True, False):
        us = timed(graphs, CALLS, 2, at_once or ctx.rank == 0)
        yield {"world": ctx.world, "T": tokens, "hidden": ctx.hidden, "phase": "link", "at_once": at_once,
               "us": {name: round(value, 1) for name, value in us.items()},
               "gb_s": {name: round(4 * n / value / 1e3, 1) for name, value in us.items()}}  # fmt: skip


def barrier() -> None:
    """All ranks have done what they launched."""
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
