"""Dispatch and combine as a caller sees them: arguments are checked, views of the shared memory made, kernels launched.

Nothing here synchronises with the host, so all of it can be captured in a graph.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from moecache.kernels.agreed import BLOCK
from moecache.kernels.ep import collectives, combine_kernels, dispatch_kernels
from moecache.kernels.ep.context import WORDS, EpContext
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import pow2

COPY, QUANTISE, SCALED = 0, 1, 2  # as dispatch_kernels has them
WORDS_AT = 0  # in the shared memory
DISPATCHES = ("push", "all_gather", "all_to_all")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMBINES = ("pull", "push", "reduce_scatter", "all_to_all")

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # as they are, or fp8 with scales


@dataclass(frozen=True)
class DispatchConfig:
    """How dispatch is launched.

    Attributes:
        how: "push" stores each row where it is wanted; "all_gather" and "all_to_all" are collectives of
            torch.distributed, to which the other fields say nothing.
        programs, num_warps: of the launch.
        block: columns of a chunk.
    """

    how: str
    programs: int = 128
    num_warps: int = 8
    block: int = 4096


@dataclass(frozen=True)
class CombineConfig:
    """How combine is launched.

    Attributes:
        how: "pull" reads the peers' rows; "push" writes them, with as many programs again for the sums;
            "reduce_scatter" and "all_to_all" are collectives of torch.distributed.
        programs, num_warps: of the launch.
        block: columns of a chunk.
        steps: of push: in which rows are sent, and summed as they come.
    """

    how: str
    programs: int = 128
    num_warps: int = 8
    block: int = 4096
    steps: int = 1


@dataclass(frozen=True)
class Handle:
    """What combine needs to know of a dispatch: also the `ids` that came, where `sums` go and which rows are `kept`."""

    slot: int
    capacity: int
    topk_ids: torch.Tensor
    ids: torch.Tensor
    sums: torch.Tensor
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


def default_dispatch(hidden: int, tokens: int) -> DispatchConfig:
    """What is fastest, or nearly, on two H200s: one program on each unit, with larger chunks where rows are many."""
    return DispatchConfig("push", 128, 8, fitting(hidden, 1024 if tokens < 64 else 4096 if tokens < 512 else 8192))


def default_combine(hidden: int, tokens: int) -> CombineConfig:
    """As `default_dispatch`. A push can be a little faster for thousands of tokens, but needs its own memory."""
    return CombineConfig("pull", 128 if tokens < 512 else 256, 8, fitting(hidden, 1024 if tokens < 64 else 4096))


def fitting(hidden: int, block: int) -> int:
    """A chunk of at most so many columns that is no longer than a row needs."""
    return min(block, max(128, pow2(hidden)))


def dispatch(
    ctx: EpContext,
    x: Rows,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    capacity: int | None = None,
    config: DispatchConfig | None = None,
    exact: bool = False,
    receive: bool = True,
) -> Received:
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
        receive: False does the first half alone. Its result may be read after `dispatch_receive`; until then the
            context makes no other call.

    Raises:
        InvalidInput: an argument is out of range; exact within a capture, or with the first half alone.
    """
    if exact and (not receive or (ctx.device.type == "cuda" and torch.cuda.is_current_stream_capturing())):
        raise InvalidInput("exact=True waits for rows, which no capture can, nor receive=False: leave it out")
    capacity = ctx.max_tokens if capacity is None else capacity
    row, scales, wire = _checked(ctx, x, topk_ids, topk_weights, capacity)
    chosen, topk_ids = config or default_dispatch(ctx.hidden, capacity), ctx.physical(topk_ids)
    _check_config(chosen, DISPATCHES)
    if chosen.how != "push" and wire == QUANTISE:
        raise InvalidInput(f"how={chosen.how!r} with rows that are not fp8 yet; quantise them first, or use how='push'")
    slot, rows, scaled = ctx.next_slot(), ctx.world * capacity, ctx.wire == "fp8"
    part = partial(ctx.part, slot)
    ids, sums = part("ids", torch.int32, rows, ctx.topk), part("back", ctx.dtype, rows, ctx.hidden)
    handle = Handle(slot, capacity, topk_ids, ids, sums, chosen)
    if chosen.how == "push":
        _launch_dispatch(ctx, handle, row, scales, topk_weights, wire, True, receive)
        came = part("rows", ctx.fp8 if scaled else ctx.dtype, rows, ctx.hidden)
        came_scales = part("scales", torch.float32, rows, ctx.hidden // BLOCK) if scaled else None
        weights, counts = part("weights", torch.float32, rows, ctx.topk), part("counts", torch.int32, ctx.world)
        got = Received(came, came_scales, ids, weights, counts, sums, handle)
    else:
        got = _by_collectives(ctx, handle, row, scales, topk_weights)
    return _kept(got) if exact else got


def _kept(got: Received) -> Received:
    """The rows that hold something, in their order."""
    kept = (got.ids >= 0).any(1).nonzero().squeeze(1)
    rows = got.rows.view(torch.uint8)[kept].view(got.rows.dtype)
    scales = None if got.scales is None else got.scales[kept]
    sums = got.sums.new_empty(len(kept), got.sums.shape[1])
    return Received(rows, scales, got.ids[kept], got.weights[kept], got.counts, sums, replace(got.handle, kept=kept))


def _by_collectives(
    ctx: EpContext, handle: Handle, row: torch.Tensor, scales: torch.Tensor, topk_weights: torch.Tensor
) -> Received:
    """A dispatch that sends all rows to all ranks."""
    scaled, capacity = ctx.wire == "fp8", handle.capacity
    sent = [
        collectives.padded(row, capacity),
        collectives.padded(handle.topk_ids.clamp(-1, ctx.experts).to(torch.int32), capacity, -1),
        collectives.padded(topk_weights.float(), capacity),
    ]
    sent += [collectives.padded(scales, capacity)] if scaled else []
    count = torch.full((1,), len(row), dtype=torch.int32, device=ctx.device)
    move = collectives.gather if handle.dispatch_config.how == "all_gather" else collectives.swap
    rows, every, weights, *rest = move(ctx, *sent, count)
    held = ctx.experts_of(ctx.rank)
    ids = torch.where((every >= held.start) & (every < held.stop), every, -1)
    handle, found = replace(handle, ids=ids), rows.view(ctx.fp8) if scaled else rows
    return Received(found, rest[0] if scaled else None, ids, weights, rest[-1], handle.sums, handle)


def dispatch_receive(ctx: EpContext, handle: Handle) -> None:
    """The second half of `dispatch`: wait for what the others send. Collectives have no halves."""
    if handle.dispatch_config.how == "push":
        nothing = handle.topk_ids
        _launch_dispatch(ctx, handle, nothing, nothing, nothing, COPY, False, True)


def dequantised(ctx: EpContext, got: Received) -> torch.Tensor:
    """The received rows in the context's dtype. Rows that hold nothing are not written."""
    if got.scales is None:
        return got.rows
    rows = torch.empty(got.rows.shape, dtype=ctx.dtype, device=ctx.device)
    block = min(4096, pow2(ctx.hidden))
    chunks = -(-ctx.hidden // block)
    dispatch_kernels.dequantise_rows[(len(rows), chunks)](
        got.rows, got.scales, got.ids, rows, K=ctx.topk, KP=pow2(ctx.topk), H=ctx.hidden, BLOCK=block, num_warps=4
    )
    return rows


def combine(
    ctx: EpContext,
    y: torch.Tensor,
    handle: Handle,
    out: torch.Tensor | None = None,
    *,
    config: CombineConfig | None = None,
    receive: bool = True,
) -> torch.Tensor:
    """Bring the experts' rows home, and sum each token's over the ranks in float32: [T, hidden].

    Args:
        ctx: the ranks' shared memory.
        y: of the context's dtype, as many rows as `Received.rows`: for each of them the weighted sum over this rank's
            experts. A pull reads it from `Received.sums`, and copies it there if it is elsewhere.
        handle: of the dispatch.
        out: [T, hidden] to write into.
        config: how it is launched; the same on all ranks.
        receive: False does the first half alone. Its result may be read after `combine_receive`, which gets the same
            arguments; until then the context makes no other call.

    Raises:
        InvalidInput: an argument is out of range.
    """
    chosen = config or default_combine(ctx.hidden, handle.capacity)
    _check_config(chosen, COMBINES)
    sums, shape = handle.sums, (handle.topk_ids.shape[0], ctx.hidden)
    out = torch.empty(shape, dtype=ctx.dtype, device=ctx.device) if out is None else out
    rows = len(sums) if handle.kept is None else len(handle.kept)
    _allow(ctx, "y", y, (rows, ctx.hidden), ctx.dtype)
    _allow(ctx, "out", out, shape, ctx.dtype)
    y = _whole(y, handle, chosen)
    if chosen.how in ("reduce_scatter", "all_to_all"):
        back = collectives.scatter if chosen.how == "reduce_scatter" else collectives.swap_back
        return out.copy_(back(ctx, torch.where((handle.ids >= 0).any(1, keepdim=True), y, 0))[: len(out)])
    there = y.data_ptr() == sums.data_ptr()
    if chosen.how == "pull" and not there:
        sums.copy_(y)
    elif chosen.how == "push" and there:
        raise InvalidInput("y is Received.sums, where a push puts what the peers send; it needs other memory")
    _launch_combine(ctx, handle, chosen, y, out, True, receive)
    return out


def combine_receive(
    ctx: EpContext, y: torch.Tensor, handle: Handle, out: torch.Tensor, *, config: CombineConfig | None = None
) -> torch.Tensor:
    """The second half of `combine`: wait for the others' rows and sum them."""
    chosen = config or default_combine(ctx.hidden, handle.capacity)
    if chosen.how in ("pull", "push"):
        y = y if chosen.how == "pull" else _whole(y, handle, chosen)  # a pull has sent it
        _launch_combine(ctx, handle, chosen, y, out, False, True)
    return out


def _whole(y: torch.Tensor, handle: Handle, config: CombineConfig) -> torch.Tensor:
    """The caller's rows at the places of all rows that were received."""
    if handle.kept is None:
        return y
    into = handle.sums if config.how == "pull" else torch.empty_like(handle.sums)
    return into.index_copy_(0, handle.kept, y)


def _checked(
    ctx: EpContext, x: Any, ids: torch.Tensor, weights: torch.Tensor, capacity: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(rows, scales, what the wire does with them)."""
    row, scales = x if isinstance(x, tuple) else (x, None)
    tokens = row.shape[0] if row.dim() == 2 else 0
    if not 1 <= capacity <= ctx.max_tokens or tokens > capacity:
        allowed = f"capacities to {ctx.max_tokens}, and as many tokens"
        raise InvalidInput(f"{tokens} tokens, capacity={capacity}; allowed are {allowed}")
    if scales is not None and ctx.wire != "fp8":
        raise InvalidInput(f"x comes with scales on wire {ctx.wire!r}; allowed is that on wire 'fp8'")
    _allow(ctx, "x", row, (tokens, ctx.hidden), ctx.dtype if scales is None else ctx.fp8)
    _allow(ctx, "topk_ids", ids, (tokens, ctx.topk), torch.int32, torch.int64)
    _allow(ctx, "topk_weights", weights, (tokens, ctx.topk), *FLOATS)
    if row.data_ptr() % 16:
        raise InvalidInput(f"x begins at {row.data_ptr():#x}; allowed are multiples of 16 bytes")
    if scales is None:
        return row, row, QUANTISE if ctx.wire == "fp8" else COPY
    _allow(ctx, "scales", scales := scales.contiguous(), (tokens, ctx.hidden // BLOCK), torch.float32)
    return row.view(torch.uint8), scales, SCALED


def _allow(ctx: EpContext, name: str, given: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Refuse what is of another kind."""
    right = given.dtype in dtypes and given.device == ctx.device and given.is_contiguous()
    if not right or tuple(given.shape) != shape:
        allowed = f"contiguous {' or '.join(map(str, dtypes))} {list(shape)} on {ctx.device}"
        raise InvalidInput(f"{name} is {given.dtype} {list(given.shape)} on {given.device}; allowed is {allowed}")


def _check_config(config: DispatchConfig | CombineConfig, ways: tuple[str, ...]) -> None:
    if config.how not in ways:
        raise InvalidInput(f"how={config.how!r}; allowed are {', '.join(ways)}")
    programs, warps, block, steps = config.programs, config.num_warps, config.block, getattr(config, "steps", 1)
    wrong = not 1 <= programs <= WORDS // 2 or warps not in (1, 2, 4, 8, 16) or not 1 <= steps <= 1024
    if wrong or block != pow2(block) or block < 128:
        raise InvalidInput(
            f"programs={programs}, num_warps={warps}, block={block}, steps={steps}; allowed are 1 to {WORDS // 2} "
            "programs, 1, 2, 4, 8 or 16 warps, a power of two from 128 on, and 1 to 1024 steps"
        )


def _type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float32: tl.float32,
        torch.uint8: tl.uint8,
        torch.float8_e4m3fn: tl.float8e4nv,
        torch.float8_e4m3fnuz: tl.float8e4b8,
    }[dtype]


def _constants(ctx: EpContext, config: DispatchConfig | CombineConfig, launched: int) -> dict[str, Any]:
    """What all kernels are told at compile time."""
    return ({"launch_pdl": True} if ctx.early else {}) | {
        "WORLD": ctx.world, "WIDE": pow2(ctx.world), "PAIR": ctx.pair, "WORDS": WORDS, "HIP": ctx.hip, "PDL": ctx.early,
        "THREADS": config.num_warps * 64, "num_warps": config.num_warps, "K": ctx.topk, "KP": pow2(ctx.topk),
        "H": ctx.hidden, "E": ctx.experts, "BLOCK": config.block, "NH": -(-ctx.hidden // config.block),
        "PROGRAMS": config.programs, "SPAN": pow2(-(-WORDS // launched)),
    }  # fmt: skip


def _launch_dispatch(
    ctx: EpContext,
    handle: Handle,
    row: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    wire: int,
    send: bool,
    receive: bool,
) -> None:
    config, slot, at = handle.dispatch_config, handle.slot, ctx.parts.at
    stored = {COPY: row.dtype if send else ctx.dtype, QUANTISE: ctx.fp8, SCALED: torch.uint8}[wire]
    dispatch_kernels.dispatch_rows[(config.programs,)](
        row, scales, handle.topk_ids, weights, ctx.peers.addresses, ctx.words, ctx.clock, ctx.last[0, slot], ctx.drain,
        ctx.error, handle.topk_ids.shape[0], handle.capacity, ctx.rank, ctx.patience, WORDS_AT,
        at(slot, "counts"), at(slot, "ids"), at(slot, "weights"), at(slot, "rows"), at(slot, "scales"), WIRE=wire,
        TYPE=_type(stored), TOP=torch.finfo(ctx.fp8).max, SEND=send, RECEIVE=receive,
        **_constants(ctx, config, config.programs),
    )  # fmt: skip


def _launch_combine(
    ctx: EpContext, handle: Handle, config: CombineConfig, y: torch.Tensor, out: torch.Tensor, send: bool, receive: bool
) -> None:
    slot, programs = handle.slot, config.programs
    known = (ctx.peers.addresses, ctx.words, ctx.clock, ctx.last[1, slot], ctx.drain, ctx.error,
             handle.topk_ids.shape[0], handle.capacity, ctx.rank, ctx.patience, WORDS_AT,
             ctx.parts.at(slot, "back"))  # fmt: skip
    way = {"SEND": send, "RECEIVE": receive, "TYPE": _type(ctx.dtype)}
    if config.how == "pull":
        combine_kernels.pull_rows[(programs if receive else 1,)](
            handle.topk_ids, out, *known, **way, **_constants(ctx, config, programs)
        )
        return
    chunks, launched = handle.capacity * -(-ctx.hidden // config.block), programs * (send + receive)
    step = -(-chunks // (config.steps * programs)) * programs  # a whole number of rounds of the programs
    args = (y, handle.ids, handle.sums, handle.topk_ids, out, *known, -(-chunks // step), step)
    combine_kernels.push_rows[(launched,)](*args, **way, **_constants(ctx, config, launched))
