"""Expert parallelism on interpreted AMD GPUs: the ranks' launches run at a time and wait for each other."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("triton")

from cdna.device import LATE, MIXED, Log, Mode, interpreted
from ep_local import contexts, on_amd, poison
from ep_model import Sent, expected, of_rank, sent, worked

from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import (
    CombineConfig,
    DispatchConfig,
    Received,
    combine,
    combine_receive,
    dispatch,
)
from moecache.kernels.ep.layer import dequantised

HIDDEN, TOPK, MOST = 256, 3, 3
DISPATCH = DispatchConfig("push", 2, 2, 128)
COMBINES = [CombineConfig("pull", 2, 2, 128), CombineConfig("push", 2, 2, 128, steps=2)]


def dispatched(log: Log, ranks: Sequence[EpContext], calls: list[Sent]) -> list[Received]:
    rows = [one.x.to(ctx.dtype) for ctx, one in zip(ranks, calls, strict=True)]
    with log.together():
        found = [dispatch(ctx, x, one.ids, one.weights, config=DISPATCH)
                 for ctx, x, one in zip(ranks, rows, calls, strict=True)]  # fmt: skip
    assert not log.wrong, log.wrong
    for ctx, got in zip(ranks, found, strict=True):
        ctx.check()
        assert got.counts.tolist() == [len(each.x) for each in calls]
        for rank, each in enumerate(calls):
            here = slice(rank * MOST, rank * MOST + len(each.x))
            want = of_rank(each.ids, ctx.experts_of(ctx.rank))
            there = (want >= 0).any(1)
            assert torch.equal(got.ids[here], want) and (got.ids[here.stop : (rank + 1) * MOST] == -1).all()
            assert torch.equal(got.rows[here][there], each.x.to(ctx.dtype)[there])
            assert torch.equal(got.weights[here], each.weights)
    return found


def combined(
    log: Log, ranks: Sequence[EpContext], found: list[Received], calls: list[Sent], config: CombineConfig
) -> None:
    rows = [worked(got.rows, got.ids, got.weights) for got in found]
    if config.how == "pull":
        rows = [got.sums.copy_(y) for got, y in zip(found, rows, strict=True)]
    with log.together():
        outs = [combine(ctx, y, got.handle, torch.full_like(one.x, torch.nan, dtype=ctx.dtype), config=config)
                for ctx, got, y, one in zip(ranks, found, rows, calls, strict=True)]  # fmt: skip
    assert not log.wrong, log.wrong
    for ctx, out, one in zip(ranks, outs, calls, strict=True):
        ctx.check()
        assert torch.allclose(out.double(), expected(one), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("arch, world, mode", [("gfx942", 2, MIXED), ("gfx950", 2, LATE), ("gfx942", 3, MIXED)])
def test_ranks_that_run_at_a_time_get_what_they_should(arch: str, world: int, mode: Mode) -> None:
    """Two dispatches with nothing between are among them: then the peers are asked before a row is overwritten."""
    experts = 2 * world + 1
    with interpreted(arch) as log:
        ranks = on_amd(contexts(world, HIDDEN, experts, TOPK, MOST, dtype=torch.bfloat16, patience=30.0))
        log.mode, log.peers = mode, [ctx.peers.memory for ctx in ranks]
        for step, config in enumerate((*COMBINES, None, COMBINES[1])):
            calls = [sent(rank, (rank + step) % (MOST + 1), HIDDEN, experts, TOPK, step) for rank in range(world)]
            if config:
                poison(ranks)
            found = dispatched(log, ranks, calls)
            if config:
                combined(log, ranks, found, calls, config)


@pytest.mark.parametrize("arch, kind", [("gfx942", torch.float8_e4m3fnuz), ("gfx950", torch.float8_e4m3fn)])
def test_rows_become_fp8_on_the_way_and_halves_bring_sums_home(arch: str, kind: torch.dtype) -> None:
    with interpreted(arch) as log:
        ranks = on_amd(contexts(2, HIDDEN, 4, TOPK, MOST, dtype=torch.bfloat16, wire="fp8", patience=30.0))
        for ctx in ranks:
            ctx.fp8 = kind
        log.mode, log.peers = MIXED, [ctx.peers.memory for ctx in ranks]
        calls = [sent(rank, MOST - rank, HIDDEN, 4, TOPK, 5) for rank in range(2)]
        poison(ranks)
        rows = [one.x.bfloat16() for one in calls]
        with log.together():
            found = [dispatch(ctx, x, one.ids, one.weights, config=DISPATCH)
                     for ctx, x, one in zip(ranks, rows, calls, strict=True)]  # fmt: skip
        back = [dequantised(ctx, got) for ctx, got in zip(ranks, found, strict=True)]
        for got, values in zip(found, back, strict=True):
            for rank, x in enumerate(rows):
                here = slice(rank * MOST, rank * MOST + len(x))
                there = (got.ids[here] >= 0).any(1)
                top = x[there].float().view(-1, HIDDEN // 128, 128).abs().amax(2)
                assert torch.allclose(got.scales[here][there], top / torch.finfo(kind).max)
                assert torch.allclose(values[here][there].float(), x[there].float(), rtol=0.07, atol=0.02)
        config = COMBINES[1]
        ys = [worked(values, got.ids, got.weights) for got, values in zip(found, back, strict=True)]
        outs = [combine(ctx, y, got.handle, config=config, receive=False)
                for ctx, y, got in zip(ranks, ys, found, strict=True)]  # fmt: skip
        for ctx, y, got, out, one in zip(ranks, ys, found, outs, calls, strict=True):
            combine_receive(ctx, y, got.handle, out, config=config)
            ctx.check()
            assert torch.allclose(out.double(), expected(one), rtol=0.1, atol=0.1)
        assert not log.wrong and {"dispatch_rows", "dequantise_rows", "push_rows"} <= set(log.names)


def is_right(log: Log, drained: bool, seed: int) -> bool:
    """Whether a push of sixteen waves brings the right sums, in one random order of all waves."""
    ranks = on_amd(contexts(2, 512, 4, TOPK, MOST, dtype=torch.bfloat16, patience=30.0))
    for ctx in ranks:
        ctx.hip = drained
    log.clear()
    log.mode, log.peers = replace(MIXED, quantum=300, seed=seed), [ctx.peers.memory for ctx in ranks]
    calls = [sent(rank, MOST, 512, 4, TOPK, 1, "rank") for rank in range(2)]
    poison(ranks)
    try:
        combined(log, ranks, dispatched(log, ranks, calls), calls, CombineConfig("push", 3, 16, 512))
    except AssertionError:
        return False
    return True


def test_a_word_that_waits_for_the_stores_of_one_wave_alone_is_told_too_early() -> None:
    """The mutant has no drain of each wave before the barrier: what other waves store lands after the word."""
    with interpreted("gfx942") as log:
        assert not all(is_right(log, False, seed) for seed in range(40))
        assert all(is_right(log, True, seed) for seed in range(6))
