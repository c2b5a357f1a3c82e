"""Dispatch and combine as a caller sees them: arguments are checked, views of the shared memory made, kernels launched.

Nothing here synchronises with the host, so all of it can be captured in a graph.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from moecache.kernels.ep import collectives, combine_kernels, dispatch_kernels, signals
from moecache.kernels.ep.context import WORDS, EpContext
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import pow2

COPY, QUANTISE, SCALED = 0, 1, 2  # as dispatch_kernels has them
MOST_BESIDE = 2048  # warps that send, beside as many that wait for copies: what tells of those must find room

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # as they are, or fp8 with scales


@dataclass(frozen=True)
class DispatchConfig:
    """How dispatch is launched.

    Attributes:
        how: "push" stores each row where it is wanted; "copy" has copy engines move rows to all ranks, which leaves the
            units to others; "all_gather" and "all_to_all" are collectives of torch.distributed, to which the other
            fields say nothing.
        programs, num_warps: of the launch.
        block: columns of a chunk.
        stored: of copy: per cent of the tokens whose rows programs store while the copy engines start.
        early: launched before the kernel ahead of it has ended (programmatic dependent launch), where the vendor can.
    """

    how: str
    programs: int = 128
    num_warps: int = 8
    block: int = 4096
    stored: int = 0
    early: bool = False


@dataclass(frozen=True)
class CombineConfig:
    """How combine is launched.

    Attributes:
        how: "pull" reads the peers' rows; "push" writes them, with as many programs again for the sums; "copy" has copy
            engines write most; "reduce_scatter" and "all_to_all" are collectives of torch.distributed.
        programs, num_warps: of the launch.
        block: columns of a chunk.
        steps: in which rows are sent, and summed as they come; of push and copy.
        stored: of copy: per cent of the tokens whose rows programs write, so that the link does not rest between steps.
        early: as of dispatch.
    """

    how: str
    programs: int = 128
    num_warps: int = 8
    block: int = 4096
    steps: int = 1
    stored: int = 0
    early: bool = False


@dataclass(frozen=True)
class Handle:
    """What combine needs to know of a dispatch: also `ids`, those that were received, and which rows are `kept`."""

    slot: int
    capacity: int
    topk_ids: torch.Tensor
    ids: torch.Tensor
    dispatch_config: DispatchConfig
    kept: torch.Tensor | None = None


@dataclass(frozen=True)
class Received:
    """What this rank's experts have to work on: views of the shared memory. Row s · capacity + t is token t of rank s.

    Rows whose ids are all −1 hold nothing. What reads the views has to be launched before the handle's combine, or, if
    there is none, before the context's next call.

    Attributes:
        rows: [world · capacity, hidden], of the context's dtype or fp8; fewer with `exact`.
        scales: [world · capacity, hidden / 128] float32 of fp8 rows; None of others.
        ids: [world · capacity, topk] int32, numbers among all experts, −1 for those of other ranks. `expert_map` of the
            context makes them numbers among this rank's.
        weights: [world · capacity, topk] float32.
        counts: [world] int32, how many tokens each rank has sent from.
        sums: [world · capacity, hidden] to write the experts' results into: from there a pull needs no copy.
        handle: for combine.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    ids: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor
    handle: Handle


def default_dispatch(ctx: EpContext, capacity: int) -> DispatchConfig:
    """What is fastest, or nearly, on two H200s: one program on each unit, with larger chunks where rows are many."""
    block = 1024 if capacity < 64 else 4096 if capacity < 512 else 8192
    return DispatchConfig("push", programs=128, num_warps=8, block=_block(ctx, block))


def default_combine(ctx: EpContext, capacity: int) -> CombineConfig:
    """As `default_dispatch`. For thousands of tokens a push is a little faster, but needs its own memory."""
    if capacity < 512:
        return CombineConfig("pull", programs=128, num_warps=8, block=_block(ctx, 1024 if capacity < 64 else 4096))
    return CombineConfig("pull", programs=256, num_warps=8, block=_block(ctx, 4096))


def _block(ctx: EpContext, most: int) -> int:
    """A chunk of at most so many columns that is no longer than a row needs."""
    return min(most, max(128, pow2(ctx.hidden)))


def dispatch(
    ctx: EpContext, x: Rows, topk_ids: torch.Tensor, topk_weights: torch.Tensor, *, capacity: int | None = None,
    config: DispatchConfig | None = None, exact: bool = False,
) -> Received:  # fmt: skip
    """Send each token once to every rank that holds one of its experts, and wait for what the others send.

    Args:
        ctx: the ranks' shared memory.
        x: [T, hidden] of the context's dtype; with the fp8 wire also (fp8, scales [T, hidden / 128] float32).
        topk_ids: [T, topk] int32 or int64, numbers among all experts; others, such as −1, choose nobody.
        topk_weights: [T, topk], any float dtype; they travel as float32.
        capacity: rows that each rank gets from each; the same on all ranks, and at least the tokens of any. Default:
            the context's max_tokens_per_rank.
        config: how it is launched; the same on all ranks.
        exact: give a copy of those rows alone that hold something. How many there are is asked of the device: this is
            the one host synchronisation. Each rank may choose for itself.

    Raises:
        InvalidInput: an argument is out of range; exact within a capture.
    """
    if exact and ctx.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise InvalidInput("exact=True waits for the device, and a graph is being captured: leave it out")
    got = _dispatch(ctx, x, topk_ids, topk_weights, capacity, config, receive=True)
    return _kept(got) if exact else got


def _kept(got: Received) -> Received:
    """The rows that hold something, in their order."""
    kept = (got.ids >= 0).any(1).nonzero().squeeze(1)
    rows = got.rows.view(torch.uint8)[kept].view(got.rows.dtype)
    scales = None if got.scales is None else got.scales[kept]
    sums = got.sums.new_empty(len(kept), got.sums.shape[1])
    return Received(rows, scales, got.ids[kept], got.weights[kept], got.counts, sums, replace(got.handle, kept=kept))


def dispatch_send(
    ctx: EpContext, x: Rows, topk_ids: torch.Tensor, topk_weights: torch.Tensor, *, capacity: int | None = None,
    config: DispatchConfig | None = None,
) -> Received:  # fmt: skip
    """The first half of `dispatch`. Its result may be read after `dispatch_receive`; until then the context makes no
    other call."""
    return _dispatch(ctx, x, topk_ids, topk_weights, capacity, config, receive=False)


def _dispatch(
    ctx: EpContext, x: Rows, topk_ids: torch.Tensor, topk_weights: torch.Tensor, capacity: int | None,
    config: DispatchConfig | None, receive: bool,
) -> Received:  # fmt: skip
    capacity = ctx.max_tokens if capacity is None else capacity
    row, scales, wire = _rows_to_send(ctx, x)
    _check_routing(ctx, row, topk_ids, topk_weights, capacity)
    topk_ids = ctx.physical(topk_ids)
    chosen = config or default_dispatch(ctx, capacity)
    _check_config(chosen, ("push", "copy", "all_gather", "all_to_all"))
    if chosen.how != "push" and wire == QUANTISE:
        raise InvalidInput(f"how={chosen.how!r} with rows that are not fp8 yet; quantise them first, or use how='push'")
    slot, rows = ctx.next_slot(), ctx.world * capacity
    if chosen.how in ("all_gather", "all_to_all"):
        return _by_collectives(ctx, slot, capacity, chosen, row, scales, topk_ids, topk_weights)
    ids = ctx.part(slot, "ids", torch.int32, rows, ctx.topk)
    handle = Handle(slot, capacity, topk_ids, ids, chosen)
    _launch_dispatch(ctx, handle, row, scales, topk_weights, wire, True, receive)
    scaled = ctx.wire == "fp8"
    return Received(
        rows=ctx.part(slot, "rows", ctx.fp8 if scaled else ctx.dtype, rows, ctx.hidden),
        scales=ctx.part(slot, "scales", torch.float32, rows, ctx.hidden // 128) if scaled else None,
        ids=ids,
        weights=ctx.part(slot, "weights", torch.float32, rows, ctx.topk),
        counts=ctx.part(slot, "counts", torch.int32, ctx.world),
        sums=_sums(ctx, handle),
        handle=handle,
    )


def _by_collectives(
    ctx: EpContext, slot: int, capacity: int, config: DispatchConfig, row: torch.Tensor, scales: torch.Tensor,
    topk_ids: torch.Tensor, topk_weights: torch.Tensor,
) -> Received:  # fmt: skip
    """A dispatch that sends all rows to all ranks."""
    scaled = ctx.wire == "fp8"
    sent = [collectives.padded(row, capacity), collectives.padded(topk_ids.to(torch.int32), capacity, -1),
            collectives.padded(topk_weights.float(), capacity)]  # fmt: skip
    sent += [collectives.padded(scales, capacity)] if scaled else []
    count = torch.full((1,), len(row), dtype=torch.int32, device=ctx.device)
    move = collectives.gather if config.how == "all_gather" else collectives.swap
    rows, every, weights, *rest = move(ctx, *sent, count)
    held = ctx.experts_of(ctx.rank)
    ids = torch.where((every >= held.start) & (every < held.stop), every, -1)
    handle = Handle(slot, capacity, topk_ids, ids, config)
    found = rows.view(ctx.fp8) if scaled else rows
    return Received(found, rest[0] if scaled else None, ids, weights, rest[-1], _sums(ctx, handle), handle)


def _sums(ctx: EpContext, handle: Handle) -> torch.Tensor:
    return ctx.part(handle.slot, "back", ctx.dtype, ctx.world * handle.capacity, ctx.hidden)


def dispatch_receive(ctx: EpContext, handle: Handle) -> None:
    """The second half of `dispatch`: wait for what the others send. Collectives have no halves."""
    if handle.dispatch_config.how in ("push", "copy"):
        nothing = handle.topk_ids
        _launch_dispatch(ctx, handle, nothing, nothing, nothing, COPY, False, True)


def combine(
    ctx: EpContext, y: torch.Tensor, handle: Handle, out: torch.Tensor | None = None, *,
    config: CombineConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """Bring the experts' rows home, and sum each token's over the ranks in float32: [T, hidden].

    Args:
        ctx: the ranks' shared memory.
        y: of the context's dtype, as many rows as `Received.rows`: for each of them the weighted sum over this rank's
            experts. A pull reads it from `Received.sums`, and copies it there if it is elsewhere.
        handle: of the dispatch.
        out: [T, hidden] to write into.
        config: how it is launched; the same on all ranks.

    Raises:
        InvalidInput: an argument is out of range.
    """
    return _combine(ctx, y, handle, out, config, receive=True)


def combine_send(
    ctx: EpContext, y: torch.Tensor, handle: Handle, out: torch.Tensor | None = None, *,
    config: CombineConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """The first half of `combine`. Its result may be read after `combine_receive`, which gets the same arguments; until
    then the context makes no other call."""
    return _combine(ctx, y, handle, out, config, receive=False)


def _combine(
    ctx: EpContext, y: torch.Tensor, handle: Handle, out: torch.Tensor | None, config: CombineConfig | None,
    receive: bool,
) -> torch.Tensor:  # fmt: skip
    chosen = config or default_combine(ctx, handle.capacity)
    _check_config(chosen, ("pull", "push", "copy", "reduce_scatter", "all_to_all"))
    sums = _sums(ctx, handle)
    shape = (handle.topk_ids.shape[0], ctx.hidden)
    out = torch.empty(shape, dtype=ctx.dtype, device=ctx.device) if out is None else out
    rows = len(sums) if handle.kept is None else len(handle.kept)
    for name, tensor, want in (("y", y, (rows, ctx.hidden)), ("out", out, shape)):
        if tuple(tensor.shape) != want or tensor.dtype != ctx.dtype or not tensor.is_contiguous():
            raise InvalidInput(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; allowed is contiguous {ctx.dtype} {list(want)}"
            )
    y = _whole(ctx, y, handle, chosen)
    if chosen.how in ("reduce_scatter", "all_to_all"):
        back = collectives.scatter if chosen.how == "reduce_scatter" else collectives.swap_back
        return out.copy_(back(ctx, torch.where((handle.ids >= 0).any(1, keepdim=True), y, 0))[: len(out)])
    there = y.data_ptr() == sums.data_ptr()
    if chosen.how == "pull" and not there:
        sums.copy_(y)
    elif chosen.how != "pull" and there:
        raise InvalidInput(f"y is Received.sums, where a {chosen.how} puts what the peers send; it needs other memory")
    _launch_combine(ctx, handle, chosen, y, out, True, receive)
    return out


def combine_receive(
    ctx: EpContext, y: torch.Tensor, handle: Handle, out: torch.Tensor, *, config: CombineConfig | None = None
) -> torch.Tensor:
    """The second half of `combine`: wait for the others' rows and sum them."""
    chosen = config or default_combine(ctx, handle.capacity)
    if chosen.how in ("pull", "push", "copy"):
        y = y if chosen.how == "pull" else _whole(ctx, y, handle, chosen)  # a pull has sent it
        _launch_combine(ctx, handle, chosen, y, out, False, True)
    return out


def _whole(ctx: EpContext, y: torch.Tensor, handle: Handle, config: CombineConfig) -> torch.Tensor:
    """The caller's rows at the places of all rows that were received."""
    if handle.kept is None:
        return y
    sums = _sums(ctx, handle)
    return (sums if config.how == "pull" else torch.empty_like(sums)).index_copy_(0, handle.kept, y)


def _rows_to_send(ctx: EpContext, x: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(rows, scales, what the wire does with them)."""
    row, scales = x if isinstance(x, tuple) else (x, None)
    if row.dim() != 2 or row.shape[1] != ctx.hidden or not row.is_contiguous() or row.data_ptr() % 16:
        raise InvalidInput(f"x is {list(row.shape)}; allowed is contiguous [T, {ctx.hidden}] that begins on 16 bytes")
    if scales is None:
        if row.dtype != ctx.dtype:
            raise InvalidInput(f"x is {row.dtype}; allowed is {ctx.dtype}")
        return row, row, QUANTISE if ctx.wire == "fp8" else COPY
    want = (row.shape[0], ctx.hidden // 128)
    if ctx.wire != "fp8" or row.dtype != ctx.fp8 or scales.dtype != torch.float32 or tuple(scales.shape) != want:
        raise InvalidInput(
            f"x is {row.dtype} with scales {scales.dtype} {list(scales.shape)} on wire {ctx.wire!r}; allowed is "
            f"{ctx.fp8} with float32 {list(want)} on wire 'fp8'"
        )
    return row.view(torch.uint8), scales.contiguous(), SCALED


def _check_routing(ctx: EpContext, row: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, capacity: int) -> None:
    tokens = row.shape[0]
    if not 1 <= capacity <= ctx.max_tokens or tokens > capacity:
        raise InvalidInput(
            f"{tokens} tokens, capacity={capacity}; allowed are capacities to {ctx.max_tokens}, and as many tokens"
        )
    for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
        if tuple(tensor.shape) != (tokens, ctx.topk) or not tensor.is_contiguous() or tensor.device != ctx.device:
            raise InvalidInput(
                f"{name} is {list(tensor.shape)} on {tensor.device}; allowed is contiguous {[tokens, ctx.topk]} "
                f"on {ctx.device}"
            )
    if ids.dtype not in (torch.int32, torch.int64) or not weights.is_floating_point():
        raise InvalidInput(
            f"topk_ids is {ids.dtype}, topk_weights {weights.dtype}; allowed are int32 or int64, and floats"
        )


def _check_config(config: DispatchConfig | CombineConfig, ways: tuple[str, ...]) -> None:
    if config.how not in ways:
        raise InvalidInput(f"how={config.how!r}; allowed are {', '.join(ways)}")
    programs, warps, block, steps = config.programs, config.num_warps, config.block, getattr(config, "steps", 1)
    if not 1 <= programs <= WORDS // 2 or warps not in (1, 2, 4, 8, 16) or block != pow2(block) or block < 128:
        raise InvalidInput(
            f"programs={programs}, num_warps={warps}, block={block}; allowed are 1 to {WORDS // 2} programs, 1, 2, 4, "
            "8 or 16 warps, and a power of two from 128 on"
        )
    if not 1 <= steps <= 1024 or not 0 <= config.stored <= 100:
        raise InvalidInput(f"steps={steps}, stored={config.stored}; allowed are 1 to 1024, and 0 to 100 per cent")
    if config.how == "copy" and programs * warps > MOST_BESIDE:
        raise InvalidInput(f"programs={programs}, num_warps={warps}; with copy at most {MOST_BESIDE} warps in all")


def _type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {
        torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.uint8: tl.uint8,
        torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e4m3fnuz: tl.float8e4b8,
    }[dtype]  # fmt: skip


def _ranks(ctx: EpContext, num_warps: int) -> dict[str, Any]:
    """What all kernels are told of the ranks at compile time."""
    return {
        "WORLD": ctx.world, "WIDE": pow2(ctx.world), "PAIR": ctx.pair, "WORDS": WORDS, "THREADS": num_warps * 64,
        "HIP": ctx.hip, "num_warps": num_warps,
    }  # fmt: skip


def _rows(ctx: EpContext, config: DispatchConfig | CombineConfig, programs: int, launched: int) -> dict[str, Any]:
    """What all kernels that move rows are told at compile time."""
    early = config.early and not ctx.hip and ctx.device.type == "cuda"
    return _ranks(ctx, config.num_warps) | ({"launch_pdl": True} if early else {}) | {
        "K": ctx.topk, "KP": pow2(ctx.topk), "H": ctx.hidden, "E": ctx.experts, "BLOCK": config.block,
        "NH": -(-ctx.hidden // config.block), "PROGRAMS": programs, "SPAN": pow2(-(-WORDS // launched)),
        "PDL": early,
    }  # fmt: skip


def _launch_dispatch(
    ctx: EpContext, handle: Handle, row: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, wire: int,
    send: bool, receive: bool,
) -> None:  # fmt: skip
    config, at = handle.dispatch_config, ctx.parts.at
    stored = {COPY: row.dtype if send else ctx.dtype, QUANTISE: ctx.fp8, SCALED: torch.uint8}[wire]

    def launch(programs: int, copied: int = 0, **parts: bool) -> None:
        dispatch_kernels.dispatch_rows[(programs,)](
            row, scales, handle.topk_ids, weights, ctx.peers.addresses, ctx.words, ctx.clock, ctx.last[0, handle.slot],
            ctx.drain, ctx.error, handle.topk_ids.shape[0], handle.capacity, ctx.rank, ctx.patience, ctx.parts.words,
            at(handle.slot, "counts"), at(handle.slot, "ids"), at(handle.slot, "weights"), at(handle.slot, "rows"),
            at(handle.slot, "scales"), copied, WIRE=wire, TYPE=_type(stored), TOP=torch.finfo(ctx.fp8).max, **parts,
            **_rows(ctx, config, programs, programs),
        )  # fmt: skip

    if config.how == "push":
        launch(config.programs, SEND=send, MOVE=send, TELL=send, RECEIVE=receive)
        return
    if send:
        copied = _copied(len(row), config)
        with ctx.beside():
            _enter(ctx, ctx.last[0, handle.slot], dispatch_kernels.SLOT_FREE.value)
            for rank in ctx.others() if copied else ():
                for name, part in (("rows", row), ("scales", scales))[: 1 + (wire == SCALED)]:
                    there = part[:copied]
                    ctx.peer_part(rank, handle.slot, name, ctx.rank * handle.capacity, there).copy_(there)
        # Rows that stay are not copied as well: that would wait for the same engine.
        launch(config.programs, copied, SEND=True, MOVE=True, TELL=False, RECEIVE=False)
        ctx.join()
    launch(1, SEND=False, MOVE=False, TELL=send, RECEIVE=receive)


def _enter(ctx: EpContext, last: torch.Tensor, phase: int) -> None:
    """Wait until copy engines may write to the peers."""
    signals.enter[(1,)](ctx.peers.addresses, ctx.words, ctx.clock, last, ctx.entered, ctx.drain, ctx.error, ctx.rank,
                        ctx.patience, ctx.parts.words, PHASE=phase, **_ranks(ctx, 1))  # fmt: skip


def _launch_combine(
    ctx: EpContext, handle: Handle, config: CombineConfig, y: torch.Tensor, out: torch.Tensor, send: bool, receive: bool
) -> None:
    slot, tokens, way = handle.slot, handle.topk_ids.shape[0], {"SEND": send, "RECEIVE": receive}
    last, back_at, stored = ctx.last[1, slot], ctx.parts.at(slot, "back"), _type(ctx.dtype)
    if config.how == "pull":
        programs = config.programs if receive else 1
        combine_kernels.pull_rows[(programs,)](
            handle.topk_ids, out, ctx.peers.addresses, ctx.words, ctx.clock, last, ctx.drain, ctx.error, tokens,
            handle.capacity, ctx.rank, ctx.patience, ctx.parts.words, back_at, TYPE=stored, **way,
            **_rows(ctx, config, config.programs, config.programs),
        )  # fmt: skip
        return
    copied = _copied(handle.capacity, config)
    units = -(-(handle.capacity - copied) * -(-ctx.hidden // config.block) // config.programs)
    steps = min(config.steps, max(units, copied))
    if copied and send:
        _copy_home(ctx, handle, y, last, config.programs, steps, copied)
    launched = config.programs * (send + receive)
    combine_kernels.push_rows[(launched,)](
        y, handle.ids, _sums(ctx, handle), handle.topk_ids, out, ctx.peers.addresses, ctx.words, ctx.clock, last,
        ctx.drain, ctx.error, tokens, handle.capacity, ctx.rank, ctx.patience, ctx.parts.words, back_at, steps, units,
        copied, TYPE=stored, COPIED=copied > 0, **way, **_rows(ctx, config, config.programs, launched),
    )  # fmt: skip
    if copied and receive:
        ctx.join()


def _copied(tokens: int, config: DispatchConfig | CombineConfig) -> int:
    """Of so many tokens those whose rows copy engines move: the first ones."""
    return tokens * (100 - config.stored) // 100 if config.how == "copy" else 0


def _copy_home(
    ctx: EpContext, handle: Handle, y: torch.Tensor, last: torch.Tensor, word: int, steps: int, copied: int
) -> None:
    """Have a copy engine move the rows of the first tokens home in steps, and tell of each step from a second stream: a
    launch between two copies would leave the link idle."""
    _enter(ctx, last, combine_kernels.LANDING_FREE.value)
    token = 0
    for step in range(steps):
        left = copied - token
        count = left if step == steps - 1 else -(-left * combine_kernels.SHARE.value // 100)
        with ctx.beside(first=step == 0):
            for rank in ctx.others() if count else ():
                part = y[rank * handle.capacity + token :][:count]
                ctx.peer_part(rank, handle.slot, "back", ctx.rank * handle.capacity + token, part).copy_(part)
        token += count
        with ctx.after_copies():
            combine_kernels.tell[(1,)](ctx.peers.addresses, ctx.entered, ctx.drain, ctx.rank, word, step,
                                       ctx.parts.words, **_ranks(ctx, 1))  # fmt: skip
