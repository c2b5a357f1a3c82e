"""The Triton kernels of combine: the rows that each rank has summed over its own experts go home, and are summed there.

`pull_rows` reads them from the peers' memory, where the experts have left them. `push_rows` writes them into the home's
memory in steps, and sums one step while the next ones travel. Of each step a copy engine may write a part, which `tell`
tells of. All sum in float32, by rank, so their results agree bit for bit.

Names: as in dispatch_kernels; `y` has row s · capacity + t for token t of rank s.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecache.kernels.ep.signals import address, advance, free, owner_of, signal, wait

SHARE = tl.constexpr(72)  # per cent
LANDING_FREE, LANDED, SUMMED = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)  # phases that an error names


@triton.jit
def _owners(
    IDS, item, items, K: tl.constexpr, KP: tl.constexpr, E: tl.constexpr, WORLD: tl.constexpr, NH: tl.constexpr
):
    """Ranks that hold the experts of an item's token. Read an item ahead, so that no row waits for it."""
    token, slot = tl.full([], item // NH, tl.int64), tl.arange(0, KP)
    ids = tl.load(IDS + token * K + slot, mask=slot < tl.where(item < items, K, 0), other=-1).to(tl.int32)
    return owner_of(ids, E, WORLD)


@triton.jit
def taken(left, steps_left):
    """How many of the units that are left the next step takes: most, and the last one all. Sums are three to four times
    as fast as the link, so those of a step end about when the next step has come, and little is to be summed at last.
    """
    return tl.where(steps_left == 1, left, (left * SHARE + 99) // 100)


@triton.jit
def _present(
    HERE, capacity, item, items, K: tl.constexpr, KP: tl.constexpr, WORLD: tl.constexpr, WIDE: tl.constexpr,
    NH: tl.constexpr,
):
    """For each rank, not below 0 if this one has a row of that token number of it. Read an item ahead, as `_owners`."""
    rank, slot = tl.arange(0, WIDE)[:, None], tl.arange(0, KP)[None, :]
    at = rank * capacity + tl.full([], item // NH, tl.int64)
    there = (rank < WORLD) & (slot < tl.where(item < items, K, 0))
    return tl.max(tl.load(HERE + at * K + slot, mask=there, other=-1), 1)


@triton.jit
def _push(
    Y, PEERS, back_at, present, capacity, me, item, H: tl.constexpr, WORLD: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, NH: tl.constexpr, TYPE: tl.constexpr,
):
    """Send one chunk of the same token number of every peer home, where this rank has a row of it."""
    token, column = tl.full([], item // NH, tl.int64), item % NH * BLOCK + tl.arange(0, BLOCK)
    for rank in tl.static_range(WORLD):
        if rank != me:
            has = tl.max(tl.where(tl.arange(0, WIDE) == rank, present, -1), 0) >= 0
            inside = column < tl.where(has, H, 0)
            row = tl.load(Y + (rank * capacity + token) * H + column, mask=inside, other=0.0)
            home = address(PEERS, rank, back_at, TYPE) + (me.to(tl.int64) * capacity + token) * H
            tl.store(home + column, row, mask=inside)


@triton.jit
def _sum_landed(
    Y, BACK, OUT, owner, capacity, me, item, H: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr,
    NH: tl.constexpr,
):
    """Sum a chunk of a token over the ranks that own its experts: the own one's row is still in `y`."""
    token, column = tl.full([], item // NH, tl.int64), item % NH * BLOCK + tl.arange(0, BLOCK)
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


@triton.jit
def _sum_step(
    Y, BACK, IDS, OUT, WORDS_HERE, ERROR, capacity, me, patience, word, value, first, items, K: tl.constexpr,
    KP: tl.constexpr, H: tl.constexpr, E: tl.constexpr, WORLD: tl.constexpr, WIDE: tl.constexpr, PAIR: tl.constexpr,
    WORDS: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, NH: tl.constexpr,
):
    """Wait until a word tells of a step, and sum this program's chunks of it."""
    owner = _owners(IDS, first, items, K, KP, E, WORLD, NH)
    wait(WORDS_HERE, ERROR, me, word, value, patience, LANDED, WORLD, WIDE, PAIR, WORDS)
    for item in range(first, items, PROGRAMS):
        owner_next = _owners(IDS, item + PROGRAMS, items, K, KP, E, WORLD, NH)
        _sum_landed(Y, BACK, OUT, owner, capacity, me, item, H, WORLD, BLOCK, NH)
        owner = owner_next


@triton.jit(do_not_specialize=["tokens", "capacity", "me", "patience", "steps", "units", "copied"])
def push_rows(
    Y, HERE, BACK, IDS, OUT, PEERS, WORDS_HERE, CLOCK, LAST, DRAIN, ERROR,
    tokens, capacity, me, patience, words_at, back_at, steps, units, copied,
    K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, E: tl.constexpr, WORLD: tl.constexpr, WIDE: tl.constexpr,
    PAIR: tl.constexpr, WORDS: tl.constexpr, SPAN: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
    NH: tl.constexpr, TYPE: tl.constexpr, SEND: tl.constexpr, RECEIVE: tl.constexpr, COPIED: tl.constexpr,
    THREADS: tl.constexpr, HIP: tl.constexpr, PDL: tl.constexpr,
):
    """The first PROGRAMS programs send, as many others sum what the peers' senders of their number have sent: so no
    sender waits for rows, and the link is never idle. Halves of a combine have only the ones or the others.

    All chunks, `units` of PROGRAMS, are cut into steps (`taken`), and a sender tells of each. With COPIED something
    else moves the rows of the first `copied` token numbers, in as many steps, and tells of each with a word of its own.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    cta = tl.program_id(0)
    now, last = tl.load(CLOCK + cta), tl.load(LAST + cta)
    number = cta % PROGRAMS
    first = copied * NH
    if SEND:
        sends = cta < PROGRAMS
        if sends:
            free(PEERS, WORDS_HERE, words_at, DRAIN, ERROR, me, cta, now, last, patience, LANDING_FREE, WORLD, WIDE,
                 PAIR, WORDS, THREADS, HIP)
            done = 0
            for step in range(0, steps):
                begin, done = done, done + taken(units - done, steps - step)
                items = tl.minimum(first + done * PROGRAMS, capacity * NH)
                at = first + begin * PROGRAMS + number
                present = _present(HERE, capacity, at, items, K, KP, WORLD, WIDE, NH)
                for item in range(at, items, PROGRAMS):
                    present_next = _present(HERE, capacity, item + PROGRAMS, items, K, KP, WORLD, WIDE, NH)
                    _push(Y, PEERS, back_at, present, capacity, me, item, H, WORLD, WIDE, BLOCK, NH, TYPE)
                    present = present_next
                signal(PEERS, words_at, DRAIN, me, number, now + 2 + step, WORLD, WIDE, PAIR, WORDS, THREADS, HIP)
    if RECEIVE:
        sums = cta >= (PROGRAMS if SEND else 0)
        if sums:
            done, copied_done = 0, 0
            for step in range(0, steps):
                begin, done = done, done + taken(units - done, steps - step)
                items = tl.minimum(first + done * PROGRAMS, tokens * NH)
                _sum_step(Y, BACK, IDS, OUT, WORDS_HERE, ERROR, capacity, me, patience, number, now + 2 + step,
                          first + begin * PROGRAMS + number, items, K, KP, H, E, WORLD, WIDE, PAIR, WORDS, PROGRAMS,
                          BLOCK, NH)
                if COPIED:
                    begin, copied_done = copied_done, copied_done + taken(copied - copied_done, steps - step)
                    items = tl.minimum(copied_done, tokens) * NH
                    _sum_step(Y, BACK, IDS, OUT, WORDS_HERE, ERROR, capacity, me, patience, PROGRAMS, now + 2 + step,
                              begin * NH + number, items, K, KP, H, E, WORLD, WIDE, PAIR, WORDS, PROGRAMS, BLOCK, NH)
        advance(CLOCK, LAST, cta, now + 1 + steps, PROGRAMS * (2 if SEND else 1), WORDS, SPAN)


@triton.jit(do_not_specialize=["me", "word", "step"])
def tell(
    PEERS, ENTERED, DRAIN, me, word, step, words_at,
    WORLD: tl.constexpr, WIDE: tl.constexpr, PAIR: tl.constexpr, WORDS: tl.constexpr, THREADS: tl.constexpr,
    HIP: tl.constexpr,
):
    """Tell the peers that all rows of a step have been copied to them."""
    signal(PEERS, words_at, DRAIN, me, word, tl.load(ENTERED) + 2 + step, WORLD, WIDE, PAIR, WORDS, THREADS, HIP)


@triton.jit(do_not_specialize=["tokens", "capacity", "me", "patience"])
def pull_rows(
    IDS, OUT, PEERS, WORDS_HERE, CLOCK, LAST, DRAIN, ERROR,
    tokens, capacity, me, patience, words_at, back_at,
    K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, E: tl.constexpr, WORLD: tl.constexpr, WIDE: tl.constexpr,
    PAIR: tl.constexpr,
    WORDS: tl.constexpr, SPAN: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, NH: tl.constexpr,
    TYPE: tl.constexpr, SEND: tl.constexpr, RECEIVE: tl.constexpr, THREADS: tl.constexpr, HIP: tl.constexpr,
    PDL: tl.constexpr,
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
