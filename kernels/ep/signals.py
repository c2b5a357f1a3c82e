"""What kernels of several GPUs tell each other with: words in each other's memory, written after the data, and polled.

Every program has a word of its own in the memory of each peer, and a clock in its own memory. A word holds the clock's
value of the last thing that its program has done. Clocks of all ranks go alike, since all make the same calls. So a
word need never be reset, and a captured graph can be replayed as often as wanted. Words have 64 bits: none ever wraps.

Names: `me` is the own rank; `cta` the number of a program; WORDS how many programs a launch may have.
"""

import triton
import triton.language as tl


@triton.jit
def named(IDS, at, inside, E: tl.constexpr):
    """Ids as int32, −1 for those that name no expert. int64 ones are compared first: their low half may name one."""
    ids = tl.load(IDS + at, mask=inside, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@triton.jit
def owner_of(expert, E: tl.constexpr, WORLD: tl.constexpr):
    """Rank that holds each expert, −1 of ids that name none. The first E mod WORLD ranks hold one expert more."""
    low: tl.constexpr = E // WORLD
    more: tl.constexpr = E % WORLD
    edge: tl.constexpr = more * (low + 1)
    rank = expert // (low + 1)
    if low > 0:
        rank = tl.where(expert < edge, rank, more + (expert - edge) // low)
    return tl.where((expert >= 0) & (expert < E), rank, -1)


@triton.jit
def address(PEERS, rank, at, TYPE: tl.constexpr):
    """Where a part of a rank's memory begins. Without the promise of 16 bytes, rows are stored 2 bytes at a time."""
    return tl.multiple_of((tl.load(PEERS + rank) + at).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def signal(
    PEERS, words_at, DRAIN, me, cta, value,
    WORLD: tl.constexpr, WIDE: tl.constexpr, PAIR: tl.constexpr, WORDS: tl.constexpr, THREADS: tl.constexpr,
    HIP: tl.constexpr,
):
    """Tell every peer what this program has done, after all that it has stored before."""
    if HIP:  # a barrier there waits for no stores: each wave has to wait for its own
        tl.atomic_xchg(DRAIN + cta * THREADS + tl.arange(0, THREADS), 0, sem="release", scope="sys")
    tl.debug_barrier()
    at = words_at + (me * WORDS + cta) * 8
    if PAIR:
        word = (tl.load(PEERS + (1 - me)) + at).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(word, value, sem="release", scope="sys")
    else:
        rank = tl.arange(0, WIDE)
        other = (rank < WORLD) & (rank != me)
        words = (tl.load(PEERS + rank, mask=other, other=0) + at).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(words, tl.zeros([WIDE], tl.int64) + value, mask=other, sem="release", scope="sys")


@triton.jit
def wait(
    WORDS_HERE, ERROR, me, cta, value, patience, phase: tl.constexpr,
    WORLD: tl.constexpr, WIDE: tl.constexpr, PAIR: tl.constexpr, WORDS: tl.constexpr,
):
    """Wait until that program of every peer has told of `value`. After `patience` polls, write down who has not.

    The polls are atomics: Triton 3.6 to 3.8 move a volatile load out of the loop on CDNA, which then never ends.
    """
    patience = tl.where(tl.load(ERROR) == 0, patience, 1)  # whoever was late once is not waited for again
    polls = 0
    if PAIR:
        word = WORDS_HERE + (1 - me) * WORDS + cta
        seen = tl.atomic_add(word, 0, sem="acquire", scope="sys")
        while (seen < value) & (polls < patience):
            seen = tl.atomic_add(word, 0, sem="acquire", scope="sys")
            polls += 1
        if seen < value:
            tl.atomic_cas(ERROR, 0, 2 - me + phase * 256)  # the first says most
    elif WORLD > 1:
        rank = tl.arange(0, WIDE)
        other = (rank < WORLD) & (rank != me)
        words = WORDS_HERE + rank * WORDS + cta
        zero = tl.zeros([WIDE], tl.int64)
        late = tl.max(tl.where(tl.atomic_add(words, zero, mask=other, sem="acquire", scope="sys") < value, rank + 1, 0)
                      * other.to(tl.int32), 0)
        while (late > 0) & (polls < patience):
            seen = tl.atomic_add(words, zero, mask=other, sem="acquire", scope="sys")
            late = tl.max(tl.where(seen < value, rank + 1, 0) * other.to(tl.int32), 0)
            polls += 1
        if late > 0:
            tl.atomic_cas(ERROR, 0, late + phase * 256)


@triton.jit
def free(
    PEERS, WORDS_HERE, words_at, DRAIN, ERROR, me, cta, now, last, patience, phase: tl.constexpr,
    WORLD: tl.constexpr, WIDE: tl.constexpr, PAIR: tl.constexpr, WORDS: tl.constexpr, THREADS: tl.constexpr,
    HIP: tl.constexpr,
):
    """Wait until every peer has made a call after the one that used this memory last: it reads it no more.

    Mostly there was such a call, and its word is here. If this is the next one, peers first tell that they are here.
    """
    if (last == now) & (cta == 0):
        signal(PEERS, words_at, DRAIN, me, 0, now + 1, WORLD, WIDE, PAIR, WORDS, THREADS, HIP)
    wait(WORDS_HERE, ERROR, me, 0, last + 1, patience, phase, WORLD, WIDE, PAIR, WORDS)


@triton.jit
def advance(CLOCK, LAST, cta, value, programs: tl.constexpr, WORDS: tl.constexpr, SPAN: tl.constexpr):
    """Set the clock of this program, and those of programs that this launch has not."""
    each = cta + programs * tl.arange(0, SPAN)
    tl.store(CLOCK + each, tl.zeros([SPAN], tl.int64) + value, mask=each < WORDS)
    tl.store(LAST + each, tl.zeros([SPAN], tl.int64) + value, mask=each < WORDS)
