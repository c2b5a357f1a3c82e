"""The Triton kernels of an MoE layer for very few tokens: two launches, without sorting, as matrix-vector products.

Each program reads a few whole rows of weights, all at once where they fit into registers: what decides is how many
bytes are on their way. `down` asks for its weights before it waits for `up` (programmatic dependent launch), so that
the memory never rests between the two.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecache.kernels.moe_gemm_triton import activate


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
def up(
    X, W, BIAS, H, IDS, MAP, WEIGHTS, x_row, w_expert, w_row, ids_row, ids_col, N, K, alpha, limit,
    TOPK: tl.constexpr, G: tl.constexpr, E: tl.constexpr, MAPPED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACT: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """H[pair, n] = act(x · gate_n) · (x · up_n) for BN columns of one pair."""
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
                u = tl.load(up_at + k, eviction_policy="evict_first")
                x = tl.load(x_at + k)
            else:
                inside = at + k < K
                g = tl.load(gate_at + k, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
                u = tl.load(up_at + k, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
                x = tl.load(x_at + k, mask=inside, other=0.0)
            gate += _products(g, x, BN, BK)
            up += _products(u, x, BN, BK)
        g1 = tl.sum(gate, 1)
        u1 = tl.sum(up, 1)
        if WEIGHTED:
            weight = tl.load(WEIGHTS + pair).to(tl.float32)
            g1 *= weight
            u1 *= weight
        if BIASED:
            g1 += tl.load(BIAS + expert.to(tl.int64) * 2 * N + row).to(tl.float32)
            u1 += tl.load(BIAS + expert.to(tl.int64) * 2 * N + N + row).to(tl.float32)
        tl.store(H + pair.to(tl.int64) * N + n, activate(g1, u1, ACT, alpha, limit).to(H.dtype.element_ty), mask=n < N)


@triton.jit
def down(
    H, W, BIAS, OUT, IDS, MAP, WEIGHTS, w_expert, w_row, ids_row, ids_col, out_row, N, K,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, G: tl.constexpr, E: tl.constexpr, MAPPED: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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
    h = tl.load(h_at, mask=(expert >= 0)[:, None] & (at < K)[None, :], other=0.0).to(tl.float32) * weight[:, None]
    acc = tl.sum(tl.reshape(w.to(tl.float32) * h[:, None, :], [SLOTS, BN, BK // 8, 8]), 3)
    for k in range(BK, K, BK):
        inside = at + k < K
        w = tl.load(w_at + k, mask=live & inside[None, None, :], other=0.0, eviction_policy="evict_first")
        h = tl.load(h_at + k, mask=(expert >= 0)[:, None] & inside[None, :], other=0.0).to(tl.float32) * weight[:, None]
        acc += tl.sum(tl.reshape(w.to(tl.float32) * h[:, None, :], [SLOTS, BN, BK // 8, 8]), 3)
    y = tl.sum(tl.sum(acc, 2), 0)
    if BIASED:
        bias = tl.load(BIAS + expert.to(tl.int64)[:, None] * N + row[None, :], mask=(expert >= 0)[:, None], other=0.0)
        y += tl.sum(bias.to(tl.float32) * weight[:, None], 0)
    tl.store(OUT + token.to(tl.int64) * out_row + n, y.to(OUT.dtype.element_ty), mask=n < N)
