"""What GPUs do together in the tests of expert parallelism: `torchrun --nproc-per-node N ep_scenes.py SCENE`.

A scene is a function that raises AssertionError. Every rank knows what all have sent, so none has to ask another.
"""

import os
import random
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ep_model import Sent, expected, of_rank, sent, worked

import moecache
from moecache import ep
from moecache.dispatch.exchange import problem
from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import (
    CombineConfig,
    DispatchConfig,
    Received,
    combine,
    combine_receive,
    dispatch,
    dispatch_receive,
)
from moecache.kernels.ep.layer import dequantised, ep_moe
from moecache.schemas.errors import TeamLost

HIDDEN, EXPERTS, TOPK, MOST = 1024, 13, 4, 160
KINDS = ("uniform", "one", "rank", "none")
DISPATCHES = [DispatchConfig("push", 7, 4, 1024), DispatchConfig("push", 64, 8, 512)]
COMBINES = [CombineConfig("pull", 64, 4, 1024), CombineConfig("pull", 128, 8, 512),
            CombineConfig("push", 32, 4, 1024, steps=3), CombineConfig("push", 64, 8, 512)]  # fmt: skip


def made(**changes: Any) -> EpContext:
    known = {"hidden": HIDDEN, "num_experts": EXPERTS, "topk": TOPK, "max_tokens_per_rank": MOST}
    return EpContext(None, **known | changes)


def tokens_of(rank: int, step: int) -> int:
    """Unequal, at times none, at times the most."""
    return (MOST, 0, 1, 37, 128)[(rank * 3 + step) % 5]


def all_sent(ctx: EpContext, step: int, kind: str = "uniform") -> list[Sent]:
    return [sent(rank, tokens_of(rank, step), ctx.hidden, ctx.experts, ctx.topk, step, kind)
            for rank in range(ctx.world)]  # fmt: skip


def on_device(ctx: EpContext, one: Sent) -> Sent:
    return Sent(one.x.to(ctx.device, ctx.dtype), one.ids.to(ctx.device), one.weights.to(ctx.device))


def poison(ctx: EpContext) -> None:
    """Overwrite all that the peers write, while none of them does."""
    torch.cuda.synchronize()
    dist.barrier()
    ctx.peers.memory[ctx.parts.first_slot :].fill_(0x7F)
    torch.cuda.synchronize()
    dist.barrier()


def check_rows(ctx: EpContext, got: Received, everybody: list[Sent]) -> None:
    held, capacity = ctx.experts_of(ctx.rank), got.handle.capacity
    assert got.counts.tolist() == [len(each.x) for each in everybody]
    for rank, each in enumerate(everybody):
        here = slice(rank * capacity, rank * capacity + len(each.x))
        want = of_rank(each.ids, held).to(ctx.device)
        assert torch.equal(got.ids[here], want)
        assert (got.ids[here.stop : (rank + 1) * capacity] == -1).all()
        assert torch.equal(got.weights[here], each.weights.to(ctx.device))
        there = (want >= 0).any(1)
        x = each.x.to(ctx.device, ctx.dtype)[there]
        if got.scales is None:
            assert torch.equal(got.rows[here][there], x)
        else:
            assert torch.allclose(dequantised(ctx, got)[here][there].float(), x.float(), rtol=0.07, atol=0.02)


def experts(ctx: EpContext, got: Received, config: CombineConfig) -> torch.Tensor:
    y = worked(dequantised(ctx, got), got.ids, got.weights)
    return got.sums.copy_(y) if config.how == "pull" else y


def error(out: torch.Tensor, one: Sent) -> float:
    want = expected(Sent(one.x.bfloat16(), one.ids, one.weights)).to(out.device)
    return float(((out.double() - want).abs() / (want.abs() + 0.1)).max()) if len(out) else 0.0


def exact() -> None:
    """Every config, wire and kind of routing, both halves at once and apart, on poisoned memory."""
    for wire, slots, pair in (("same", 1, True), ("fp8", 2, True), ("same", 2, False)):
        with made(wire=wire, slots=slots) as ctx:
            ctx.pair = pair and ctx.pair
            for step, (how, kind, apart) in enumerate(product(COMBINES, KINDS, (False, True))):
                everybody, config = all_sent(ctx, step, kind), DISPATCHES[step % 2]
                mine = on_device(ctx, everybody[ctx.rank])
                poison(ctx)
                if apart:
                    got = dispatch(ctx, mine.x, mine.ids, mine.weights, config=config, receive=False)
                    dispatch_receive(ctx, got.handle)
                else:
                    got = dispatch(ctx, mine.x, mine.ids, mine.weights, config=config)
                ctx.check()
                check_rows(ctx, got, everybody)
                y = experts(ctx, got, how)
                if apart:
                    out = combine(ctx, y, got.handle, config=how, receive=False)
                    combine_receive(ctx, y, got.handle, out, config=how)
                else:
                    out = combine(ctx, y, got.handle, config=how)
                ctx.check()
                assert error(out, everybody[ctx.rank]) < (0.02 if wire == "same" else 0.1), (wire, how, kind, apart)


def eager() -> None:
    """Calls in a row without a synchronisation, ranks late at random; also dispatches that no combine follows."""
    late = random.Random(dist.get_rank())
    for slots in (1, 2):
        with made(slots=slots) as ctx:
            steps = [all_sent(ctx, step) for step in range(10)]
            mine = [on_device(ctx, each[ctx.rank]) for each in steps]
            results = []
            for turn in range(400):
                one = mine[turn % 10]
                if late.random() < 0.1:
                    torch.cuda._sleep(late.randrange(1_000_000))
                got = dispatch(ctx, one.x, one.ids, one.weights, config=DISPATCHES[turn % 2])
                if turn % 7 == 3:
                    results.append((turn, got.rows.clone(), got.ids.clone()))
                    continue
                config = COMBINES[turn % 4]
                results.append((turn, combine(ctx, experts(ctx, got, config), got.handle, config=config), None))
            ctx.check()
            for turn, value, ids in results:
                everybody = steps[turn % 10]
                if ids is None:
                    assert error(value, everybody[ctx.rank]) < 0.02, (slots, turn)
                    continue
                for rank, each in enumerate(everybody):
                    here = slice(rank * MOST, rank * MOST + len(each.x))
                    want = of_rank(each.ids, ctx.experts_of(ctx.rank)).to(ctx.device)
                    there = (want >= 0).any(1)
                    assert torch.equal(ids[here], want), (slots, turn)
                    assert torch.equal(value[here][there], each.x.to(ctx.device, ctx.dtype)[there]), (slots, turn)


def replayed() -> None:
    """Graphs that are replayed hundreds of times with other inputs, back to back, ranks late at random."""
    late, tokens, steps = random.Random(dist.get_rank()), 128, 16
    for slots, (number, config) in product((1, 2), enumerate(COMBINES)):
        with made(slots=slots) as ctx:
            every = [sent(ctx.rank, tokens, HIDDEN, EXPERTS, TOPK, step) for step in range(steps)]
            pool = [on_device(ctx, each) for each in every]
            static = on_device(ctx, every[0])
            outs = torch.empty(600, tokens, HIDDEN, dtype=ctx.dtype, device=ctx.device)

            def layer(ctx: EpContext = ctx, static: Sent = static, config: CombineConfig = config,
                      number: int = number) -> torch.Tensor:  # fmt: skip
                got = dispatch(ctx, static.x, static.ids, static.weights, capacity=tokens,
                               config=DISPATCHES[number % 2])  # fmt: skip
                return combine(ctx, experts(ctx, got, config), got.handle, config=config)

            layer()
            dispatch(ctx, static.x, static.ids, static.weights, capacity=tokens)  # compiled before the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = layer()
                if number % 2:  # a graph with two layers, or with a dispatch that nobody combines
                    dispatch(ctx, static.x, static.ids, static.weights, capacity=tokens)
            for turn in range(len(outs)):
                for into, other in zip(vars(static).values(), vars(pool[turn % steps]).values(), strict=True):
                    into.copy_(other)
                if late.random() < 0.05:
                    torch.cuda._sleep(late.randrange(2_000_000))
                graph.replay()
                outs[turn].copy_(result)
            ctx.check()
            for turn in range(len(outs)):
                assert error(outs[turn], every[turn % steps]) < 0.02, (slots, config, turn)


def two_contexts() -> None:
    """Two micro-batches on two streams at once."""
    with made() as first, made(slots=2) as second:
        streams, found = [torch.cuda.Stream() for _ in range(2)], []
        pools = [[on_device(ctx, sent(ctx.rank, 100, HIDDEN, EXPERTS, TOPK, 50 * n + step)) for step in range(8)]
                 for n, ctx in enumerate((first, second))]  # fmt: skip
        torch.cuda.synchronize()
        for turn in range(200):
            for n, ctx in enumerate((first, second)):
                with torch.cuda.stream(streams[n]):
                    one, config = pools[n][turn % 8], COMBINES[(turn + n) % 4]
                    got = dispatch(ctx, one.x, one.ids, one.weights)
                    out = combine(ctx, experts(ctx, got, config), got.handle, config=config)
                    found.append((n, turn, out))
        first.check(), second.check()
        for n, turn, out in found:
            want = sent(first.rank, 100, HIDDEN, EXPERTS, TOPK, 50 * n + turn % 8)
            assert error(out, want) < 0.02, (n, turn)


def late() -> None:
    """One of the ranks that never come is named, in the time that was asked for; the next start is clean."""
    ctx = made(patience=1.0)
    one = on_device(ctx, sent(ctx.rank, 8, HIDDEN, EXPERTS, TOPK, 1))
    if ctx.rank == 0:
        began = time.monotonic()
        got = dispatch(ctx, one.x, one.ids, one.weights)
        combine(ctx, experts(ctx, got, COMBINES[2]), got.handle, config=COMBINES[2])
        try:
            ctx.check()
        except TeamLost as lost:
            assert f"waited for rank {ctx.world - 1} to send its rows" in str(lost), lost
        else:
            raise AssertionError("nobody missed the other ranks")
        assert time.monotonic() - began < 20
    ctx.close()
    with made() as again:
        one = on_device(again, sent(again.rank, 8, HIDDEN, EXPERTS, TOPK, 1))
        got = dispatch(again, one.x, one.ids, one.weights)
        out = combine(again, experts(again, got, COMBINES[0]), got.handle, config=COMBINES[0])
        again.check()
        assert error(out, sent(again.rank, 8, HIDDEN, EXPERTS, TOPK, 1)) < 0.02


def layer() -> None:
    """`ep_moe` gives what one GPU with all experts gives."""
    hidden, inner, experts, topk, tokens = 512, 256, 10, 4, 96
    rng = torch.Generator().manual_seed(3)
    w1, w2 = (torch.randn(*shape, generator=rng).mul(shape[-1] ** -0.5).bfloat16().cuda()
              for shape in ((experts, 2 * inner, hidden), (experts, hidden, inner)))  # fmt: skip
    for wire, tolerance in (("same", 1e-2), ("fp8", 6e-2)):
        with moecache.using(mode="replay"), made(hidden=hidden, num_experts=experts, topk=topk, wire=wire) as ctx:
            held = ctx.experts_of(ctx.rank)
            for step, config in enumerate(COMBINES):
                one = on_device(ctx, sent(ctx.rank, tokens - 10 * ctx.rank, hidden, experts, topk, step))
                poison(ctx)
                got = ep_moe(ctx, one.x, w1[held.start : held.stop], w2[held.start : held.stop], one.weights, one.ids,
                             fused_moe=moecache.fused_moe, combine_config=config)  # fmt: skip
                ctx.check()
                want = moecache.fused_moe(one.x, w1, w2, one.weights, one.ids).float()
                assert (got.float() - want).norm() / want.norm() < tolerance, (wire, config)


def tuned() -> None:
    """All ranks tune together, on the files of each; the layer is then served with it, also in a graph."""
    hidden, inner, experts, topk, tokens = 512, 256, 10, 4, 100
    rng = torch.Generator().manual_seed(3)
    w1, w2 = (torch.randn(*shape, generator=rng).mul(shape[-1] ** -0.5).bfloat16().cuda()
              for shape in ((experts, 2 * inner, hidden), (experts, hidden, inner)))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, made(hidden=hidden, num_experts=experts, topk=topk) as ctx:
        held = ctx.experts_of(ctx.rank)
        with moecache.using(db=Path(folder, "cache.sqlite"), team=ctx.team) as serving:
            choices = ep.tune(ctx, [16, tokens], seconds=30.0)
            assert {choice.tier for choice in choices} == {"measured"}, choices
            timings = [timing for timing, _ in serving.lookup.timings(problem(ctx, tokens))]
            failed = [(timing.config.name, timing.status, timing.reason) for timing in timings if timing.status != "ok"]
            assert len(timings) > 5 and not failed, failed
            print(f"rank {ctx.rank}: {[choice.config.name for choice in choices]}", flush=True)
        with moecache.using(mode="replay", db=Path(folder, "cache.sqlite")):
            one = on_device(ctx, sent(ctx.rank, tokens, hidden, experts, topk, 1))
            mine = (w1[held.start : held.stop], w2[held.start : held.stop])

            def layer() -> torch.Tensor:
                return ep.ep_moe(ctx, one.x, *mine, one.weights, one.ids, capacity=tokens)

            want = moecache.fused_moe(one.x, w1, w2, one.weights, one.ids).float()
            layer()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = layer()
            for _ in range(50):
                graph.replay()
            ctx.check()
            assert (got.float() - want).norm() / want.norm() < 1e-2


def replicas() -> None:
    """Experts that several ranks hold, placed anew between replays of one graph; and exact rows, which no graph has."""
    tokens, experts, rng = 64, 6, random.Random(7)
    places = [
        [*range(experts), *(rng.randrange(experts) for _ in range(2 * dist.get_world_size() - 1))] for _ in range(4)
    ]
    with made(num_experts=experts, physical_to_logical=places[0]) as ctx:
        logical = torch.full((len(places[0]) + 1,), -1, device=ctx.device)  # the last one stands for −1
        static, result = on_device(ctx, sent(ctx.rank, tokens, HIDDEN, experts, TOPK, 1)), None

        def layer(exact: bool = False) -> torch.Tensor:
            got = dispatch(ctx, static.x, static.ids, static.weights, capacity=tokens, exact=exact)
            named = replace(got, ids=logical[got.ids.long()])
            return combine(ctx, experts_of(ctx, named), got.handle)

        def experts_of(ctx: EpContext, got: Received) -> torch.Tensor:
            return got.sums.copy_(worked(got.rows, got.ids, got.weights))

        graph = torch.cuda.CUDAGraph()
        for turn, each in enumerate(places):
            logical[:-1].copy_(torch.tensor(each))
            ctx.rebalance(each)
            one = sent(ctx.rank, tokens, HIDDEN, experts, TOPK, turn)
            for into, other in zip(vars(static).values(), vars(on_device(ctx, one)).values(), strict=True):
                into.copy_(other)
            assert error(layer(exact=True), one) < 0.02 and error(layer(), one) < 0.02, turn
            if result is None:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    result = layer()
            graph.replay()
            ctx.check()
            assert error(result, one) < 0.02, turn


def main(scene: str) -> None:
    """More ranks than GPUs share them: over gloo, as NCCL takes one rank a GPU. Not `tuned`: it times collectives."""
    rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    torch.cuda.set_device(rank % gpus)
    if int(os.environ["WORLD_SIZE"]) > gpus:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    try:
        with torch.no_grad():
            globals()[scene]()
    except Exception:
        print(f"rank {dist.get_rank()}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)  # not through the end of NCCL, which waits for ranks that are no more
    dist.barrier()
    print(f"rank {dist.get_rank()}: {scene} is right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
