"""Hopper kernel of the products of an MoE layer: persistent, its warps specialised, written in Gluon.

Four warps fill a ring of shared-memory slots: rows of A gathered with cp.async, two panels of W through TMA. One group
of warps multiplies, or two: in turns, one writing out its tile while the other multiplies the next, or, in tiles of 256
rows, each its half of them. The ring runs on across tiles, so the next tile is on its way while this one is written
out. Used for both products: the panels are gate and up of w1, or two neighbouring panels of w2, or of w1 without a
gate. They lie side by side in a slot and are multiplied as one: with each of its own, the rows would be read from
shared memory twice.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moecache.kernels import activations, agreed

bare = gluon.constexpr_function(activations.bare)
panels = gluon.constexpr_function(activations.panels)
# Triton 3.7 has renamed one, 3.9 three
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
gather_warps = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

BOX = gl.constexpr(agreed.RING_BOX)


class Ring(NamedTuple):
    """The slots, and what says that one is full or free."""

    a: gl.shared_memory_descriptor
    w: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Target(NamedTuple):
    """Where a product goes, and what is added to it or multiplied with it on the way; as `product` is given it."""

    OUT: gl.tensor
    BIAS: gl.tensor
    WEIGHTS: gl.tensor
    SORTED: gl.tensor
    pairs: gl.tensor
    out_row: gl.tensor
    second: gl.tensor
    N: gl.tensor
    alpha: gl.tensor
    limit: gl.tensor


class Kind(NamedTuple):
    """Which product it is, in constants; as `product` is told."""

    TOPK: int
    STEP: int
    ACT: str
    WEIGHTED: bool
    BIASED: bool
    SWAP: int
    ATOMIC: bool


@gluon.constexpr_function
def _kind(*values):
    return Kind(*values)


@gluon.jit
def overlap():
    """Wait for the launch before this one, then let the next one start its launch."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def tile_of(tile, blocks, tiles_n, GROUP: gl.constexpr):
    """(block of rows, tile of columns): GROUP blocks share the panels of weights before the next ones are read."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    size = gl.minimum(blocks - first, GROUP)
    return first + tile % width % size, tile % width // size


@gluon.jit
def _work(TOTAL, N, K, BM: gl.constexpr, STEP: gl.constexpr, BK: gl.constexpr, SPLIT: gl.constexpr):
    """(blocks, tiles of columns, steps of a tile, tiles that are done in one go, parts of each of the others).

    SPLIT: where the last tiles do not fill the device, each is cut along K, and its parts add up in the output.
    """
    blocks = gl.load(TOTAL) // BM
    tiles_n = gl.cdiv(N, STEP)
    steps = gl.cdiv(K, BK)
    tiles = blocks * tiles_n
    rest = tiles % gl.num_programs(0)
    parts = 1
    if SPLIT:
        parts = gl.minimum(gl.num_programs(0) // gl.maximum(rest, 1), gl.minimum(steps // 16, 4))
        parts = gl.maximum(parts, 1)
    return blocks, tiles_n, steps, tiles - rest, parts


@gluon.jit
def _item(number, work, BLOCKS, GROUP: gl.constexpr):
    """(block, tile of columns, expert, first step, the one behind the last) of an item of the work; block −1 if there
    is none of that number."""
    blocks, tiles_n, steps, whole, parts = work
    over = gl.maximum(number - whole, 0)
    tile = gl.minimum(number, whole + over // parts)
    block, n = tile_of(tile, blocks, tiles_n, GROUP)
    block = gl.where(tile < blocks * tiles_n, block, -1)
    expert = gl.load(BLOCKS + block, mask=block >= 0, other=0)
    begin = gl.where(number < whole, 0, over % parts * steps // parts)
    behind = gl.where(number < whole, steps, (over % parts + 1) * steps // parts)
    return block, n, expert, begin, behind


@gluon.jit
def _tell(item, count, items, told, WARPS: gl.constexpr):
    """The loading warps name item `count` to those that multiply."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    at = count % items.shape[0]
    for i in gl.static_range(5):
        items.index(at).slice(i, 1, 0).store(gl.full([1], item[i], gl.int32, flat))
    gather_warps()
    mbarrier.arrive(told.index(at))


@gluon.jit
def _hear(count, items, told, WARPS: gl.constexpr):
    """Item `count`, as `_item` gives it, once the loading warps have named it."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    SLOTS: gl.constexpr = items.shape[0]
    at = count % SLOTS
    mbarrier.wait(told.index(at), count // SLOTS & 1)
    block = gl.max(items.index(at).slice(0, 1, 0).load(flat), 0)
    n = gl.max(items.index(at).slice(1, 1, 0).load(flat), 0)
    expert = gl.max(items.index(at).slice(2, 1, 0).load(flat), 0)
    begin = gl.max(items.index(at).slice(3, 1, 0).load(flat), 0)
    behind = gl.max(items.index(at).slice(4, 1, 0).load(flat), 0)
    return block, n, expert, begin, behind


@gluon.jit
def _load(
    A, W, SORTED, BLOCKS, TOTAL, TICKETS, ROWS, ring, items, told, pairs, a_row, rows, second, N, K,
    TOPK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr, BK: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, SOURCE: gl.constexpr, EVEN: gl.constexpr, SPLIT: gl.constexpr,
    TICKETED: gl.constexpr, WARPS: gl.constexpr,
):
    """The loading warps: every step of every item of this program, one ring slot after the other.

    TICKETED: whoever has loaded an item takes the next one, so neighbours, which share weights, begin side by side,
    however long the ones before took. Else a program's items are as far apart as there are programs, and each is named
    to those that multiply before the one ahead of it is loaded.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [WARPS, 1], [1, 0])
    SHAPE: gl.constexpr = [2 * STAGES * (BK // BOX), BN, BOX]
    boxes = ring.w.reinterpret(W.dtype, SHAPE, W.layout) if RENAMED else ring.w._reinterpret(W.dtype, SHAPE, W.layout)
    work = _work(TOTAL, N, K, BM, STEP, BK, SPLIT)
    at = gl.arange(0, BK, gl.SliceLayout(0, layout))
    index = 0
    count = 1
    number = gl.program_id(0)
    item = _item(number, work, BLOCKS, GROUP)
    _tell(item, 0, items, told, WARPS)
    while item[0] >= 0:
        block, n, expert, begin, behind = item
        w_at = expert * rows + n * STEP
        row = block * BM + gl.arange(0, BM, gl.SliceLayout(1, layout))
        pair = gl.load(SORTED + row)
        if not TICKETED:
            number += gl.num_programs(0)
            item = _item(number, work, BLOCKS, GROUP)
            _tell(item, count, items, told, WARPS)
        valid = pair < pairs
        source = row
        if SOURCE == 1:
            source = pair // TOPK
        elif SOURCE == 2:
            source = gl.load(ROWS + pair, mask=valid, other=0)
        step = a_row // 8 * 8  # rows start on 16 bytes, which a copy of 16 bytes wants to see
        a = A + source.to(gl.int64)[:, None] * step + at[None, :]
        for k in range(begin * BK, gl.minimum(behind * BK, K), BK):
            slot = index % STAGES
            mbarrier.wait(ring.empty.index(slot), (index // STAGES & 1) ^ 1)
            mbarrier.expect(ring.ready.index(slot), 2 * BN * BK * 2)
            for box in gl.static_range(BK // BOX):
                here = (slot * (BK // BOX) + box) * 2
                tma_load(W, [w_at, k + box * BOX], ring.ready.index(slot), boxes.index(here))
                tma_load(W, [w_at + second, k + box * BOX], ring.ready.index(slot), boxes.index(here + 1))
            if EVEN:
                copy_rows(ring.a.index(slot), a + k, mask=valid[:, None])
            else:
                copy_rows(ring.a.index(slot), a + k, mask=valid[:, None] & (at + k < K // 8 * 8)[None, :])
            async_copy.mbarrier_arrive(ring.ready.index(slot), increment_count=False)
            index += 1
        if TICKETED:
            number = gl.num_programs(0) + gl.atomic_add(TICKETS, 1, sem="relaxed")
            item = _item(number, work, BLOCKS, GROUP)
            _tell(item, count, items, told, WARPS)
        count += 1


@gluon.jit
def _step(
    ring, index, acc, BM: gl.constexpr, STAGES: gl.constexpr, SWAP: gl.constexpr, FIRST: gl.constexpr,
):
    """Begin the product of one slot: BM rows of it, from FIRST on, with both panels."""
    slot = index % STAGES
    mbarrier.wait(ring.ready.index(slot), index // STAGES & 1)
    fence_async_shared()
    if SWAP:
        token = warpgroup_mma(ring.w.index(slot), ring.a.index(slot).permute((1, 0)), acc, is_async=True)
    else:
        a = ring.a.index(slot).slice(FIRST, BM, 0)
        token = warpgroup_mma(a, ring.w.index(slot).permute((1, 0)), acc, is_async=True)
    return token


@gluon.jit
def _panels(acc, BM: gl.constexpr, BN: gl.constexpr, SWAP: gl.constexpr, mma: gl.constexpr):
    """The two panels of a finished tile; no value leaves its thread."""
    if SWAP:
        left, right = acc.reshape((2, BN, BM)).permute((1, 2, 0)).split()
    else:
        left, right = acc.reshape((BM, 2, BN)).permute((0, 2, 1)).split()
    return gl.convert_layout(left, mma, assert_trivial=True), gl.convert_layout(right, mma, assert_trivial=True)


@gluon.constexpr_function
def _written(BN, WARPS, SWAP):
    """Layout in which a panel of a finished tile is written: 16 bytes a thread."""
    if SWAP:
        return gl.BlockedLayout([8, 1], [BN // 8, 256 // BN], [1, WARPS], [0, 1])
    return gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [WARPS, 1], [1, 0])


@gluon.jit
def _finish(
    left, right, pair, scale, out, expert, first, n, whole, how: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    WARPS: gl.constexpr, mma: gl.constexpr,
):
    """Write a finished tile out: bias, router weight, activation; SWAP: the tile is [columns, rows]."""
    OUT, N, pairs = out.OUT, out.N, out.pairs
    TOPK: gl.constexpr = how.TOPK
    STEP: gl.constexpr = how.STEP
    ACT: gl.constexpr = how.ACT
    WEIGHTED: gl.constexpr = how.WEIGHTED
    BIASED: gl.constexpr = how.BIASED
    SWAP: gl.constexpr = how.SWAP
    ATOMIC: gl.constexpr = how.ATOMIC
    PANELS: gl.constexpr = panels(ACT)
    ROWS: gl.constexpr = 1 - SWAP  # dimension of a tile that a slice along its rows removes
    wide: gl.constexpr = _written(BN, WARPS, SWAP)
    column = n * STEP + gl.arange(0, BN, gl.SliceLayout(SWAP, mma))
    if BIASED:
        if PANELS == 2:
            bias = out.BIAS + expert.to(gl.int64) * 2 * N + column
            beside = column < N
        else:
            bias = out.BIAS + expert.to(gl.int64) * N + column
            beside = column + BN < N
        left_bias = gl.expand_dims(gl.load(bias, mask=(column < N) & whole, other=0.0).to(gl.float32), SWAP)
        right_bias = gl.expand_dims(gl.load(bias + out.second, mask=beside & whole, other=0.0).to(gl.float32), SWAP)
    if WEIGHTED:
        scale = gl.expand_dims(scale, ROWS)
        if ACT != "":
            left = left * scale
            right = right * scale
    if BIASED:
        left += left_bias
        right += right_bias
    row = first + gl.arange(0, BM, gl.SliceLayout(ROWS, wide))
    column = gl.expand_dims(n * STEP + gl.arange(0, BN, gl.SliceLayout(SWAP, wide)), SWAP)
    here = gl.expand_dims(pair < pairs, ROWS)
    if PANELS == 2:
        h = gl.convert_layout(activate(left, right, ACT, out.alpha, out.limit).to(OUT.dtype.element_ty), wide)
        gl.store(OUT + gl.expand_dims(row.to(gl.int64), ROWS) * out.out_row + column, h, mask=here & (column < N))
    elif ACT != "":
        y = gl.convert_layout(activate(left, left, ACT, out.alpha, out.limit).to(OUT.dtype.element_ty), wide)
        z = gl.convert_layout(activate(right, right, ACT, out.alpha, out.limit).to(OUT.dtype.element_ty), wide)
        where = OUT + gl.expand_dims(row.to(gl.int64), ROWS) * out.out_row + column
        gl.store(where, y, mask=here & (column < N))
        gl.store(where + BN, z, mask=here & (column + BN < N))
    else:
        if WEIGHTED:
            left = left * scale
            right = right * scale
        y = gl.convert_layout(left.to(OUT.dtype.element_ty), wide)
        z = gl.convert_layout(right.to(OUT.dtype.element_ty), wide)
        if ATOMIC:
            where = OUT + gl.expand_dims((pair // TOPK).to(gl.int64), ROWS) * out.out_row + column
            gl.atomic_add(where, y, mask=here & (column < N), sem="relaxed")
            gl.atomic_add(where + BN, z, mask=here & (column + BN < N), sem="relaxed")
        else:
            where = OUT + gl.expand_dims(pair.to(gl.int64), ROWS) * out.out_row + column
            gl.store(where, y, mask=here & (column < N))
            gl.store(where + BN, z, mask=here & (column + BN < N))


@gluon.jit
def _ends(out, first, how: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr, mma: gl.constexpr):
    """Pairs of a tile's rows and their router weights, as `_finish` takes them."""
    ROWS: gl.constexpr = 1 - how.SWAP
    pair = gl.load(out.SORTED + first + gl.arange(0, BM, gl.SliceLayout(ROWS, _written(BN, WARPS, how.SWAP))))
    scale = 1.0
    if how.WEIGHTED:
        at = gl.load(out.SORTED + first + gl.arange(0, BM, gl.SliceLayout(ROWS, mma)))
        scale = gl.load(out.WEIGHTS + at, mask=at < out.pairs, other=0.0).to(gl.float32)
    return pair, scale


@gluon.jit
def _tile(
    out, ring, turn, expert, first, n, index, count, steps, whole, how: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr, TURNS: gl.constexpr, PART: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The rows `first` … + BM of a block, which begin at FIRST in a slot: multiply `steps` steps and write out; `whole`
    unless this is a later part of a tile, which adds no bias."""
    SWAP: gl.constexpr = how.SWAP
    if SWAP:
        mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
        acc = gl.zeros([2 * BN, BM], gl.float32, mma)
    else:
        mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
        acc = gl.zeros([BM, 2 * BN], gl.float32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 2 * BN, 16]))
    # What the end needs is asked for where somebody multiplies meanwhile: a fence waits for loads.
    if TURNS:
        pair, scale = _ends(out, first, how, BM, BN, WARPS, mma)
        # a barrier's parity tells only the present round of the ring from the one before
        mbarrier.wait(turn.index(PART), (count // 2 & 1) ^ (1 - PART))
    token = _step(ring, index, acc, BM, STAGES, SWAP, FIRST)
    if not TURNS:
        pair, scale = _ends(out, first, how, BM, BN, WARPS, mma)
    acc = warpgroup_mma_wait(1, deps=(token,))
    for _ in range(1, steps):
        index += 1
        token = _step(ring, index, acc, BM, STAGES, SWAP, FIRST)
        acc = warpgroup_mma_wait(1, deps=(token,))
        mbarrier.arrive(ring.empty.index((index + STAGES - 1) % STAGES))
    if TURNS:
        mbarrier.arrive(turn.index(1 - PART))
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring.empty.index(index % STAGES))
    left, right = _panels(acc, BM, BN, SWAP, mma)
    _finish(left, right, pair, scale, out, expert, first, n, whole, how, BM, BN, WARPS, mma)


@gluon.jit
def _multiply(
    out, ring, items, told, turn, how: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    PART: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr,
):
    """One multiplying group of warps: every PARTS-th item of this program."""
    index = 0
    count = 0
    block, n, expert, begin, behind = _hear(0, items, told, WARPS)
    while block >= 0:
        if count % PARTS == PART:
            _tile(out, ring, turn, expert, block * BM, n, index, count, behind - begin, begin == 0, how, BM, BN, STAGES,
                  0, PARTS == 2, PART, WARPS)
        index += behind - begin
        count += 1
        block, n, expert, begin, behind = _hear(count, items, told, WARPS)


@gluon.jit
def _multiply_half(
    out, ring, items, told, turn, how: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    PART: gl.constexpr, WARPS: gl.constexpr,
):
    """One of two multiplying groups: its half of the rows of every tile; a half of that or nothing where the rest is
    padding, which comes last in a block."""
    OWN: gl.constexpr = BM // 2
    index = 0
    count = 0
    block, n, expert, begin, behind = _hear(0, items, told, WARPS)
    while block >= 0:
        first = block * BM + PART * OWN
        used = gl.load(out.SORTED + first) < out.pairs
        full = gl.load(out.SORTED + first + OWN // 2) < out.pairs
        if full:
            _tile(out, ring, turn, expert, first, n, index, count, behind - begin, begin == 0, how, OWN, BN, STAGES,
                  PART * OWN, False, PART, WARPS)
        elif used:
            _tile(out, ring, turn, expert, first, n, index, count, behind - begin, begin == 0, how, OWN // 2, BN,
                  STAGES, PART * OWN, False, PART, WARPS)
        else:
            for i in range(index, index + behind - begin):
                mbarrier.wait(ring.ready.index(i % STAGES), i // STAGES & 1)
                mbarrier.arrive(ring.empty.index(i % STAGES))
        index += behind - begin
        count += 1
        block, n, expert, begin, behind = _hear(count, items, told, WARPS)


@gluon.jit
def _sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def _act(g, NAME: gl.constexpr):
    if NAME == "silu":
        h = g * _sigmoid(g)
    elif NAME == "gelu":
        h = 0.5 * g * (1.0 + gl.erf(g * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh(x)) / 2 is sigmoid(2x)
        h = g * _sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        gl.static_assert(NAME == "relu2")
        g = gl.where(g < 0.0, 0.0, g)  # a maximum would lose NaN
        h = g * g
    return h


@gluon.jit
def activate(g, u, ACT: gl.constexpr, alpha, limit):
    """As in gemm/tile.py."""
    NAME: gl.constexpr = bare(ACT)
    if panels(ACT) == 1:
        h = _act(g, NAME)
    elif NAME == "swiglu_oai":
        g = gl.where(g > limit, limit, g)
        u = gl.where(u > limit, limit, gl.where(u < -limit, -limit, u))
        h = (u + 1.0) * g * _sigmoid(alpha * g)
    elif NAME == "silu_limited":
        g = gl.where(g > limit, limit, g)
        u = gl.where(u > limit, limit, gl.where(u < -limit, -limit, u))
        h = _act(g, "silu") * u
    else:
        h = _act(g, NAME) * u
    return h


@gluon.jit(do_not_specialize=["pairs"])
def product(
    A, W, OUT, BIAS, WEIGHTS, SORTED, BLOCKS, TOTAL, TICKETS, ROWS, pairs, a_row, out_row, rows, second, N, K, alpha,
    limit, TOPK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr, BK: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, SOURCE: gl.constexpr, EVEN: gl.constexpr, ACT: gl.constexpr,
    WEIGHTED: gl.constexpr, BIASED: gl.constexpr, SWAP: gl.constexpr, ATOMIC: gl.constexpr, PARTS: gl.constexpr,
    PDL: gl.constexpr, num_warps: gl.constexpr,
):
    """One product of an MoE layer. A tile takes BM rows and the W rows n · STEP … + BN and those `second` further on.

    With ACT: OUT[row] = act(left) · right, or (act(left), act(right)) without a gate. Without: OUT[pair] = (left,
    right), weighted; ATOMIC: added to OUT[pair // TOPK]. SOURCE says which row of A a sorted row reads: 0 its own, 1
    pair // TOPK, 2 ROWS[pair].
    """
    LOADERS: gl.constexpr = 4
    HALVES: gl.constexpr = PARTS == 2 and BM > 64
    TICKETED: gl.constexpr = PARTS == 1 or HALVES or BN == 64  # wide tiles in turns lose up to a third by it
    a_smem = gl.allocate_shared_memory(A.dtype.element_ty, [STAGES, BM, BK], W.layout)
    w_smem = gl.allocate_shared_memory(A.dtype.element_ty, [STAGES, 2 * BN, BK], W.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # nobody is further behind than the ring is deep, and three items: what all have heard may be written over
    items = gl.allocate_shared_memory(gl.int32, [STAGES + 3, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [STAGES + 3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 3):
        mbarrier.init(told.index(i), count=1)
    turn = ready
    if PARTS == 2 and not HALVES:  # a barrier that nobody uses lets its memory go, while the device still writes to it
        turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1 + 32 * LOADERS)
        mbarrier.init(empty.index(i), count=2 if HALVES else 1)
    if PDL:
        overlap()
    ring = Ring(a_smem, w_smem, ready, empty)
    out = Target(OUT, BIAS, WEIGHTS, SORTED, pairs, out_row, second, N, alpha, limit)
    how: gl.constexpr = _kind(TOPK, STEP, ACT, WEIGHTED, BIASED, SWAP, ATOMIC)
    if PARTS == 1:
        gl.warp_specialize(
            [
                (_multiply, (out, ring, items, told, turn, how, BM, BN, STAGES, 0, 1, num_warps)),
                (_load, (A, W, SORTED, BLOCKS, TOTAL, TICKETS, ROWS, ring, items, told, pairs, a_row, rows, second, N,
                         K, TOPK, BM, BN, STEP, BK, GROUP, STAGES, SOURCE, EVEN, ATOMIC, TICKETED, LOADERS)),
            ],
            [LOADERS],
            [56],
        )
    elif HALVES:
        gl.warp_specialize(
            [
                (_multiply_half, (out, ring, items, told, turn, how, BM, BN, STAGES, 0, num_warps)),
                (_multiply_half, (out, ring, items, told, turn, how, BM, BN, STAGES, 1, num_warps)),
                (_load, (A, W, SORTED, BLOCKS, TOTAL, TICKETS, ROWS, ring, items, told, pairs, a_row, rows, second, N,
                         K, TOPK, BM, BN, STEP, BK, GROUP, STAGES, SOURCE, EVEN, ATOMIC, TICKETED, LOADERS)),
            ],
            [num_warps, LOADERS],
            [208, 88],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (out, ring, items, told, turn, how, BM, BN, STAGES, 0, 2, num_warps)),
                (_multiply, (out, ring, items, told, turn, how, BM, BN, STAGES, 1, 2, num_warps)),
                (_load, (A, W, SORTED, BLOCKS, TOTAL, TICKETS, ROWS, ring, items, told, pairs, a_row, rows, second, N,
                         K, TOPK, BM, BN, STEP, BK, GROUP, STAGES, SOURCE, EVEN, ATOMIC, TICKETED, LOADERS)),
            ],
            [num_warps, LOADERS],
            [224, 56],
        )
