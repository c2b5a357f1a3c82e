"""The Triton kernels of an fp8 MoE layer: quantising rows, and both products over sorted rows with their scales.

`quantise` makes fp8 of rows, one scale a row or a row and 128 columns; `up` gathers the tokens' rows and writes act(x ·
gateᵀ) · (x · upᵀ), or act(x · w1ᵀ) without a gate, as fp8 with scales where QUANT is set; `down` multiplies those rows
with the second weight and scatters them to their (token, slot) pair. Sorting and the sum over a token's pairs are those
of the bf16 kernels.

Names: W is a pointer, or a tensor descriptor over [experts · rows, K] where TMA is set; WS are its scales and S those
of the rows. KIND is that of Quant. With fp8_block BK is 128, so a step's product has one scale a row and one a panel:
each step starts a new accumulator, which is scaled as it is added up. SWAP computes the transposed product, so that few
rows of tokens stand where the matrix unit wants few columns. Rows in fp8 end in zeros up to a multiple of PART
(fp8_block) or WIDE columns, so that a step may read past their last one.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecache.kernels import agreed
from moecache.kernels.gemm.tile import activate, panels, tile_of

PART = tl.constexpr(agreed.BLOCK)  # rows and columns of weights, and columns of a row, with one scale in fp8_block
FLOOR = tl.constexpr(agreed.FLOOR)
WIDE = tl.constexpr(256)


@triton.jit
def largest(x, axis: tl.constexpr):
    """Bits of the largest absolute value of float32 along an axis. As integers NaN is above inf, and inf above the
    rest, where a maximum of floats would lose NaN."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)


@triton.jit
def scale_of(bits, FMAX: tl.constexpr):
    """The scale of values of which these are the `largest`: of NaN and inf it is NaN and inf, so that what comes of the
    row is neither a number, whatever its values become in fp8, where a kind has no inf."""
    top = bits.to(tl.float32, bitcast=True)
    return tl.where(top < FLOOR, FLOOR, top) / FMAX


@triton.jit
def _to_fp8(x, scale, FMAX: tl.constexpr, FP8: tl.constexpr):
    """Finite values: a scale that is not says what they stand for."""
    return tl.minimum(tl.maximum(x / scale, -FMAX), FMAX).to(FP8)


@triton.jit(do_not_specialize=["rows"])
def quantise(
    X, Q, S, TOTAL, rows, columns, x_row, x_col, q_row,
    KIND: tl.constexpr, FMAX: tl.constexpr, LIMITED: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr,
    ONCE: tl.constexpr, PDL: tl.constexpr,
):
    """Q, S = X in fp8 with a scale a group: 128 columns of a row, or a row. LIMITED: only the first TOTAL rows."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if LIMITED:
        rows = tl.minimum(rows, tl.load(TOTAL))
    if KIND == "fp8_block":
        parts = tl.cdiv(columns, PART)
        end = parts * PART
    else:
        parts = 1
        end = tl.cdiv(columns, WIDE) * WIDE
    group = tl.program_id(0) * BG + tl.arange(0, BG)
    row = group // parts
    column = (group % parts * BC)[:, None] + tl.arange(0, BC)[None, :]
    x = X + row.to(tl.int64)[:, None] * x_row
    q = Q + row.to(tl.int64)[:, None] * q_row
    here = row < rows
    if ONCE:
        mask = here[:, None] & (column < columns)
        value = tl.load(x + column.to(tl.int64) * x_col, mask=mask, other=0.0).to(tl.float32)
        scale = scale_of(largest(value, 1), FMAX)
        value = _to_fp8(value, scale[:, None], FMAX, Q.dtype.element_ty)
        tl.store(q + column, value, mask=here[:, None] & (column < end))
    else:
        top = tl.zeros([BG], tl.int32)
        for at in tl.range(0, columns, BC):
            mask = here[:, None] & (at + column < columns)
            value = tl.load(x + (at + column).to(tl.int64) * x_col, mask=mask, other=0.0).to(tl.float32)
            top = tl.maximum(top, largest(value, 1))
        scale = scale_of(top, FMAX)
        for at in tl.range(0, end, BC):
            mask = here[:, None] & (at + column < columns)
            value = tl.load(x + (at + column).to(tl.int64) * x_col, mask=mask, other=0.0).to(tl.float32)
            value = _to_fp8(value, scale[:, None], FMAX, Q.dtype.element_ty)
            tl.store(q + at + column, value, mask=here[:, None] & (at + column < end))
    tl.store(S + group, scale, mask=here)


@triton.jit
def _weights(
    W, expert, row0, k, rows, w_rows, w_expert, w_row, w_col, K, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr,
):
    """[BN, BK] of an expert's weight; columns past K are 0, rows past the last one are anything."""
    if TMA:
        w = W.load([expert * w_rows + row0, k])
    else:
        at = k + tl.arange(0, BK)
        row = tl.minimum(row0 + tl.arange(0, BN), rows - 1) - row0
        panel = W + expert.to(tl.int64) * w_expert + row0.to(tl.int64) * w_row
        where = panel + row[:, None] * w_row + at[None, :] * w_col
        if EVEN:
            w = tl.load(where)
        else:
            w = tl.load(where, mask=at[None, :] < K, other=0.0)
    return w


@triton.jit
def _panel(WS, expert, row0, rows, K, k, BN: tl.constexpr, SPLIT: tl.constexpr):
    """Scales in fp8_block of the weights [BN, 128] at (row0, k): one, or one a row where the panel may lie over two."""
    down, across = tl.cdiv(rows, PART), tl.cdiv(K, PART)
    where = WS + (expert.to(tl.int64) * down + row0 // PART) * across + k // PART
    scale = tl.load(where)
    if SPLIT:
        below = tl.load(where + across, mask=row0 // PART + 1 < down, other=0.0)
        scale = tl.where(row0 % PART + tl.arange(0, BN) < PART, scale, below)
    return scale


@triton.jit
def _add(acc, a, w, a_scale, w_scale, BLOCKED: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr):
    """acc + a · wᵀ, of this step's scales where BLOCKED."""
    if BLOCKED:
        if SPLIT:
            scale = a_scale[:, None] * w_scale[None, :]
        else:
            scale = (a_scale * w_scale)[:, None]
        if SWAP:
            acc += tl.dot(w, a.T) * scale.T
        else:
            acc += tl.dot(a, w.T) * scale
    elif SWAP:
        acc = tl.dot(w, a.T, acc)
    else:
        acc = tl.dot(a, w.T, acc)
    return acc


@triton.jit
def _whole(WS, expert, rows, row, inside, KIND: tl.constexpr):
    """Scales of whole rows of weights [1, BN], or the one of the expert."""
    if KIND == "fp8_channel":
        scale = tl.load(WS + expert.to(tl.int64) * rows + row, mask=inside, other=0.0)[None, :]
    else:
        scale = tl.load(WS + expert)
    return scale


@triton.jit
def _up_part(
    X, S, W, WS, BIAS, WEIGHTS, expert, first, pair, valid, x_row, w_rows, w_expert, w_row, w_col, N, K, alpha, limit,
    KIND: tl.constexpr, SPLIT: tl.constexpr, HIDDEN: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr, ON_INPUT: tl.constexpr, BIASED: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):
    """[BLOCK, BN] of the first product after the activation, rounded to the hidden dtype. SPLIT: 1 where up begins
    inside a block of scales, 2 where gate and up have blocks of their own and N is no whole number of them."""
    PANELS: tl.constexpr = panels(ACT)
    BLOCKED: tl.constexpr = KIND == "fp8_block"
    token = (pair // TOPK).to(tl.int64)
    x = X + token[:, None] * x_row
    if SWAP:
        gate = tl.zeros([BN, BLOCK], tl.float32)
        up = tl.zeros([BN, BLOCK], tl.float32)
    else:
        gate = tl.zeros([BLOCK, BN], tl.float32)
        up = tl.zeros([BLOCK, BN], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        at = k + tl.arange(0, BK)
        if BLOCKED:
            a_scale = tl.load(S + token * tl.cdiv(K, PART) + k // PART, mask=valid, other=0.0)
            side = N
            if SPLIT == 2:
                side = tl.cdiv(N, PART) * PART
            g_scale = _panel(WS, expert, first, PANELS * side, K, k, BN, False)
            if PANELS == 2:
                u_scale = _panel(WS, expert, side + first, PANELS * side, K, k, BN, SPLIT == 1)
        else:
            a_scale, g_scale, u_scale = 1.0, 1.0, 1.0
        a = tl.load(x + at[None, :], mask=valid[:, None], other=0.0)
        g = _weights(W, expert, first, k, PANELS * N, w_rows, w_expert, w_row, w_col, K, BN, BK, TMA, EVEN)
        gate = _add(gate, a, g, a_scale, g_scale, BLOCKED, False, SWAP)
        if PANELS == 2:
            u = _weights(W, expert, N + first, k, PANELS * N, w_rows, w_expert, w_row, w_col, K, BN, BK, TMA, EVEN)
            up = _add(up, a, u, a_scale, u_scale, BLOCKED, SPLIT == 1, SWAP)
    if SWAP:
        gate = gate.T
        up = up.T
    column = first + tl.arange(0, BN)
    inside = column < N
    if not BLOCKED:
        whole = tl.load(S + token, mask=valid, other=0.0)[:, None]
        gate *= whole * _whole(WS, expert, PANELS * N, column, inside, KIND)
        if PANELS == 2:
            up *= whole * _whole(WS, expert, PANELS * N, N + column, inside, KIND)
    if ON_INPUT:
        router = tl.load(WEIGHTS + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
        gate *= router
        up *= router
    if BIASED:
        bias = BIAS + expert.to(tl.int64) * PANELS * N + column
        gate += tl.load(bias, mask=inside, other=0.0).to(tl.float32)[None, :]
        if PANELS == 2:
            up += tl.load(bias + N, mask=inside, other=0.0).to(tl.float32)[None, :]
    return activate(gate, up, ACT, alpha, limit).to(HIDDEN)


@triton.jit
def _up_tile(
    X, S, W, WS, BIAS, H, HS, WEIGHTS, SORTED, expert, block, n, pairs, x_row, w_rows, w_expert, w_row, w_col, h_row,
    N, K, alpha, limit,
    KIND: tl.constexpr, FMAX: tl.constexpr, QUANT: tl.constexpr, SPLIT: tl.constexpr, HIDDEN: tl.constexpr,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
    ON_INPUT: tl.constexpr, BIASED: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BN columns as they are; or, where QUANT is set, 128 in fp8, one part after the other."""
    row = block * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(SORTED + row)
    valid = pair < pairs
    row = row.to(tl.int64)
    column = tl.arange(0, BN)
    out = H + row[:, None] * h_row + column[None, :]
    if QUANT:
        first = n * PART
    else:
        first = n * BN
    h = _up_part(X, S, W, WS, BIAS, WEIGHTS, expert, first, pair, valid, x_row, w_rows, w_expert, w_row, w_col, N, K,
                 alpha, limit, KIND, SPLIT, HIDDEN, TOPK, BLOCK, BN, BK, ACT, ON_INPUT, BIASED, SWAP, TMA, EVEN,
                 STAGES)
    if QUANT:
        h = tl.where((first + column < N)[None, :], h.to(tl.float32), 0.0)
        top = largest(h, 1)
        if BN < PART:
            h2 = _up_part(X, S, W, WS, BIAS, WEIGHTS, expert, first + BN, pair, valid, x_row, w_rows, w_expert, w_row,
                          w_col, N, K, alpha, limit, KIND, SPLIT, HIDDEN, TOPK, BLOCK, BN, BK, ACT, ON_INPUT, BIASED,
                          SWAP, TMA, EVEN, STAGES)
            h2 = tl.where((first + BN + column < N)[None, :], h2.to(tl.float32), 0.0)
            top = tl.maximum(top, largest(h2, 1))
        scale = scale_of(top, FMAX)
        tl.store(HS + row * tl.cdiv(N, PART) + n, scale, mask=valid)
        tl.store(out + first, _to_fp8(h, scale[:, None], FMAX, H.dtype.element_ty), mask=valid[:, None])
        if BN < PART:
            tl.store(out + first + BN, _to_fp8(h2, scale[:, None], FMAX, H.dtype.element_ty), mask=valid[:, None])
    else:
        tl.store(out + first, h, mask=valid[:, None] & (first + column < N)[None, :])


@triton.jit(do_not_specialize=["pairs"])
def up(
    X, S, W, WS, BIAS, H, HS, WEIGHTS, SORTED, BLOCKS, TOTAL, pairs, x_row, w_rows, w_expert, w_row, w_col,
    h_row, N, K, alpha, limit,
    KIND: tl.constexpr, FMAX: tl.constexpr, QUANT: tl.constexpr, SPLIT: tl.constexpr, HIDDEN: tl.constexpr,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
    ON_INPUT: tl.constexpr, BIASED: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr, PDL: tl.constexpr,
):
    """H[row] = act of the row's token times w1, for every used row; QUANT: as fp8, and HS its scales."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.load(TOTAL) // BLOCK
    if QUANT:
        tiles_n = tl.cdiv(N, PART)
    else:
        tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), blocks * tiles_n, tl.num_programs(0)):
        block, n = tile_of(tile, blocks, tiles_n, GROUP, XCDS)
        expert = tl.load(BLOCKS + block)
        _up_tile(X, S, W, WS, BIAS, H, HS, WEIGHTS, SORTED, expert, block, n, pairs, x_row, w_rows, w_expert, w_row,
                 w_col, h_row, N, K, alpha, limit, KIND, FMAX, QUANT, SPLIT, HIDDEN, TOPK, BLOCK, BN, BK, ACT, ON_INPUT,
                 BIASED, SWAP, TMA, EVEN, STAGES)


@triton.jit
def _down_tile(
    H, HT, S, W, WS, BIAS, OUT, WEIGHTS, SORTED, expert, block, n, pairs, h_row, w_rows, w_expert, w_row, w_col, N, K,
    KIND: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ON_INPUT: tl.constexpr,
    BIASED: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr, TMA_A: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKED: tl.constexpr = KIND == "fp8_block"
    row = block * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(SORTED + row)
    valid = pair < pairs
    row = row.to(tl.int64)
    first = n * BN
    if SWAP:
        acc = tl.zeros([BN, BLOCK], tl.float32)
    else:
        acc = tl.zeros([BLOCK, BN], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        at = k + tl.arange(0, BK)
        if BLOCKED:
            a_scale = tl.load(S + row * tl.cdiv(K, PART) + k // PART, mask=valid, other=0.0)
            w_scale = _panel(WS, expert, first, N, K, k, BN, False)
        else:
            a_scale, w_scale = 1.0, 1.0
        if TMA_A:
            a = HT.load([block * BLOCK, k])
        else:
            a = tl.load(H + row[:, None] * h_row + at[None, :], mask=valid[:, None], other=0.0)
        w = _weights(W, expert, first, k, N, w_rows, w_expert, w_row, w_col, K, BN, BK, TMA, EVEN)
        acc = _add(acc, a, w, a_scale, w_scale, BLOCKED, False, SWAP)
    if SWAP:
        acc = acc.T
    column = first + tl.arange(0, BN)
    inside = column < N
    if not BLOCKED:
        acc *= tl.load(S + row, mask=valid, other=0.0)[:, None] * _whole(WS, expert, N, column, inside, KIND)
    if BIASED:
        acc += tl.load(BIAS + expert.to(tl.int64) * N + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if not ON_INPUT:
        acc *= tl.load(WEIGHTS + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
    where = OUT + pair.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(where, acc.to(OUT.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["pairs"])
def down(
    H, HT, S, W, WS, BIAS, OUT, WEIGHTS, SORTED, BLOCKS, TOTAL, pairs, h_row, w_rows, w_expert, w_row, w_col,
    N, K,
    KIND: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ON_INPUT: tl.constexpr,
    BIASED: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr, TMA_A: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr, PDL: tl.constexpr,
):
    """OUT[pair] = weighted row of H times w2, for every used row."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.load(TOTAL) // BLOCK
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), blocks * tiles_n, tl.num_programs(0)):
        block, n = tile_of(tile, blocks, tiles_n, GROUP, XCDS)
        expert = tl.load(BLOCKS + block)
        _down_tile(H, HT, S, W, WS, BIAS, OUT, WEIGHTS, SORTED, expert, block, n, pairs, h_row, w_rows, w_expert,
                   w_row, w_col, N, K, KIND, BLOCK, BN, BK, ON_INPUT, BIASED, SWAP, TMA, TMA_A, EVEN,
                   STAGES)
