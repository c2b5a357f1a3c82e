"""The Triton kernels of an MoE layer for very few tokens: two launches, without sorting, as matrix-vector products.

Each program reads a few whole rows of weights, all at once where they fit into registers: what decides is how many
bytes are on their way. `down` asks for its weights before it waits for `up` (programmatic dependent launch), so that
the memory never rests between the two.

With FMAX the weights are fp8 in blocks of 128 × 128 with scales WS, and tokens and intermediate go through fp8 by 128
columns, FMAX being fp8's largest value; each program does that for itself. APART: gate and up have blocks of their own.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecache.kernels import agreed
from moecache.kernels.gemm.fp8_tile import largest, scale_of
from moecache.kernels.gemm.tile import activate, panels

DECODE_PAIRS = 64  # that are worth it: a shared expert's weights are read once a pair
PART = tl.constexpr(agreed.BLOCK)


@triton.jit
def _expert(id, MAP, G: tl.constexpr, E: tl.constexpr, MAPPED: tl.constexpr):
    """Local expert of router ids, −1 where none serves here."""
    expert = tl.where((id >= 0) & (id < G), id, -1).to(tl.int32)
    if MAPPED:
        expert = tl.load(MAP + expert, mask=expert >= 0, other=-1).to(tl.int32)
        expert = tl.where((expert >= 0) & (expert < E), expert, -1)
    return expert


@triton.jit
def _products(w, x, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK / 8] sums of eight neighbouring products of w [BN, BK] and x [BK]: neighbours sit in one thread."""
    product = w.to(tl.float32) * x.to(tl.float32)[None, :]
    return tl.sum(tl.reshape(product, [BN, BK // 8, 8]), 2)


@triton.jit
def _through_fp8(x, ROWS: tl.constexpr, BK: tl.constexpr, FMAX: tl.constexpr, FP8: tl.constexpr):
    """[ROWS, BK] rounded to fp8 by 128 columns, as float32."""
    parts = tl.reshape(x.to(tl.float32), [ROWS, BK // PART, PART])
    scale = scale_of(largest(parts, 2), FMAX)[:, :, None]
    near = tl.minimum(tl.maximum(parts / scale, -FMAX), FMAX).to(FP8).to(tl.float32) * scale
    return tl.reshape(near, [ROWS, BK])


@triton.jit
def _scales(WS, block, k, K, BK: tl.constexpr):
    """Scales of every eight weights side by side at columns k … + BK; `block` [..., 1] says where their rows' begin. Of
    no expert it is negative: another's NaN must not come in."""
    part = (k + tl.arange(0, BK // 8) * 8) // PART
    where = WS + block * tl.cdiv(K, PART) + part
    return tl.load(where, mask=(block >= 0) & (part < tl.cdiv(K, PART)), other=0.0)


@triton.jit(do_not_specialize=["ids_row", "ids_col"])
def up(
    X, W, WS, BIAS, H, IDS, MAP, WEIGHTS, x_row, w_expert, w_row, ids_row, ids_col, N, K, alpha, limit,
    TOPK: tl.constexpr, G: tl.constexpr, E: tl.constexpr, MAPPED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACT: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, EVEN: tl.constexpr, FMAX: tl.constexpr,
    APART: tl.constexpr, PDL: tl.constexpr,
):
    """H[pair, n] = act(x · gate_n) · (x · up_n), or act(x · w_n) without a gate, for BN columns of one pair."""
    PANELS: tl.constexpr = panels(ACT)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tiles = tl.cdiv(N, BN)
    pair = tl.program_id(0) // tiles
    token = pair // TOPK
    expert = _expert(tl.load(IDS + token.to(tl.int64) * ids_row + pair % TOPK * ids_col), MAP, G, E, MAPPED)
    if expert >= 0:
        n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
        row = tl.minimum(n, N - 1)
        at = tl.arange(0, BK)
        gate_at = W + expert.to(tl.int64) * w_expert + row.to(tl.int64)[:, None] * w_row + at[None, :]
        up_at = gate_at + tl.cast(N, tl.int64) * w_row  # N is a constant where it is 1
        x_at = X + token.to(tl.int64) * x_row + at
        gate = tl.zeros([BN, BK // 8], tl.float32)
        up = tl.zeros([BN, BK // 8], tl.float32)
        for k in range(0, K, BK):
            if EVEN:
                g = tl.load(gate_at + k, eviction_policy="evict_first")
                if PANELS == 2:
                    u = tl.load(up_at + k, eviction_policy="evict_first")
                x = tl.load(x_at + k)
            else:
                inside = at + k < K
                g = tl.load(gate_at + k, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
                if PANELS == 2:
                    u = tl.load(up_at + k, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
                x = tl.load(x_at + k, mask=inside, other=0.0)
            if FMAX > 0:
                x = tl.reshape(_through_fp8(x[None, :], 1, BK, FMAX, W.dtype.element_ty), [BK])
                side = N
                if APART:
                    side = tl.cdiv(N, PART) * PART
                first = expert.to(tl.int64) * tl.cdiv(PANELS * side, PART)
                gate += _products(g, x, BN, BK) * _scales(WS, (first + row // PART)[:, None], k, K, BK)
                if PANELS == 2:
                    up += _products(u, x, BN, BK) * _scales(WS, (first + (side + row) // PART)[:, None], k, K, BK)
            else:
                gate += _products(g, x, BN, BK)
                if PANELS == 2:
                    up += _products(u, x, BN, BK)
        g1 = tl.sum(gate, 1)
        u1 = tl.sum(up, 1)
        if WEIGHTED:
            weight = tl.load(WEIGHTS + pair).to(tl.float32)
            g1 *= weight
            u1 *= weight
        if BIASED:
            g1 += tl.load(BIAS + expert.to(tl.int64) * PANELS * N + row).to(tl.float32)
            if PANELS == 2:
                u1 += tl.load(BIAS + expert.to(tl.int64) * PANELS * N + N + row).to(tl.float32)
        tl.store(H + pair.to(tl.int64) * N + n, activate(g1, u1, ACT, alpha, limit).to(H.dtype.element_ty), mask=n < N)


@triton.jit
def _part(
    w, h_at, WS, block, weight, expert, at, k, K, SLOTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FMAX: tl.constexpr,
):
    """[SLOTS, BN, BK / 8] sums of eight neighbouring products of w [SLOTS, BN, BK] and the weighted rows of H."""
    here = (expert >= 0)[:, None] & (at + k < K)[None, :]
    h = tl.load(h_at + k, mask=here, other=0.0).to(tl.float32)
    if FMAX > 0:
        h = _through_fp8(h, SLOTS, BK, FMAX, w.dtype)
    h *= weight[:, None]
    sums = tl.sum(tl.reshape(w.to(tl.float32) * h[:, None, :], [SLOTS, BN, BK // 8, 8]), 3)
    if FMAX > 0:
        sums *= _scales(WS, block, k, K, BK)
    return sums


@triton.jit(do_not_specialize=["ids_row", "ids_col"])
def down(
    H, W, WS, BIAS, OUT, IDS, MAP, WEIGHTS, w_expert, w_row, ids_row, ids_col, out_row, N, K,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, G: tl.constexpr, E: tl.constexpr, MAPPED: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, FMAX: tl.constexpr, PDL: tl.constexpr,
):
    """OUT[token, n] = weighted sum over the token's slots of H[pair] · w2_n, for BN columns n; SLOTS ≥ TOPK."""
    tiles = tl.cdiv(N, BN)
    token = tl.program_id(0) // tiles
    slot = tl.arange(0, SLOTS)
    id = tl.load(IDS + token.to(tl.int64) * ids_row + slot * ids_col, mask=slot < TOPK, other=-1)
    expert = _expert(id, MAP, G, E, MAPPED)
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1)
    at = tl.arange(0, BK)
    live = (expert >= 0)[:, None, None]
    w_at = (
        W + expert.to(tl.int64)[:, None, None] * w_expert + row.to(tl.int64)[None, :, None] * w_row + at[None, None, :]
    )
    w = tl.load(w_at, mask=live & (at < K)[None, None, :], other=0.0, eviction_policy="evict_first")
    weight = tl.load(WEIGHTS + token * TOPK + slot, mask=expert >= 0, other=0.0).to(tl.float32)
    if not WEIGHTED:
        weight = tl.full([SLOTS], 1.0, tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    h_at = H + (token * TOPK + slot).to(tl.int64)[:, None] * K + at[None, :]
    block = (expert.to(tl.int64)[:, None] * tl.cdiv(N, PART) + (row // PART)[None, :])[:, :, None]
    acc = _part(w, h_at, WS, block, weight, expert, at, 0, K, SLOTS, BN, BK, FMAX)
    for k in range(BK, K, BK):
        w = tl.load(w_at + k, mask=live & (at + k < K)[None, None, :], other=0.0, eviction_policy="evict_first")
        acc += _part(w, h_at, WS, block, weight, expert, at, k, K, SLOTS, BN, BK, FMAX)
    y = tl.sum(tl.sum(acc, 2), 0)
    if BIASED:
        bias = tl.load(BIAS + expert.to(tl.int64)[:, None] * N + row[None, :], mask=(expert >= 0)[:, None], other=0.0)
        y += tl.sum(bias.to(tl.float32) * weight[:, None], 0)
    tl.store(OUT + token.to(tl.int64) * out_row + n, y.to(OUT.dtype.element_ty), mask=n < N)
