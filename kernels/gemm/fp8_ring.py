"""Hopper kernel of the products of an MoE layer with fp8 weights in blocks: the ring of gemm/ring.py for fp8.

A tile takes 128 rows, half of them for each of two multiplying groups of warps, and two panels of 128 columns. Every
step is 128 deep, one block of the scales: the product of one panel is scaled and added in float32 by one group while
the matrix unit works for the other. All scales come through the ring. The first product leaves its rows in fp8, as a
tile holds all columns that share a scale.
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

from moecache.kernels import agreed
from moecache.kernels.gemm.ring import activate, copy_rows, panels, tile_of, tma_load

AHEAD = gl.constexpr(1)  # steps by which the first group begins a tile before the second
FLOOR = gl.constexpr(agreed.FLOOR)


@gluon.jit
def _sources(SORTED, first, pairs, BM: gl.constexpr, TOPK: gl.constexpr, layout: gl.constexpr):
    """(Rows of A, those of the tokens, that sorted rows first … + BM read, which of them are no padding)."""
    pair = gl.load(SORTED + first + gl.arange(0, BM, layout))
    return (pair // TOPK).to(gl.int64), pair < pairs


@gluon.jit
def _load(
    A, SCALES, W, W_SCALES, SORTED, BLOCKS, TOTAL, a_smem, s_smem, w_smem, ws_smem, ready, empty, pairs, a_row, s_row,
    s_step, rows, second, N, K, heights, TOPK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr,
    BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr, WARPS: gl.constexpr,
):
    """The loading warps: every k-step of every tile of this program, one ring slot after the other."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [256 // (BK // 2), BK // 16], [WARPS, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    blocks = gl.load(TOTAL) // (2 * BM)
    tiles_n = gl.cdiv(N, STEP)
    steps = gl.cdiv(K, BK)
    side = gl.arange(0, 2, flat)  # left and right panel
    index = 0
    for tile in range(gl.program_id(0), blocks * tiles_n, gl.num_programs(0)):
        block, n = tile_of(tile, blocks, tiles_n, GROUP)
        expert = gl.load(BLOCKS + block)
        w_at = expert * rows + n * STEP
        height = gl.minimum((n * STEP + side * second) // BK, heights - 1)
        ws = W_SCALES + (expert.to(gl.int64) * heights + height) * steps
        first = block * 2 * BM
        if GATHER:
            step = a_row // 16 * 16  # rows start on 16 bytes, which a copy of 16 bytes wants to see
            at = gl.arange(0, BK, gl.SliceLayout(0, layout))
            upper, there = _sources(SORTED, first, pairs, BM, TOPK, gl.SliceLayout(1, layout))
            lower, here = _sources(SORTED, first + BM, pairs, BM, TOPK, gl.SliceLayout(1, layout))
            a = A + upper[:, None] * step + at[None, :]
            b = A + lower[:, None] * step + at[None, :]
            source, valid = _sources(SORTED, first, pairs, 2 * BM, TOPK, flat)
        else:
            source = (first + gl.arange(0, 2 * BM, flat)).to(gl.int64)
        s = SCALES + source * s_row
        for k in range(0, steps):
            slot = index % STAGES
            mbarrier.wait(empty.index(slot), (index // STAGES & 1) ^ 1)
            if GATHER:
                mbarrier.expect(ready.index(slot), 2 * BN * BK)
            else:
                mbarrier.expect(ready.index(slot), 2 * (BM + BN) * BK)
            tma_load(W, [w_at, k * BK], ready.index(slot), w_smem.index(2 * slot))
            tma_load(W, [w_at + second, k * BK], ready.index(slot), w_smem.index(2 * slot + 1))
            if GATHER:
                copy_rows(a_smem.index(2 * slot), a + k * BK, mask=there[:, None])
                copy_rows(a_smem.index(2 * slot + 1), b + k * BK, mask=here[:, None])
                copy_rows(s_smem.index(slot), s + k * s_step, mask=valid)
            else:
                tma_load(A, [first, k * BK], ready.index(slot), a_smem.index(2 * slot))
                tma_load(A, [first + BM, k * BK], ready.index(slot), a_smem.index(2 * slot + 1))
                copy_rows(s_smem.index(slot), s + k * s_step)
            copy_rows(ws_smem.index(slot), ws + k)
            async_copy.mbarrier_arrive(ready.index(slot), increment_count=False)
            index += 1


@gluon.jit
def _multiply(
    OUT, OUT_SCALES, BIAS, WEIGHTS, SORTED, BLOCKS, TOTAL, a_smem, s_smem, w_smem, ws_smem, ready, empty, ahead, pairs,
    out_row, o_step, second, N, K, alpha, limit, TOPK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STEP: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, ACT: gl.constexpr,
    WEIGHTED: gl.constexpr, BIASED: gl.constexpr, GATHER: gl.constexpr, FMAX: gl.constexpr, PART: gl.constexpr,
):
    """One multiplying group: its half of the rows of every tile; nothing where that half is padding."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    own: gl.constexpr = gl.SliceLayout(1, mma)
    blocks = gl.load(TOTAL) // (2 * BM)
    tiles_n = gl.cdiv(N, STEP)
    steps = gl.cdiv(K, BK)
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
            pair = gl.load(SORTED + first + gl.arange(0, BM, own))
            weight = 1.0
            if WEIGHTED:
                weight = gl.load(WEIGHTS + pair, mask=pair < pairs, other=0.0).to(gl.float32)
            left = gl.zeros([BM, BN], gl.float32, mma)
            right = gl.zeros([BM, BN], gl.float32, mma)
            for k in range(0, steps):
                slot = index % STAGES
                mbarrier.wait(ready.index(slot), index // STAGES & 1)
                if GATHER:
                    fence_async_shared()
                a = a_smem.index(2 * slot + PART)
                part = gl.zeros([BM, BN], gl.float32, mma)
                token = warpgroup_mma(a, w_smem.index(2 * slot).permute((1, 0)), part, use_acc=False, is_async=True)
                scale = s_smem.index(slot).slice(PART * BM, BM, 0).load(own)
                w_scale = ws_smem.index(slot).slice(0, 1, 0).load(own)
                part = warpgroup_mma_wait(0, deps=(token,))
                left += part * (scale * w_scale)[:, None]
                left = warpgroup_mma_wait(0, deps=(left,))  # or two unscaled products would be alive: registers
                part = gl.zeros([BM, BN], gl.float32, mma)
                token = warpgroup_mma(a, w_smem.index(2 * slot + 1).permute((1, 0)), part, use_acc=False, is_async=True)
                w_scale = ws_smem.index(slot).slice(1, 1, 0).load(own)
                part = warpgroup_mma_wait(0, deps=(token,))
                mbarrier.arrive(empty.index(slot))
                if PART == 0:
                    mbarrier.arrive(ahead.index(0), pred=skewed & (k == AHEAD))
                right += part * (scale * w_scale)[:, None]
                index += 1
            if ACT != "":
                _activated(left, right, weight, first, OUT, OUT_SCALES, BIAS, expert, n, out_row, o_step, N, alpha,
                           limit, BM, BN, ACT, WEIGHTED, BIASED, FMAX, mma)
            else:
                _combined(left, pair, pairs, weight, OUT, BIAS, expert, n * STEP, out_row, N, WEIGHTED, BIASED, mma)
                _combined(right, pair, pairs, weight, OUT, BIAS, expert, n * STEP + BN, out_row, N, WEIGHTED, BIASED,
                          mma)
        else:
            for i in range(index, index + steps):
                mbarrier.wait(ready.index(i % STAGES), i // STAGES & 1)
                mbarrier.arrive(empty.index(i % STAGES))
            index += steps


@gluon.jit
def _activated(
    left, right, weight, first, OUT, SCALES, BIAS, expert, n, out_row, o_step, N, alpha, limit,
    BM: gl.constexpr, BN: gl.constexpr, ACT: gl.constexpr, WEIGHTED: gl.constexpr, BIASED: gl.constexpr,
    FMAX: gl.constexpr, mma: gl.constexpr,
):
    """Write half a tile of the first product in fp8: OUT[row], and SCALES[n, row] of its BN columns; two such without a
    gate. Padding has room for values that nobody reads."""
    PANELS: gl.constexpr = panels(ACT)
    if WEIGHTED:
        left = left * weight[:, None]
        right = right * weight[:, None]
    if PANELS == 2:
        if BIASED:
            bias = BIAS + expert.to(gl.int64) * 2 * N + n * BN + gl.arange(0, BN, gl.SliceLayout(0, mma))
            left += gl.load(bias).to(gl.float32)[None, :]
            right += gl.load(bias + N).to(gl.float32)[None, :]
        _narrowed(activate(left, right, ACT, alpha, limit), first, n, OUT, SCALES, out_row, o_step, BM, BN, FMAX, mma)
    else:
        both = (2 * n + 1) * BN < N  # else the panel on the right is past the last column
        if BIASED:
            bias = BIAS + expert.to(gl.int64) * N + 2 * n * BN + gl.arange(0, BN, gl.SliceLayout(0, mma))
            left += gl.load(bias).to(gl.float32)[None, :]
            right += gl.load(bias + BN, mask=both, other=0.0).to(gl.float32)[None, :]
        left = activate(left, left, ACT, alpha, limit)
        _narrowed(left, first, 2 * n, OUT, SCALES, out_row, o_step, BM, BN, FMAX, mma)
        if both:
            right = activate(right, right, ACT, alpha, limit)
            _narrowed(right, first, 2 * n + 1, OUT, SCALES, out_row, o_step, BM, BN, FMAX, mma)


@gluon.jit
def _narrowed(
    h, first, n, OUT, SCALES, out_row, o_step, BM: gl.constexpr, BN: gl.constexpr, FMAX: gl.constexpr,
    mma: gl.constexpr,
):
    """Write the n-th BN columns of the rows `first` … + BM, and their scales."""
    # of bits, as a maximum of floats loses NaN
    most = gl.max(h.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(gl.float32, bitcast=True)
    most = gl.where(most < FLOOR, FLOOR, most)
    row = first + gl.arange(0, BM, gl.SliceLayout(1, mma))
    gl.store(SCALES + n.to(gl.int64) * o_step + row, most / FMAX)
    h = (h * (FMAX / most)[:, None]).to(OUT.dtype.element_ty)
    rows16: gl.constexpr = gl.BlockedLayout([1, 16], [512 // BN, BN // 16], [4, 1], [1, 0])
    h = gl.convert_layout(h, rows16)
    row = first + gl.arange(0, BM, gl.SliceLayout(1, rows16))
    column = n * BN + gl.arange(0, BN, gl.SliceLayout(0, rows16))
    gl.store(OUT + row.to(gl.int64)[:, None] * out_row + column[None, :], h)


@gluon.jit
def _combined(
    acc, pair, pairs, weight, OUT, BIAS, expert, start, out_row, N, WEIGHTED: gl.constexpr, BIASED: gl.constexpr,
    mma: gl.constexpr,
):
    """Write one panel of half a tile of the second product, weighted: OUT[pair, start …]."""
    BN: gl.constexpr = acc.shape[1]
    if BIASED:
        column = start + gl.arange(0, BN, gl.SliceLayout(0, mma))
        bias = BIAS + expert.to(gl.int64) * N + column
        acc += gl.load(bias, mask=column < N, other=0.0).to(gl.float32)[None, :]
    if WEIGHTED:
        acc = acc * weight[:, None]
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
    acc = gl.convert_layout(acc.to(OUT.dtype.element_ty), wide)
    pair = gl.convert_layout(pair, gl.SliceLayout(1, wide))
    column = start + gl.arange(0, BN, gl.SliceLayout(0, wide))
    where = OUT + pair.to(gl.int64)[:, None] * out_row + column[None, :]
    gl.store(where, acc, mask=(pair < pairs)[:, None] & (column < N)[None, :])


@gluon.jit(do_not_specialize=["pairs", "s_row", "s_step", "o_step"])
def product(
    A, SCALES, W, W_SCALES, OUT, OUT_SCALES, BIAS, WEIGHTS, SORTED, BLOCKS, TOTAL, pairs, a_row, s_row, s_step, out_row,
    o_step, rows, second, N, K, alpha, limit, TOPK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STEP: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr,
    ACT: gl.constexpr, WEIGHTED: gl.constexpr, BIASED: gl.constexpr, FMAX: gl.constexpr, num_warps: gl.constexpr,
):
    """One product. A tile takes 2 · BM rows and the W rows n · STEP … + BN and those `second` further on.

    SCALES[row · s_row + k · s_step] is that of step k of a row of A; W fp8 with W_SCALES [E, rows / 128, K / 128].
    With ACT: OUT[row] = act(left) · right in fp8, or (act(left), act(right)) without a gate, its scales at OUT_SCALES[n
    · o_step + row]. Without: OUT[pair] = (left, right), weighted. GATHER: row pair // TOPK of A, a pointer; else the
    sorted row, and A is a descriptor.
    """
    LOADERS: gl.constexpr = 4
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a_smem = gl.allocate_shared_memory(W.dtype, [2 * STAGES, BM, BK], W.layout)
    w_smem = gl.allocate_shared_memory(W.dtype, [2 * STAGES, BN, BK], W.layout)
    s_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BM], flat)
    ws_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 2], flat)
    heights = gl.cdiv(panels(ACT) * N, BK)  # blocks of scales along a weight's rows
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ahead = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ahead.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1 + 32 * LOADERS)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_multiply, (OUT, OUT_SCALES, BIAS, WEIGHTS, SORTED, BLOCKS, TOTAL, a_smem, s_smem, w_smem, ws_smem, ready,
                         empty, ahead, pairs, out_row, o_step, second, N, K, alpha, limit, TOPK, BM, BN, STEP, BK,
                         GROUP, STAGES, ACT, WEIGHTED, BIASED, GATHER, FMAX, 0)),
            (_multiply, (OUT, OUT_SCALES, BIAS, WEIGHTS, SORTED, BLOCKS, TOTAL, a_smem, s_smem, w_smem, ws_smem, ready,
                         empty, ahead, pairs, out_row, o_step, second, N, K, alpha, limit, TOPK, BM, BN, STEP, BK,
                         GROUP, STAGES, ACT, WEIGHTED, BIASED, GATHER, FMAX, 1)),
            (_load, (A, SCALES, W, W_SCALES, SORTED, BLOCKS, TOTAL, a_smem, s_smem, w_smem, ws_smem, ready, empty,
                     pairs, a_row, s_row, s_step, rows, second, N, K, heights, TOPK, BM, BN, STEP, BK, GROUP, STAGES,
                     GATHER, LOADERS)),
        ],
        [num_warps, LOADERS],
        [216, 72],
    )
