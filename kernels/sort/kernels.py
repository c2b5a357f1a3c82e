"""The Triton kernels of MoE sorting: all in one launch, or split over all units in phases.

Both place a (token, slot) pair at `start of its expert + number of earlier pairs of that expert`, so their results
agree bit for bit. Ids outside [0, E), and ids that the expert map masks, take part nowhere.

Names: pairs are numbered token · K + slot; `start`/`end` are padded rows of an expert; EB is E rounded up to a power of
two; bucket levels are those of moecache.routing.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecache.schemas import problem

ACTIVE_LEVELS = tl.constexpr(problem.ACTIVE_LEVELS)
EFFECTIVE_LEVELS = tl.constexpr(problem.EFFECTIVE_LEVELS)
FILL = tl.constexpr(512)  # rows filled at a time behind the last used row


@triton.jit
def _overlap():
    """Wait for the launch before this one, then let the next one start its launch. In this order: kernels that invite
    their successor before they wait pile up on the units (H200: 2.9 µs a sort in a chain of 20, 4.8 in one of 128).
    """
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def _experts(IDS, row_stride, col_stride, EXPERT_MAP, pair, n, K: tl.constexpr, E: tl.constexpr, MAPPED: tl.constexpr):
    """Expert of each pair, −1 where it takes no part."""
    where = (pair // K).to(tl.int64) * row_stride + (pair % K).to(tl.int64) * col_stride
    expert = tl.load(IDS + where, mask=pair < n, other=-1)
    valid = (expert >= 0) & (expert < E)
    expert = tl.where(valid, expert, -1).to(tl.int32)
    if MAPPED:
        expert = tl.load(EXPERT_MAP + expert, mask=valid, other=-1).to(tl.int32)
        expert = tl.where((expert >= 0) & (expert < E), expert, -1)
    return expert


@triton.jit
def _pairs(NUM_TOKENS, n, K: tl.constexpr, LIMITED: tl.constexpr):
    """Pairs that take part: all, or those of the first NUM_TOKENS[0] tokens."""
    if LIMITED:
        n = tl.minimum(n, tl.maximum(tl.load(NUM_TOKENS), 0).to(tl.int32) * K)
    return n


@triton.jit
def _counts(expert, EB: tl.constexpr, B: tl.constexpr, COMPARISONS: tl.constexpr):
    """Pairs of each expert among B. Triton 3.6 makes a histogram with one shared atomic per bin and warp (1.7 µs for
    512 bins on an H200), so few pairs are compared with all bins instead."""
    if B * EB <= COMPARISONS:
        counts = tl.sum((expert[:, None] == tl.arange(0, EB)[None, :]).to(tl.int32), 0)
    else:
        counts = tl.histogram(tl.maximum(expert, 0), EB, mask=expert >= 0)
    return counts


@triton.jit
def _count_range(
    IDS, row_stride, col_stride, EXPERT_MAP, low, high,
    K: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, MAPPED: tl.constexpr, B: tl.constexpr,
):
    """Pairs of each expert among pairs low … high−1, B at a time."""
    counts = tl.zeros([EB], tl.int32)
    for at in range(low, high, B):
        expert = _experts(IDS, row_stride, col_stride, EXPERT_MAP, at + tl.arange(0, B), high, K, E, MAPPED)
        counts += _counts(expert, EB, B, 8192)
    return counts


@triton.jit
def _ends(counts, BM: tl.constexpr):
    """(padded counts, end row) of every expert."""
    padded = (counts + (BM - 1)) // BM * BM
    return padded, tl.cumsum(padded, 0)


@triton.jit
def _summary(counts, padded, end, TOTAL, OFFSETS, COUNTS, TICKETS, POSTED, tokens, E: tl.constexpr, EB: tl.constexpr):
    """What one program writes for all: counts, offsets, totals, no tickets and the posted routing bucket."""
    expert = tl.arange(0, EB)
    real = expert < E
    tl.store(COUNTS + expert, counts, mask=real)
    tl.store(OFFSETS + expert, end - padded, mask=real)
    total = tl.sum(padded, 0)
    tl.store(OFFSETS + E, total)
    tl.store(TOTAL, total)
    tl.store(TOTAL + 1, tokens)
    tl.store(TICKETS + tl.arange(0, 8), tl.zeros([8], tl.int32))
    pairs = tl.sum(counts, 0).to(tl.int64)
    reachable = tl.minimum(pairs, E)
    active = tl.sum((counts > 0).to(tl.int32), 0)
    squares = tl.sum(counts.to(tl.int64) * counts.to(tl.int64), 0)
    a = 0
    e = 0
    for k in tl.static_range(ACTIVE_LEVELS - 1):
        a += (active * (3 << k) <= 2 * reachable).to(tl.int32)
    for k in tl.static_range(EFFECTIVE_LEVELS - 1):
        e += (pairs * pairs * (3 << k) <= 2 * reachable * squares).to(tl.int32)
    bucket = tl.where(pairs > 0, a * EFFECTIVE_LEVELS + e, 0)
    tl.store(POSTED, bucket)


@triton.jit
def _put(
    SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, WEIGHTS, EXPERT_MAP, weight_row, weight_col, pair, expert, row, valid,
    K: tl.constexpr, BM: tl.constexpr, PACKED: tl.constexpr, WEIGHTED: tl.constexpr, LABELLED: tl.constexpr,
):
    """Write pairs to their rows; the pair that opens a block names the block's expert."""
    name = pair
    if PACKED:
        name = ((pair % K) << 24) | (pair // K)
    tl.store(SORTED + row, name, mask=valid)
    if WEIGHTED:
        at = (pair // K).to(tl.int64) * weight_row + (pair % K).to(tl.int64) * weight_col
        tl.store(SORTED_WEIGHTS + row, tl.load(WEIGHTS + at, mask=valid, other=0.0), mask=valid)
    label = expert
    opens = valid & (row % BM == 0)
    if LABELLED:
        label = tl.load(EXPERT_MAP + expert, mask=opens, other=-1).to(tl.int32)
    tl.store(BLOCK_EXPERTS + row // BM, label, mask=opens)


@triton.jit
def _pad(SORTED, SORTED_WEIGHTS, first, last, pad, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr):
    """Rows first[i] … last[i]−1, at most WIDTH of them, become padding."""
    row = first[:, None] + tl.arange(0, WIDTH)[None, :]
    inside = row < last[:, None]
    tl.store(SORTED + row, tl.zeros_like(row) + pad, mask=inside)
    if WEIGHTED:
        tl.store(SORTED_WEIGHTS + row, tl.zeros_like(row).to(tl.float32), mask=inside)


@triton.jit
def _pad_and_tail(
    SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, counts, padded, end, capacity, pad, program,
    EB: tl.constexpr, BM: tl.constexpr, PB: tl.constexpr, WEIGHTED: tl.constexpr, PROGRAMS: tl.constexpr,
):
    """This program's share of what holds no pair: the padding of its experts, and everything behind the last used row
    (padding there too, and −1 for the expert of a block)."""
    each: tl.constexpr = (EB + PROGRAMS - 1) // PROGRAMS
    if program * each < EB:
        slot = program * each + tl.arange(0, each)
        last = tl.gather(end, slot, 0)
        first = last - tl.gather(padded - counts, slot, 0)
        _pad(SORTED, SORTED_WEIGHTS, first, last, pad, PB, WEIGHTED)
    total = tl.sum(padded, 0)
    for at in range(total + program * FILL, capacity, PROGRAMS * FILL):
        row = at + tl.arange(0, FILL)
        tl.store(SORTED + row, tl.zeros_like(row) + pad, mask=row < capacity)
        if WEIGHTED:
            tl.store(SORTED_WEIGHTS + row, tl.zeros_like(row).to(tl.float32), mask=row < capacity)
    blocks = (capacity + BM - 1) // BM
    for at in range(total // BM + program * FILL, blocks, PROGRAMS * FILL):
        block = at + tl.arange(0, FILL)
        tl.store(BLOCK_EXPERTS + block, tl.zeros_like(block) - 1, mask=block < blocks)


@triton.jit(do_not_specialize=["row_stride", "col_stride", "weight_row", "weight_col", "n", "capacity"])
def oneshot(
    IDS, WEIGHTS, EXPERT_MAP, NUM_TOKENS, SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, TOTAL, OFFSETS, COUNTS, TICKETS,
    POSTED, row_stride, col_stride, weight_row, weight_col, n, capacity,
    K: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, BM: tl.constexpr, PB: tl.constexpr,
    MAPPED: tl.constexpr, LABELLED: tl.constexpr, LIMITED: tl.constexpr, PACKED: tl.constexpr, WEIGHTED: tl.constexpr,
    B: tl.constexpr, STEP: tl.constexpr, PROGRAMS: tl.constexpr, PDL: tl.constexpr,
):
    """One launch, no handshake: every program reads all pairs (B ≥ n of them), counts them, and compares its own STEP
    pairs with all that come before. B · STEP comparisons are cheap while pairs are few, and nothing is in series."""
    if PDL:
        _overlap()
    program = tl.program_id(0)
    pad = n
    if PACKED:
        pad = (K << 24) | (n // K)
    n = _pairs(NUM_TOKENS, n, K, LIMITED)
    every = tl.arange(0, B)
    expert = _experts(IDS, row_stride, col_stride, EXPERT_MAP, every, n, K, E, MAPPED)
    counts = _counts(expert, EB, B, 65536 if EB >= 256 else 8192)
    padded, end = _ends(counts, BM)
    if program * STEP < n:
        pair = program * STEP + tl.arange(0, STEP)
        mine = _experts(IDS, row_stride, col_stride, EXPERT_MAP, pair, n, K, E, MAPPED)
        row = tl.gather(end - padded, tl.maximum(mine, 0), 0) + _rank(every, expert, pair, mine)
        _put(SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, WEIGHTS, EXPERT_MAP, weight_row, weight_col, pair, mine, row,
             mine >= 0, K, BM, PACKED, WEIGHTED, LABELLED)
    _pad_and_tail(SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, counts, padded, end, capacity, pad, program, EB, BM, PB,
                  WEIGHTED, PROGRAMS)
    if program == PROGRAMS - 1:
        _summary(counts, padded, end, TOTAL, OFFSETS, COUNTS, TICKETS, POSTED, n // K, E, EB)


@triton.jit
def _rank(other, other_expert, pair, expert):
    """Of each pair: how many of the others have its expert and come before it. The others lie on axis 0, so that a
    thread sums most of them itself; on axis 1 every sum would go across lanes."""
    earlier = (other_expert[:, None] == expert[None, :]) & (other[:, None] < pair[None, :])
    return tl.sum(earlier.to(tl.int32), 0)


@triton.jit
def _place_range(
    IDS, WEIGHTS, EXPERT_MAP, SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, row_stride, col_stride, weight_row, weight_col, n,
    next_row, low, high,
    K: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, BM: tl.constexpr,
    MAPPED: tl.constexpr, LABELLED: tl.constexpr, PACKED: tl.constexpr, WEIGHTED: tl.constexpr, STEP: tl.constexpr,
):
    """Place pairs low … high−1; next_row[e] is the row of the next pair of expert e."""
    for at in range(low, high, STEP):
        pair = at + tl.arange(0, STEP)
        expert = _experts(IDS, row_stride, col_stride, EXPERT_MAP, pair, tl.minimum(n, high), K, E, MAPPED)
        row = tl.gather(next_row, tl.maximum(expert, 0), 0) + _rank(pair, expert, pair, expert)
        _put(SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, WEIGHTS, EXPERT_MAP, weight_row, weight_col, pair, expert, row,
             expert >= 0, K, BM, PACKED, WEIGHTED, LABELLED)
        if at + STEP < high:
            next_row += tl.histogram(tl.maximum(expert, 0), EB, mask=expert >= 0)


@triton.jit
def _count(
    IDS, EXPERT_MAP, TABLE, row_stride, col_stride, n, chunk, chunk_size,
    K: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, MAPPED: tl.constexpr, CHUNKS: tl.constexpr, B: tl.constexpr,
):
    """Pairs of every expert in one chunk, into TABLE[chunk, expert]."""
    last = tl.minimum(n, (chunk + 1) * chunk_size)
    counts = _count_range(IDS, row_stride, col_stride, EXPERT_MAP, chunk * chunk_size, last, K, E, EB, MAPPED, B)
    expert = tl.arange(0, EB)
    tl.store(TABLE + chunk * E + expert, counts, mask=expert < E)


@triton.jit
def _place(
    IDS, WEIGHTS, EXPERT_MAP, TABLE, SUMS, SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, TOTAL, OFFSETS, COUNTS, TICKETS,
    POSTED, row_stride, col_stride, weight_row, weight_col, n, capacity, pad, chunk, chunk_size,
    K: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, BM: tl.constexpr, PB: tl.constexpr,
    MAPPED: tl.constexpr, LABELLED: tl.constexpr, PACKED: tl.constexpr, WEIGHTED: tl.constexpr,
    CHUNKS: tl.constexpr, STEP: tl.constexpr, SCANNED: tl.constexpr,
):
    """From the counts to the rows of one chunk. .cg: other programs of this launch may have written what is read here,
    so it must not come from this unit's L1."""
    slot = tl.arange(0, EB)
    if SCANNED:
        counts = tl.load(SUMS + slot, mask=slot < E, other=0, cache_modifier=".cg")
        before = tl.load(TABLE + chunk * E + slot, mask=slot < E, other=0, cache_modifier=".cg")
    else:
        which = tl.arange(0, CHUNKS)
        table = tl.load(TABLE + which[:, None] * E + slot[None, :], mask=(slot < E)[None, :], other=0,
                        cache_modifier=".cg")
        counts = tl.sum(table, 0)
        before = tl.sum(tl.where(which[:, None] < chunk, table, 0), 0)
    padded, end = _ends(counts, BM)
    _place_range(
        IDS, WEIGHTS, EXPERT_MAP, SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, row_stride, col_stride, weight_row, weight_col,
        n, end - padded + before, chunk * chunk_size, tl.minimum(n, (chunk + 1) * chunk_size),
        K, E, EB, BM, MAPPED, LABELLED, PACKED, WEIGHTED, STEP,
    )
    _pad_and_tail(SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, counts, padded, end, capacity, pad, chunk, EB, BM, PB,
                  WEIGHTED, CHUNKS)
    if chunk == CHUNKS - 1:
        _summary(counts, padded, end, TOTAL, OFFSETS, COUNTS, TICKETS, POSTED, n // K, E, EB)


@triton.jit
def _handshake(SLOT, PROGRAMS: tl.constexpr):
    """Wait until all programs have arrived. SLOT[0] grows by 2^16 a handshake, so it is never reset and a replayed
    graph needs no memset. The poll is an atomic: Triton 3.6 to 3.8 hoist a volatile load out of the loop on CDNA."""
    step = tl.where(tl.program_id(0) == 0, 65536 - (PROGRAMS - 1), 1)
    tl.debug_barrier()
    epoch = tl.atomic_add(SLOT, step, sem="acq_rel", scope="gpu") >> 16
    while (tl.atomic_add(SLOT, 0, sem="acquire", scope="gpu") >> 16) == epoch:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["row_stride", "col_stride", "n", "chunk_size"])
def count(
    IDS, EXPERT_MAP, NUM_TOKENS, TABLE, row_stride, col_stride, n, chunk_size,
    K: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, MAPPED: tl.constexpr, LIMITED: tl.constexpr,
    CHUNKS: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):
    """Phase 1 as a launch of its own."""
    if PDL:
        _overlap()
    n = _pairs(NUM_TOKENS, n, K, LIMITED)
    chunk = tl.program_id(0)
    _count(IDS, EXPERT_MAP, TABLE, row_stride, col_stride, n, chunk, chunk_size, K, E, EB, MAPPED, CHUNKS, B)


@triton.jit
def scan(TABLE, SUMS, E: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """Phase 2 for many chunks: TABLE[c, e] becomes the pairs of expert e before chunk c, SUMS[e] their number. WIDTH
    experts a program: a wide program is slow, a narrow one reads part of a 32-byte sector."""
    if PDL:
        _overlap()
    expert = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    at = TABLE + tl.arange(0, CHUNKS)[:, None] * E + expert[None, :]
    inside = (expert < E)[None, :]
    counts = tl.load(at, mask=inside, other=0)
    tl.store(at, tl.cumsum(counts, 0) - counts, mask=inside)
    tl.store(SUMS + expert, tl.sum(counts, 0), mask=expert < E)


@triton.jit(do_not_specialize=["row_stride", "col_stride", "weight_row", "weight_col", "n", "capacity", "chunk_size"])
def place(
    IDS, WEIGHTS, EXPERT_MAP, NUM_TOKENS, TABLE, SUMS, SLOT, SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, TOTAL, OFFSETS,
    COUNTS, TICKETS, POSTED, row_stride, col_stride, weight_row, weight_col, n, capacity, chunk_size,
    K: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, BM: tl.constexpr, PB: tl.constexpr,
    MAPPED: tl.constexpr, LABELLED: tl.constexpr, LIMITED: tl.constexpr, PACKED: tl.constexpr, WEIGHTED: tl.constexpr,
    CHUNKS: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr, SCANNED: tl.constexpr, FUSED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The last phase; FUSED runs phase 1 and a grid-wide handshake before it, and then needs all programs resident."""
    if PDL:
        _overlap()
    chunk = tl.program_id(0)
    pad = n
    if PACKED:
        pad = (K << 24) | (n // K)
    n = _pairs(NUM_TOKENS, n, K, LIMITED)
    if FUSED:
        _count(IDS, EXPERT_MAP, TABLE, row_stride, col_stride, n, chunk, chunk_size, K, E, EB, MAPPED, CHUNKS, B)
        _handshake(SLOT, CHUNKS)
    _place(IDS, WEIGHTS, EXPERT_MAP, TABLE, SUMS, SORTED, SORTED_WEIGHTS, BLOCK_EXPERTS, TOTAL, OFFSETS, COUNTS,
           TICKETS, POSTED, row_stride, col_stride, weight_row, weight_col, n, capacity, pad, chunk, chunk_size,
           K, E, EB, BM, PB, MAPPED, LABELLED, PACKED, WEIGHTED, CHUNKS, STEP, SCANNED)
