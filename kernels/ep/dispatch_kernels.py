"""The Triton kernel of dispatch: each token's row goes once to every rank that holds one of its experts.

The row of token t of rank s lands at row s · capacity + t. So no rank has to count or to ask first, and no atomics
decide on the order. Where no expert of that rank was chosen, the ids of the row are −1 and the row is not written.

Names: NH chunks of BLOCK columns make a row; an item is a chunk of a token. COPY, QUANTISE and SCALED are what a wire
does: bytes as they are, to fp8 with a scale per 128 columns, or fp8 that comes with its scales.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecache.kernels import agreed
from moecache.kernels.ep.signals import address, advance, free, named, owner_of, signal, wait
from moecache.kernels.gemm.fp8_tile import largest, scale_of

GROUP = tl.constexpr(agreed.BLOCK)
COPY, QUANTISE, SCALED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ROWS = tl.constexpr(16)  # rows whose ids and weights are sent at a time
SLOT_FREE, ARRIVED = tl.constexpr(1), tl.constexpr(2)  # phases that an error names


@triton.jit
def _fetch(
    X, X_SCALES, IDS, item, items, K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    WORLD: tl.constexpr, BLOCK: tl.constexpr, NH: tl.constexpr, WIRE: tl.constexpr,
):
    """(columns, their scales, ranks that want them) of an item."""
    token, there = tl.full([], item // NH, tl.int64), item < items
    column = item % NH * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(X + token * H + column, mask=column < tl.where(there, H, 0), other=0)
    slot = tl.arange(0, KP)
    ids = named(IDS, token * K + slot, slot < tl.where(there, K, 0), E)
    group = item % NH * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    if WIRE == SCALED:
        scale = tl.load(X_SCALES + token * (H // GROUP) + group, mask=group < tl.where(there, H // GROUP, 0), other=0.0)
    else:
        scale = tl.zeros([BLOCK // GROUP], tl.float32)
    return row, scale, owner_of(ids, E, WORLD)


@triton.jit
def _quantised(row, TOP: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr):
    """(fp8, scales) of a chunk: the largest of 128 columns becomes the largest fp8. NaN and inf are in the scale."""
    grouped = tl.reshape(row.to(tl.float32), [BLOCK // GROUP, GROUP])
    scale = scale_of(largest(grouped, 1), TOP)
    scaled = tl.minimum(tl.maximum(grouped / scale[:, None], -TOP), TOP)
    return tl.reshape(scaled.to(FP8), [BLOCK]), scale


@triton.jit
def _store(
    PEERS, rows_at, scales_at, row, scale, owner, item, first_row, H: tl.constexpr, WORLD: tl.constexpr,
    BLOCK: tl.constexpr, NH: tl.constexpr, WIRE: tl.constexpr, TYPE: tl.constexpr, TOP: tl.constexpr,
):
    """Store an item on every rank that wants it."""
    if WIRE == QUANTISE:
        row, scale = _quantised(row, TOP, TYPE, BLOCK)
    at = first_row + item // NH
    column = item % NH * BLOCK + tl.arange(0, BLOCK)
    group = item % NH * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    for rank in tl.static_range(WORLD):
        wanted = tl.max((owner == rank).to(tl.int32), 0) > 0
        tl.store(address(PEERS, rank, rows_at, TYPE) + at * H + column, row, mask=column < tl.where(wanted, H, 0))
        if WIRE != COPY:
            scales = address(PEERS, rank, scales_at, tl.float32) + at * (H // GROUP)
            tl.store(scales + group, scale, mask=group < tl.where(wanted, H // GROUP, 0))


@triton.jit
def _send_ids(
    PEERS, ids_at, weights_at, counts_at, IDS, WEIGHTS, tokens, capacity, first_row, me, cta, K: tl.constexpr,
    KP: tl.constexpr, E: tl.constexpr, WORLD: tl.constexpr, PROGRAMS: tl.constexpr,
):
    """Ids and weights of all rows, also of those that hold no token; and how many do. The last programs begin, as
    the first ones have more chunks."""
    slot = tl.arange(0, KP)[None, :]
    for block in range(PROGRAMS - 1 - cta, (capacity + ROWS - 1) // ROWS, PROGRAMS):
        token = (tl.arange(0, ROWS) + block * ROWS)[:, None].to(tl.int64)
        there = (token < tokens) & (slot < K)
        ids = named(IDS, token * K + slot, there, E)
        weights = tl.load(WEIGHTS + token * K + slot, mask=there, other=0.0).to(tl.float32)
        owner = owner_of(ids, E, WORLD)
        at, inside = (first_row + token) * K + slot, (token < capacity) & (slot < K)
        for rank in tl.static_range(WORLD):
            tl.store(address(PEERS, rank, ids_at, tl.int32) + at, tl.where(owner == rank, ids, -1), mask=inside)
            tl.store(address(PEERS, rank, weights_at, tl.float32) + at, weights, mask=inside)
    if cta == PROGRAMS - 1:
        for rank in tl.static_range(WORLD):
            tl.store(address(PEERS, rank, counts_at, tl.int32) + me, tokens)


@triton.jit(do_not_specialize=["tokens", "capacity", "me", "patience"])
def dispatch_rows(
    X, X_SCALES, IDS, WEIGHTS, PEERS, WORDS_HERE, CLOCK, LAST, DRAIN, ERROR,
    tokens, capacity, me, patience, words_at, counts_at, ids_at, weights_at, rows_at, scales_at,
    K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, E: tl.constexpr, WORLD: tl.constexpr, WIDE: tl.constexpr,
    PAIR: tl.constexpr, WORDS: tl.constexpr, SPAN: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
    NH: tl.constexpr, WIRE: tl.constexpr, TYPE: tl.constexpr, TOP: tl.constexpr, SEND: tl.constexpr,
    RECEIVE: tl.constexpr, THREADS: tl.constexpr, HIP: tl.constexpr, PDL: tl.constexpr,
):
    """SEND ids and rows, and tell the peers; RECEIVE what the same program of every peer sends. Halves of a dispatch do
    one after the other.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    cta = tl.program_id(0)
    now = tl.load(CLOCK + cta)
    if SEND:
        first_row, items = me.to(tl.int64) * capacity, tokens * NH
        # The first chunk is on its way while the peers' memory becomes free, each next one while this is stored.
        row, scale, owner = _fetch(X, X_SCALES, IDS, cta, items, K, KP, H, E, WORLD, BLOCK, NH, WIRE)
        if WORLD > 1:
            free(PEERS, WORDS_HERE, words_at, DRAIN, ERROR, me, cta, now, tl.load(LAST + cta), patience, SLOT_FREE,
                 WORLD, WIDE, PAIR, WORDS, THREADS, HIP)
        _send_ids(PEERS, ids_at, weights_at, counts_at, IDS, WEIGHTS, tokens, capacity, first_row, me, cta, K, KP, E,
                  WORLD, PROGRAMS)
        for item in range(cta, items, PROGRAMS):
            row_next, scale_next, owner_next = _fetch(X, X_SCALES, IDS, item + PROGRAMS, items, K, KP, H, E, WORLD,
                                                      BLOCK, NH, WIRE)
            _store(PEERS, rows_at, scales_at, row, scale, owner, item, first_row, H, WORLD, BLOCK, NH, WIRE, TYPE, TOP)
            row, scale, owner = row_next, scale_next, owner_next
        if WORLD > 1:
            signal(PEERS, words_at, DRAIN, me, cta, now + 2, WORLD, WIDE, PAIR, WORDS, THREADS, HIP)
    if RECEIVE:
        if WORLD > 1:
            wait(WORDS_HERE, ERROR, me, cta, now + 2, patience, ARRIVED, WORLD, WIDE, PAIR, WORDS)
        advance(CLOCK, LAST, cta, now + 2, PROGRAMS, WORDS, SPAN)


@triton.jit
def dequantise_rows(ROWS_8, SCALES, IDS, OUT, K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk of a row times its scales, if the row holds anything."""
    row, slot = tl.program_id(0).to(tl.int64), tl.arange(0, KP)
    if tl.max(tl.load(IDS + row * K + slot, mask=slot < K, other=-1), 0) >= 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        group = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        value = tl.load(ROWS_8 + row * H + column, mask=column < H, other=0.0).to(tl.float32)
        scale = tl.load(SCALES + row * (H // GROUP) + group, mask=group < H // GROUP, other=0.0)
        value = tl.reshape(tl.reshape(value, [BLOCK // GROUP, GROUP]) * scale[:, None], [BLOCK])
        tl.store(OUT + row * H + column, value.to(OUT.dtype.element_ty), mask=column < H)
