"""The Triton kernels of combine: the rows that each rank has summed over its own experts go home, and are summed there.

`pull_rows` reads them from the peers' memory, where the experts have left them. `push_rows` writes them into the home's
memory in steps, and sums one step while the next ones travel. Both sum in float32, by rank, so their results agree bit
for bit.

Names: as in dispatch_kernels; `y` has row s · capacity + t for token t of rank s.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecache.kernels.ep.signals import address, advance, free, named, owner_of, signal, wait

LANDING_FREE, LANDED, SUMMED = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)  # phases that an error names


@triton.jit
def _owners(
    IDS, item, items, K: tl.constexpr, KP: tl.constexpr, E: tl.constexpr, WORLD: tl.constexpr, NH: tl.constexpr
):
    """Ranks that hold the experts of an item's token. Read an item ahead, so that no row waits for it."""
    token, slot = tl.full([], item // NH, tl.int64), tl.arange(0, KP)
    ids = named(IDS, token * K + slot, slot < tl.where(item < items, K, 0), E)
    return owner_of(ids, E, WORLD)


@triton.jit
def _push(
    Y, HERE, PEERS, back_at, capacity, me, item, K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr,
    WORLD: tl.constexpr, BLOCK: tl.constexpr, NH: tl.constexpr, TYPE: tl.constexpr,
):
    """Send one chunk of the same token number of every peer home, where this rank has a row of it."""
    token, column = tl.full([], item // NH, tl.int64), item % NH * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, KP)
    for rank in tl.static_range(WORLD):
        if rank != me:
            at = rank * capacity + token
            ids = tl.load(HERE + at * K + slot, mask=slot < K, other=-1)
            inside = column < tl.where(tl.max(ids, 0) >= 0, H, 0)
            row = tl.load(Y + at * H + column, mask=inside, other=0.0)
            home = address(PEERS, rank, back_at, TYPE) + (me.to(tl.int64) * capacity + token) * H
            tl.store(home + column, row, mask=inside)


@triton.jit
def _sum_landed(
    Y, BACK, IDS, OUT, capacity, me, item, items, K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    WORLD: tl.constexpr, BLOCK: tl.constexpr, NH: tl.constexpr,
):
    """Sum a chunk of a token over the ranks that own its experts: the own one's row is still in `y`."""
    token, column = tl.full([], item // NH, tl.int64), item % NH * BLOCK + tl.arange(0, BLOCK)
    owner = _owners(IDS, item, items, K, KP, E, WORLD, NH)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(WORLD):
        width = tl.where(tl.max((owner == rank).to(tl.int32), 0) > 0, H, 0)
        at = (rank * capacity + token) * H + column
        total += tl.load(Y + at, mask=column < tl.where(me == rank, width, 0), other=0.0).to(tl.float32)
        # Past the first-level cache, which knows nothing of what peers write.
        total += tl.load(BACK + at, mask=column < tl.where(me == rank, 0, width), other=0.0, cache_modifier=".cg").to(
            tl.float32
        )
    tl.store(OUT + token * H + column, total.to(OUT.dtype.element_ty), mask=column < H)


@triton.jit(do_not_specialize=["tokens", "capacity", "me", "patience", "steps", "step_items"])
def push_rows(
    Y, HERE, BACK, IDS, OUT, PEERS, WORDS_HERE, CLOCK, LAST, DRAIN, ERROR,
    tokens, capacity, me, patience, words_at, back_at, steps, step_items,
    K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, E: tl.constexpr, WORLD: tl.constexpr, WIDE: tl.constexpr,
    PAIR: tl.constexpr, WORDS: tl.constexpr, SPAN: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
    NH: tl.constexpr, TYPE: tl.constexpr, SEND: tl.constexpr, RECEIVE: tl.constexpr, THREADS: tl.constexpr,
    HIP: tl.constexpr, PDL: tl.constexpr,
):
    """The first PROGRAMS programs send, as many others sum what the peers' senders of their number have sent: so no
    sender waits for rows, and the link is never idle. Halves of a combine have only the ones or the others.

    The chunks of all tokens are cut into equal steps, and a sender tells of each.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    cta = tl.program_id(0)
    now, last = tl.load(CLOCK + cta), tl.load(LAST + cta)
    number = cta % PROGRAMS
    if SEND:
        sends = cta < PROGRAMS
        if sends:
            free(PEERS, WORDS_HERE, words_at, DRAIN, ERROR, me, cta, now, last, patience, LANDING_FREE, WORLD, WIDE,
                 PAIR, WORDS, THREADS, HIP)
            for step in range(0, steps):
                items = tl.minimum((step + 1) * step_items, capacity * NH)
                for item in range(step * step_items + number, items, PROGRAMS):
                    _push(Y, HERE, PEERS, back_at, capacity, me, item, K, KP, H, WORLD, BLOCK, NH, TYPE)
                signal(PEERS, words_at, DRAIN, me, number, now + 2 + step, WORLD, WIDE, PAIR, WORDS, THREADS, HIP)
    if RECEIVE:
        sums = cta >= (PROGRAMS if SEND else 0)
        if sums:
            for step in range(0, steps):
                wait(WORDS_HERE, ERROR, me, number, now + 2 + step, patience, LANDED, WORLD, WIDE, PAIR, WORDS)
                items = tl.minimum((step + 1) * step_items, tokens * NH)
                for item in range(step * step_items + number, items, PROGRAMS):
                    _sum_landed(Y, BACK, IDS, OUT, capacity, me, item, items, K, KP, H, E, WORLD, BLOCK, NH)
        advance(CLOCK, LAST, cta, now + 1 + steps, PROGRAMS * (2 if SEND else 1), WORDS, SPAN)


@triton.jit(do_not_specialize=["tokens", "capacity", "me", "patience"])
def pull_rows(
    IDS, OUT, PEERS, WORDS_HERE, CLOCK, LAST, DRAIN, ERROR,
    tokens, capacity, me, patience, words_at, back_at,
    K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, E: tl.constexpr, WORLD: tl.constexpr, WIDE: tl.constexpr,
    PAIR: tl.constexpr, WORDS: tl.constexpr, SPAN: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
    NH: tl.constexpr, TYPE: tl.constexpr, SEND: tl.constexpr, RECEIVE: tl.constexpr, THREADS: tl.constexpr,
    HIP: tl.constexpr, PDL: tl.constexpr,
):
    """Tell the peers that the own rows are there; when theirs are, read and sum them."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    cta = tl.program_id(0)
    now = tl.load(CLOCK + cta)
    if SEND:
        tells = cta == 0
        if tells:
            signal(PEERS, words_at, DRAIN, me, 0, now + 1, WORLD, WIDE, PAIR, WORDS, THREADS, HIP)
    if RECEIVE:
        owner = _owners(IDS, cta, tokens * NH, K, KP, E, WORLD, NH)
        wait(WORDS_HERE, ERROR, me, 0, now + 1, patience, SUMMED, WORLD, WIDE, PAIR, WORDS)
        for item in range(cta, tokens * NH, PROGRAMS):
            token, column = tl.full([], item // NH, tl.int64), item % NH * BLOCK + tl.arange(0, BLOCK)
            owner_next = _owners(IDS, item + PROGRAMS, tokens * NH, K, KP, E, WORLD, NH)
            total = tl.zeros([BLOCK], tl.float32)
            for rank in tl.static_range(WORLD):
                inside = column < tl.where(tl.max((owner == rank).to(tl.int32), 0) > 0, H, 0)
                rows = address(PEERS, rank, back_at, TYPE) + (me.to(tl.int64) * capacity + token) * H
                total += tl.load(rows + column, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            tl.store(OUT + token * H + column, total.to(OUT.dtype.element_ty), mask=column < H)
            owner = owner_next
        advance(CLOCK, LAST, cta, now + 1, PROGRAMS, WORDS, SPAN)
