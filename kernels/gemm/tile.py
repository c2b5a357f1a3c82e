"""The Triton kernels of the two products of an MoE layer over sorted rows, and of the sum over a token's experts.

`up` gathers the rows of the tokens and writes act(x · gateᵀ) · (x · upᵀ), or act(x · w1ᵀ) without a gate; `down`
multiplies those rows with the second weight and scatters them to their (token, slot) pair; `combine` adds a token's
pairs up. Rows are those of MoE sorting: blocks of BM rows of one expert, padding at the end of an expert's last block.

Names: W is a pointer, or a tensor descriptor over [experts · rows, K] where TMA is set. SWAP computes the transposed
product, so that few rows of tokens stand where the matrix unit wants few columns.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecache.kernels import activations

bare = triton.constexpr_function(activations.bare)
panels = triton.constexpr_function(activations.panels)


@triton.jit
def tile_of(tile, blocks, tiles_n, GROUP: tl.constexpr, XCDS: tl.constexpr):
    """(block of rows, tile of columns): GROUP blocks share a panel of weights before the next panel is read."""
    if XCDS > 1:  # neighbours share an L2 only within one die
        total = blocks * tiles_n
        share = total // XCDS
        if tile < share * XCDS:
            tile = tile % XCDS * share + tile // XCDS
    if GROUP == 1:
        m = tile // tiles_n
        n = tile % tiles_n
    else:
        width = GROUP * tiles_n
        first = tile // width * GROUP
        size = tl.minimum(blocks - first, GROUP)
        m = first + tile % width % size
        n = tile % width // size
    return m, n


@triton.jit
def weights_at(
    W, expert, row0, k, rows, height, w_expert, w_row, K,
    BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
):
    """[BN, BK] of an expert's weight; columns past K are 0, rows past its height are anything. A descriptor spans all
    experts, `rows` apart."""
    if TMA:
        w = W.load([expert * rows + row0, k])
    else:
        at = k + tl.arange(0, BK)
        row = tl.minimum(row0 + tl.arange(0, BN), height - 1)
        where = W + expert.to(tl.int64) * w_expert + row.to(tl.int64)[:, None] * w_row + at[None, :]
        if EVEN:
            w = tl.load(where)
        else:
            w = tl.load(where, mask=at[None, :] < K, other=0.0)
    return w


@triton.jit
def _dot(a, w, acc, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.dot(w, a.T, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, w.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _act(g, NAME: tl.constexpr):
    if NAME == "silu":
        h = g * tl.sigmoid(g)
    elif NAME == "gelu":
        h = 0.5 * g * (1.0 + tl.math.erf(g * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh(x)) / 2 is sigmoid(2x)
        h = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        tl.static_assert(NAME == "relu2")
        g = tl.where(g < 0.0, 0.0, g)  # a maximum would lose NaN
        h = g * g
    return h


@triton.jit
def activate(g, u, ACT: tl.constexpr, alpha, limit):
    """ACT is a word of activations.py; without a gate, `g` is the only panel and `u` anything."""
    NAME: tl.constexpr = bare(ACT)
    if panels(ACT) == 1:
        h = _act(g, NAME)
    elif NAME == "swiglu_oai":
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        h = (u + 1.0) * g * tl.sigmoid(alpha * g)
    elif NAME == "silu_limited":  # NaN stays, which a minimum would lose
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        h = _act(g, "silu") * u
    else:
        h = _act(g, NAME) * u
    return h


@triton.jit
def _up_tile(
    X, W, BIAS, H, WEIGHTS, SORTED, expert, block, n, pairs, x_row, rows, w_expert, w_row, N, K, alpha, limit,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACT: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,
):
    """The first BM rows of a block of BLOCK rows times the columns of one tile."""
    row = block * BLOCK + tl.arange(0, BM)
    pair = tl.load(SORTED + row)
    valid = pair < pairs
    x = X + (pair // TOPK).to(tl.int64)[:, None] * x_row
    first = n * BN
    PANELS: tl.constexpr = panels(ACT)
    if SWAP:
        gate = tl.zeros([BN, BM], tl.float32)
        up = tl.zeros([BN, BM], tl.float32)
    else:
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        at = k + tl.arange(0, BK)
        if EVEN:
            a = tl.load(x + at[None, :], mask=valid[:, None], other=0.0)
        else:
            a = tl.load(x + at[None, :], mask=valid[:, None] & (at[None, :] < K), other=0.0)
        g = weights_at(W, expert, first, k, rows, PANELS * N, w_expert, w_row, K, BN, BK, TMA, EVEN)
        if PANELS == 2:
            u = weights_at(W, expert, N + first, k, rows, PANELS * N, w_expert, w_row, K, BN, BK, TMA, EVEN)
        gate = _dot(a, g, gate, SWAP)
        if PANELS == 2:
            up = _dot(a, u, up, SWAP)
    if SWAP:
        gate = gate.T
        up = up.T
    column = first + tl.arange(0, BN)
    inside = column < N
    if WEIGHTED:
        scale = tl.load(WEIGHTS + pair, mask=valid, other=0.0).to(tl.float32)
        gate *= scale[:, None]
        up *= scale[:, None]
    if BIASED:
        bias = BIAS + expert.to(tl.int64) * PANELS * N + column
        gate += tl.load(bias, mask=inside, other=0.0).to(tl.float32)[None, :]
        if PANELS == 2:
            up += tl.load(bias + N, mask=inside, other=0.0).to(tl.float32)[None, :]
    h = activate(gate, up, ACT, alpha, limit).to(H.dtype.element_ty)
    tl.store(H + row.to(tl.int64)[:, None] * N + column[None, :], h, mask=valid[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["pairs"])
def up(
    X, W, BIAS, H, WEIGHTS, SORTED, BLOCKS, TOTAL, pairs, x_row, rows, w_expert, w_row, N, K, alpha, limit,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACT: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr, PDL: tl.constexpr,
):
    """H[row] = act of the row's token times w1, for every used row; a block with few rows takes a tile of LOW rows."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.load(TOTAL) // BLOCK
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), blocks * tiles_n, tl.num_programs(0)):
        block, n = tile_of(tile, blocks, tiles_n, GROUP, XCDS)
        expert = tl.load(BLOCKS + block)
        few = False
        if LOW < BLOCK:
            few = tl.load(SORTED + block * BLOCK + LOW) >= pairs  # padding comes last in a block
            if few:
                _up_tile(X, W, BIAS, H, WEIGHTS, SORTED, expert, block, n, pairs, x_row, rows, w_expert, w_row, N, K,
                         alpha, limit, TOPK, BLOCK, LOW, BN, BK, ACT, WEIGHTED, BIASED, True, TMA, EVEN,
                         STAGES)
        if not few:
            _up_tile(X, W, BIAS, H, WEIGHTS, SORTED, expert, block, n, pairs, x_row, rows, w_expert, w_row, N, K, alpha,
                     limit, TOPK, BLOCK, BLOCK, BN, BK, ACT, WEIGHTED, BIASED, SWAP, TMA, EVEN, STAGES)


@triton.jit
def _down_tile(
    A, AT, W, BIAS, OUT, WEIGHTS, SORTED, ROWS, expert, block, n, pairs, a_row, rows, w_expert, w_row, out_row, N, K,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SOURCE: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, ATOMIC: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, TMA_A: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):
    """The first BM rows of a block of BLOCK rows times the columns of one tile, scattered."""
    row = block * BLOCK + tl.arange(0, BM)
    pair = tl.load(SORTED + row)
    valid = pair < pairs
    source = row
    if SOURCE == 1:
        source = pair
    elif SOURCE == 2:
        source = tl.load(ROWS + pair, mask=valid, other=0)
    a_at = A + source.to(tl.int64)[:, None] * a_row
    first = n * BN
    if SWAP:
        acc = tl.zeros([BN, BM], tl.float32)
    else:
        acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        if TMA_A:
            a = AT.load([block * BLOCK, k])
        else:
            at = k + tl.arange(0, BK)
            if EVEN:
                a = tl.load(a_at + at[None, :], mask=valid[:, None], other=0.0)
            else:
                a = tl.load(a_at + at[None, :], mask=valid[:, None] & (at[None, :] < K), other=0.0)
        w = weights_at(W, expert, first, k, rows, N, w_expert, w_row, K, BN, BK, TMA, EVEN)
        acc = _dot(a, w, acc, SWAP)
    if SWAP:
        acc = acc.T
    column = first + tl.arange(0, BN)
    inside = column < N
    if BIASED:
        acc += tl.load(BIAS + expert.to(tl.int64) * N + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if WEIGHTED:
        acc *= tl.load(WEIGHTS + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
    here = valid[:, None] & inside[None, :]
    if ATOMIC:
        where = OUT + (pair // TOPK).to(tl.int64)[:, None] * out_row + column[None, :]
        tl.atomic_add(where, acc.to(OUT.dtype.element_ty), mask=here, sem="relaxed")
    else:
        where = OUT + pair.to(tl.int64)[:, None] * out_row + column[None, :]
        tl.store(where, acc.to(OUT.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["pairs"])
def down(
    A, AT, W, BIAS, OUT, WEIGHTS, SORTED, BLOCKS, TOTAL, ROWS, pairs, a_row, rows, w_expert, w_row, out_row, N, K,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SOURCE: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, ATOMIC: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, TMA_A: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    XCDS: tl.constexpr, PDL: tl.constexpr,
):
    """OUT[pair] (ATOMIC: added to OUT[pair // TOPK]) = weighted row of A times W, for every used row.

    SOURCE says which row of A: 0 the sorted row itself, 1 the pair, 2 ROWS[pair]. AT is a descriptor over A where TMA_A
    is set, for SOURCE 0.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.load(TOTAL) // BLOCK
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), blocks * tiles_n, tl.num_programs(0)):
        block, n = tile_of(tile, blocks, tiles_n, GROUP, XCDS)
        expert = tl.load(BLOCKS + block)
        few = False
        if LOW < BLOCK:
            few = tl.load(SORTED + block * BLOCK + LOW) >= pairs
            if few:
                _down_tile(A, AT, W, BIAS, OUT, WEIGHTS, SORTED, ROWS, expert, block, n, pairs, a_row, rows, w_expert,
                           w_row, out_row, N, K, TOPK, BLOCK, LOW, BN, BK, SOURCE, WEIGHTED, BIASED, ATOMIC, True, TMA,
                           False, EVEN, STAGES)
        if not few:
            _down_tile(A, AT, W, BIAS, OUT, WEIGHTS, SORTED, ROWS, expert, block, n, pairs, a_row, rows, w_expert,
                       w_row, out_row, N, K, TOPK, BLOCK, BLOCK, BN, BK, SOURCE, WEIGHTED, BIASED, ATOMIC, SWAP, TMA,
                       TMA_A, EVEN, STAGES)


@triton.jit(do_not_specialize=["tokens", "ids_row", "ids_col"])
def combine(
    PARTIAL, IDS, MAP, OUT, ids_row, ids_col, out_row, tokens, N,
    TOPK: tl.constexpr, G: tl.constexpr, E: tl.constexpr, MAPPED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """OUT[token] = sum of the token's pairs, in the order of its slots; pairs that took no part count as 0."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BT, BN], tl.float32)
    for s in tl.static_range(TOPK):
        expert = tl.load(IDS + token.to(tl.int64) * ids_row + s * ids_col, mask=token < tokens, other=-1)
        valid = (expert >= 0) & (expert < G)
        if MAPPED:
            expert = tl.load(MAP + expert, mask=valid, other=-1)
            valid = (expert >= 0) & (expert < E)
        where = PARTIAL + (token.to(tl.int64) * TOPK + s)[:, None] * N + column[None, :]
        acc += tl.load(where, mask=valid[:, None] & (column[None, :] < N), other=0.0).to(tl.float32)
    here = (token[:, None] < tokens) & (column[None, :] < N)
    tl.store(OUT + token.to(tl.int64)[:, None] * out_row + column[None, :], acc.to(OUT.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def lay_out(
    OFFSETS, SORTED, BLOCKS, TOTAL, TICKETS, rows, E: tl.constexpr, EB: tl.constexpr, BLOCK: tl.constexpr,
    BR: tl.constexpr, PDL: tl.constexpr,
):
    """The blocks of rows that are sorted already: group e is rows OFFSETS[e] … OFFSETS[e + 1] − 1. One program a group.

    SORTED, BLOCKS, TOTAL and TICKETS come out as MoE sorting writes them, `rows` standing for padding.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group = tl.program_id(0)
    every = tl.arange(0, EB)
    low = tl.load(OFFSETS + every, mask=every < E, other=0).to(tl.int32)
    high = tl.load(OFFSETS + every + 1, mask=every < E, other=0).to(tl.int32)
    padded = tl.maximum(high - low + BLOCK - 1, 0) // BLOCK * BLOCK
    start = tl.sum(tl.where(every < group, padded, 0), 0)
    own = tl.sum(tl.where(every == group, padded, 0), 0)
    first = tl.load(OFFSETS + group).to(tl.int32)
    last = tl.load(OFFSETS + group + 1).to(tl.int32)
    for at in range(0, own, BR):
        i = at + tl.arange(0, BR)
        name = tl.where(first + i < last, first + i, rows)
        tl.store(SORTED + start + i, name, mask=i < own)
        tl.store(BLOCKS + (start + i) // BLOCK, tl.zeros_like(i) + group, mask=(i < own) & (i % BLOCK == 0))
    if group == E - 1:
        tl.store(TOTAL, start + own)
        tl.store(TICKETS + tl.arange(0, 8), tl.zeros([8], tl.int32))
