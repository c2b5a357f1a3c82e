"""Hopper kernel of the products of an MoE layer with fp8 weights in blocks: the ring of moe_ring_gluon.py for fp8.

A tile takes 128 rows, half of them for each of two multiplying groups of warps, and two panels of 64 columns side by
side. Every step is 128 deep, one block of the scales: its product is scaled and added in float32 by one group while the
matrix unit works for the other. The scales of the rows come through the ring, those of the weights from global memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moecache.kernels.moe_ring_gluon import activate, copy_rows, overlap, tile_of, tma_load

AHEAD = gl.constexpr(2)  # steps by which the first group begins a tile before the second


@gluon.jit
def _sources(SORTED, first, pairs, BM: gl.constexpr, TOPK: gl.constexpr, GATHER: gl.constexpr, layout: gl.constexpr):
    """(A rows of sorted rows first … + BM, which of them are no padding)."""
    row = first + gl.arange(0, BM, layout)
    pair = gl.load(SORTED + row)
    if GATHER:
        source = pair // TOPK
    else:
        source = row
    return source.to(gl.int64), pair < pairs


@gluon.jit
def _load(
    A, SCALES, W, SORTED, BLOCKS, TOTAL, a_smem, s_smem, w_smem, ready, empty, pairs, a_row, s_row, rows, second, N, K,
    TOPK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, EVEN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The loading warps: every k-step of every tile of this program, one ring slot after the other."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [256 // (BK // 2), BK // 16], [WARPS, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    blocks = gl.load(TOTAL) // (2 * BM)
    tiles_n = gl.cdiv(N, STEP)
    at = gl.arange(0, BK, gl.SliceLayout(0, layout))
    index = 0
    for tile in range(gl.program_id(0), blocks * tiles_n, gl.num_programs(0)):
        block, n = tile_of(tile, blocks, tiles_n, GROUP)
        w_at = gl.load(BLOCKS + block) * rows + n * STEP
        first = block * 2 * BM
        step = a_row // 16 * 16  # rows start on 16 bytes, which a copy of 16 bytes wants to see
        upper, there = _sources(SORTED, first, pairs, BM, TOPK, GATHER, gl.SliceLayout(1, layout))
        lower, here = _sources(SORTED, first + BM, pairs, BM, TOPK, GATHER, gl.SliceLayout(1, layout))
        a = A + upper[:, None] * step + at[None, :]
        b = A + lower[:, None] * step + at[None, :]
        source, valid = _sources(SORTED, first, pairs, 2 * BM, TOPK, GATHER, flat)
        s = SCALES + source * s_row
        for k in range(0, K, BK):
            slot = index % STAGES
            mbarrier.wait(empty.index(slot), (index // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(slot), 2 * BN * BK)
            tma_load(W, [w_at, k], ready.index(slot), w_smem.index(slot).slice(0, BN, 0))
            tma_load(W, [w_at + second, k], ready.index(slot), w_smem.index(slot).slice(BN, BN, 0))
            if EVEN:
                copy_rows(a_smem.index(2 * slot), a + k, mask=there[:, None])
                copy_rows(a_smem.index(2 * slot + 1), b + k, mask=here[:, None])
            else:
                inside = (at + k < K)[None, :]
                copy_rows(a_smem.index(2 * slot), a + k, mask=there[:, None] & inside)
                copy_rows(a_smem.index(2 * slot + 1), b + k, mask=here[:, None] & inside)
            copy_rows(s_smem.index(slot), s + k // BK, mask=valid)
            async_copy.mbarrier_arrive(ready.index(slot), increment_count=False)
            index += 1


@gluon.jit
def _multiply(
    OUT, BIAS, WEIGHTS, W_SCALES, SORTED, BLOCKS, TOTAL, a_smem, s_smem, w_smem, ready, empty, ahead, pairs, out_row,
    second, N, K, alpha, limit, TOPK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr,
    BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, ACT: gl.constexpr, WEIGHTED: gl.constexpr,
    BIASED: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """One multiplying group: its half of the rows of every tile; nothing where that half is padding."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BN, 32])
    blocks = gl.load(TOTAL) // (2 * BM)
    tiles_n = gl.cdiv(N, STEP)
    steps = gl.cdiv(K, BK)
    heights = gl.cdiv((2 * N if ACT != "" else N), BK)  # blocks of scales along a weight's rows
    is_right = gl.arange(0, 2 * BN, gl.SliceLayout(0, mma)) >= BN
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
    skewed = (steps > AHEAD) & (steps + AHEAD >= STAGES)  # else a barrier's parity would tell too little
    index = 0
    count = 0
    for tile in range(gl.program_id(0), blocks * tiles_n, gl.num_programs(0)):
        block, n = tile_of(tile, blocks, tiles_n, GROUP)
        expert = gl.load(BLOCKS + block)
        first = block * 2 * BM + PART * BM
        live = True
        if PART > 0:
            live = gl.load(SORTED + first) < pairs  # padding comes last in a block
            if skewed:  # the other group ends its tile first: one writes while the other multiplies
                mbarrier.wait(ahead.index(0), count & 1)
                count += 1
        if live:
            # asked for now, as nobody multiplies in the time that they take after the last product
            pair = gl.load(SORTED + first + gl.arange(0, BM, gl.SliceLayout(1, wide)))
            weight = 1.0
            if WEIGHTED:
                weight = gl.load(WEIGHTS + pair, mask=pair < pairs, other=0.0).to(gl.float32)
            scale_at = W_SCALES + expert.to(gl.int64) * heights * steps
            left_at = scale_at + n * STEP // BK * steps
            right_at = scale_at + gl.minimum((n * STEP + second) // BK, heights - 1) * steps
            left = gl.load(left_at)
            right = gl.load(right_at)
            acc = gl.zeros([BM, 2 * BN], gl.float32, mma)
            for k in range(0, steps):
                slot = index % STAGES
                w_scale = gl.where(is_right, right, left)
                mbarrier.wait(ready.index(slot), index // STAGES & 1)
                fence_async_shared()
                part = gl.zeros([BM, 2 * BN], gl.float32, mma)
                token = warpgroup_mma(a_smem.index(2 * slot + PART), w_smem.index(slot).permute((1, 0)), part,
                                      use_acc=False, is_async=True)  # fmt: skip
                # those of the next step: a fence waits for loads, so they must not be on their way before it
                left = gl.load(left_at + k + 1, mask=k + 1 < steps, other=0.0)
                right = gl.load(right_at + k + 1, mask=k + 1 < steps, other=0.0)
                scale = s_smem.index(slot).slice(PART * BM, BM, 0).load(gl.SliceLayout(1, mma))
                part = warpgroup_mma_wait(0, deps=(token,))
                mbarrier.arrive(empty.index(slot))
                if PART == 0:
                    mbarrier.arrive(ahead.index(0), pred=skewed & (k == AHEAD))
                acc += part * (scale[:, None] * w_scale[None, :])
                index += 1
            _finish(acc, pair, weight, OUT, BIAS, expert, first, n, pairs, out_row, second, N, alpha, limit, TOPK, BM,
                    BN, STEP, ACT, WEIGHTED, BIASED, wide)  # fmt: skip
        else:
            for i in range(index, index + steps):
                mbarrier.wait(ready.index(i % STAGES), i // STAGES & 1)
                mbarrier.arrive(empty.index(i % STAGES))
            index += steps


@gluon.jit
def _finish(
    acc, pair, weight, OUT, BIAS, expert, first, n, pairs, out_row, second, N, alpha, limit, TOPK: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr, ACT: gl.constexpr, WEIGHTED: gl.constexpr,
    BIASED: gl.constexpr, wide: gl.constexpr,
):  # fmt: skip
    """Write a finished half tile out: bias, router weight, activation."""
    left, right = gl.split(acc.reshape([BM, 2, BN]).permute((0, 2, 1)))
    left = gl.convert_layout(left, wide)
    right = gl.convert_layout(right, wide)
    column = n * STEP + gl.arange(0, BN, gl.SliceLayout(0, wide))
    row = first + gl.arange(0, BM, gl.SliceLayout(1, wide))
    valid = pair < pairs
    if WEIGHTED:
        weight = weight[:, None]
    if ACT != "":
        if WEIGHTED:
            left = left * weight
            right = right * weight
        if BIASED:
            bias = BIAS + expert.to(gl.int64) * 2 * N + column
            left += gl.load(bias, mask=column < N, other=0.0).to(gl.float32)[None, :]
            right += gl.load(bias + N, mask=column < N, other=0.0).to(gl.float32)[None, :]
        h = activate(left, right, ACT, alpha, limit).to(OUT.dtype.element_ty)
        where = OUT + row.to(gl.int64)[:, None] * out_row + column[None, :]
        gl.store(where, h, mask=valid[:, None] & (column < N)[None, :])
    else:
        if BIASED:
            bias = BIAS + expert.to(gl.int64) * N + column
            left += gl.load(bias, mask=column < N, other=0.0).to(gl.float32)[None, :]
            right += gl.load(bias + BN, mask=column + BN < N, other=0.0).to(gl.float32)[None, :]
        if WEIGHTED:
            left = left * weight
            right = right * weight
        where = OUT + pair.to(gl.int64)[:, None] * out_row + column[None, :]
        gl.store(where, left.to(OUT.dtype.element_ty), mask=valid[:, None] & (column < N)[None, :])
        gl.store(where + BN, right.to(OUT.dtype.element_ty), mask=valid[:, None] & (column + BN < N)[None, :])


@gluon.jit(do_not_specialize=["pairs", "s_row"])
def product(
    A, SCALES, W, W_SCALES, OUT, BIAS, WEIGHTS, SORTED, BLOCKS, TOTAL, pairs, a_row, s_row, out_row, rows, second, N, K,
    alpha, limit, TOPK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr, BK: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr, EVEN: gl.constexpr, ACT: gl.constexpr,
    WEIGHTED: gl.constexpr, BIASED: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One product. A tile takes 2 · BM rows and the W rows n · STEP … + BN and those `second` further on.

    A [., K] fp8 with SCALES [., K / 128] float32, W fp8 with W_SCALES [E, rows / 128, K / 128]. With ACT: OUT[row] =
    act(left) · right. Without: OUT[pair] = (left, right), weighted. GATHER: row pair // TOPK of A, not the sorted row.
    """
    LOADERS: gl.constexpr = 4
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a_smem = gl.allocate_shared_memory(A.dtype.element_ty, [2 * STAGES, BM, BK], W.layout)
    w_smem = gl.allocate_shared_memory(A.dtype.element_ty, [STAGES, 2 * BN, BK], W.layout)
    s_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BM], flat)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ahead = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ahead.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1 + 32 * LOADERS)
        mbarrier.init(empty.index(i), count=2)
    if PDL:
        overlap()
    gl.warp_specialize(
        [
            (_multiply, (OUT, BIAS, WEIGHTS, W_SCALES, SORTED, BLOCKS, TOTAL, a_smem, s_smem, w_smem, ready, empty,
                         ahead, pairs, out_row, second, N, K, alpha, limit, TOPK, BM, BN, STEP, BK, GROUP, STAGES, ACT,
                         WEIGHTED, BIASED, 0)),
            (_multiply, (OUT, BIAS, WEIGHTS, W_SCALES, SORTED, BLOCKS, TOTAL, a_smem, s_smem, w_smem, ready, empty,
                         ahead, pairs, out_row, second, N, K, alpha, limit, TOPK, BM, BN, STEP, BK, GROUP, STAGES, ACT,
                         WEIGHTED, BIASED, 1)),
            (_load, (A, SCALES, W, SORTED, BLOCKS, TOTAL, a_smem, s_smem, w_smem, ready, empty, pairs, a_row, s_row,
                     rows, second, N, K, TOPK, BM, BN, STEP, BK, GROUP, STAGES, GATHER, EVEN, LOADERS)),
        ],
        [num_warps, LOADERS],
        [200, 64],
    )  # fmt: skip
