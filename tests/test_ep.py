"""Expert parallelism: its kernels in Triton's interpreter, over ranks whose memory is all in one process."""

import gc
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from ep_local import POISON, Silent, contexts, poison
from ep_model import Sent, expected, of_rank, sent, wide, worked
from interpreting import marked

from moecache.backends import torch_gpu
from moecache.dispatch.nearest import distance
from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import (
    COMBINES,
    DISPATCHES,
    CombineConfig,
    DispatchConfig,
    Received,
    _check_config,
    _constants,
    _kept,
    combine,
    combine_receive,
    dequantised,
    dispatch,
    dispatch_receive,
)
from moecache.kernels.ep.layer import ep_moe
from moecache.kernels.ep.links import links
from moecache.kernels.ep.op import EXCHANGE, Exchange, _pair, ways
from moecache.predict.rates import alone_us
from moecache.schemas.config import Config
from moecache.schemas.device import Device, by_arch
from moecache.schemas.errors import InvalidInput, TeamLost

HIDDEN, TOPK, MOST = 160, 3, 5
DISPATCH = DispatchConfig("push", 2, 4, 128)
PULL, PUSH = CombineConfig("pull", 3, 4, 128), CombineConfig("push", 3, 4, 128, steps=2)


def dispatched(ranks: list[EpContext], calls: list[Sent], config: DispatchConfig = DISPATCH) -> list[Received]:
    """On poisoned memory all ranks send, then all receive: none would wait for one that comes after it."""
    poison(ranks)
    found = [dispatch(ctx, one.x.to(ctx.dtype), one.ids, one.weights, config=config, receive=False)
             for ctx, one in zip(ranks, calls, strict=True)]  # fmt: skip
    for ctx, got in zip(ranks, found, strict=True):
        dispatch_receive(ctx, got.handle)
        ctx.check()
    return found


def combined(ranks: list[EpContext], found: list[Received], config: CombineConfig) -> list[torch.Tensor]:
    """As `dispatched`, of what the experts of the model make."""
    rows = []
    for ctx, got in zip(ranks, found, strict=True):
        y = worked(dequantised(ctx, got), got.ids, got.weights)
        rows.append(got.sums.copy_(y) if config.how == "pull" else y)
    outs = [combine(ctx, y, got.handle, config=config, receive=False)
            for ctx, got, y in zip(ranks, found, rows, strict=True)]  # fmt: skip
    for ctx, got, y, out in zip(ranks, found, rows, outs, strict=True):
        combine_receive(ctx, y, got.handle, out, config=config)
        ctx.check()
    return outs


def check_rows(ranks: list[EpContext], found: list[Received], calls: list[Sent]) -> None:
    for ctx, got in zip(ranks, found, strict=True):
        capacity = got.handle.capacity
        assert got.counts.tolist() == [len(each.x) for each in calls]
        for rank, each in enumerate(calls):
            here = slice(rank * capacity, rank * capacity + len(each.x))
            want = of_rank(each.ids, ctx.experts_of(ctx.rank))
            there = (want >= 0).any(1)
            assert torch.equal(got.ids[here], want) and (got.ids[here.stop : (rank + 1) * capacity] == -1).all()
            assert torch.equal(got.weights[here], each.weights)
            if got.scales is None:
                assert torch.equal(got.rows[here][there], each.x.to(ctx.dtype)[there])
                assert (got.rows[here][~there].view(torch.uint8) == POISON).all()


def check_sums(outs: list[torch.Tensor], calls: list[Sent], tolerance: float = 1e-5) -> None:
    for out, one in zip(outs, calls, strict=True):
        want = expected(one)
        assert out.shape == want.shape and ((out.double() - want).abs() <= tolerance * (want.abs() + 1)).all()


@marked
@pytest.mark.parametrize("world, kind", [(1, "uniform"), (2, "uniform"), (2, "one"), (2, "none"), (4, "rank"),
                                         (4, "uniform"), (8, "uniform")])  # fmt: skip
def test_rows_arrive_bit_for_bit_and_sums_come_home(world: int, kind: str) -> None:
    experts = 2 * world + 3
    ranks = contexts(world, HIDDEN, experts, TOPK, MOST)
    for step, config in enumerate((PULL, PUSH, replace(PUSH, programs=1, steps=MOST))):
        tokens = [(MOST, 0, 1, 3, 2)[(rank + step) % 5] for rank in range(world)]
        calls = [sent(rank, tokens[rank], HIDDEN, experts, TOPK, step, kind) for rank in range(world)]
        found = dispatched(ranks, calls)
        check_rows(ranks, found, calls)
        check_sums(combined(ranks, found, config), calls)


@marked
def test_an_id_of_64_bits_whose_low_half_names_an_expert_chooses_nobody() -> None:
    ranks = contexts(2, HIDDEN, 7, TOPK, MOST)
    calls = [sent(rank, 4, HIDDEN, 7, TOPK, 9) for rank in range(2)]
    assert any((one.ids < 0).any() for one in calls)
    for config in (PULL, PUSH):
        found = dispatched(ranks, [replace(one, ids=wide(one.ids)) for one in calls])
        check_rows(ranks, found, calls)
        check_sums(combined(ranks, found, config), calls)


@marked
def test_narrow_rows_are_summed_in_float32_and_rounded_once() -> None:
    ranks = contexts(2, HIDDEN, 6, TOPK, MOST, dtype=torch.float16)  # the interpreter cuts off what becomes bfloat16
    calls = [sent(rank, 4, HIDDEN, 6, TOPK, 1) for rank in range(2)]
    outs = []
    for config in (PULL, PUSH):
        found = dispatched(ranks, calls)
        check_rows(ranks, found, calls)
        outs.append(combined(ranks, found, config))
    for rank, (pulled, pushed) in enumerate(zip(*outs, strict=True)):
        assert torch.equal(pulled, pushed)
        parts = [worked(got.rows, got.ids, got.weights)[rank * MOST :][:4]
                 for ctx, got in zip(ranks, found, strict=True)]  # fmt: skip
        assert torch.equal(pulled, sum(part.float().nan_to_num() for part in parts).half())


@marked
def test_fp8_rows_travel_with_their_scales() -> None:
    ranks = contexts(2, 256, 6, TOPK, MOST, wire="fp8")
    calls = [sent(rank, 4 - rank, 256, 6, TOPK, 1) for rank in range(2)]
    found = dispatched(ranks, calls)
    check_rows(ranks, found, calls)
    for ctx, got in zip(ranks, found, strict=True):
        rows = dequantised(ctx, got)
        for rank, each in enumerate(calls):
            there = (of_rank(each.ids, ctx.experts_of(ctx.rank)) >= 0).any(1)
            x, here = each.x[there], slice(rank * MOST, rank * MOST + len(each.x))
            top = x.view(-1, 2, 128).abs().amax(2)
            assert torch.allclose(got.scales[here][there], top / 448)
            # The interpreter forgets the carry where a mantissa is rounded up to the next power of two: 125 becomes 64.
            assert ((rows[here][there] - x).abs() <= x.abs() / 2 + top.repeat_interleave(128, 1) / 448 / 64).all()


@marked
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_none_behind_the_fp8_wire_and_nothing_else_is_touched(value: float) -> None:
    (ctx,) = contexts(1, 256, 4, 2, 4, wire="fp8")
    x = torch.ones(2, 256)
    x[0, 5] = value
    one = Sent(x, torch.tensor([[0, 1], [2, 3]]).int(), torch.ones(2, 2))
    (got,) = dispatched([ctx], [one])
    rows = dequantised(ctx, got)
    assert not rows[0, :128].isfinite().any() and got.scales is not None
    assert torch.equal(rows[0, 128:], x[0, 128:]) and torch.equal(rows[1], x[1])


@marked
def test_rows_that_are_fp8_already_arrive_bit_for_bit() -> None:
    ranks = contexts(2, 256, 6, TOPK, MOST, wire="fp8")
    calls = [sent(rank, 4, 256, 6, TOPK, 1) for rank in range(2)]
    quantised = [(one.x.to(torch.float8_e4m3fn), torch.rand(4, 2)) for one in calls]
    found = [dispatch(ctx, pair, one.ids, one.weights, config=DISPATCH, receive=False)
             for ctx, pair, one in zip(ranks, quantised, calls, strict=True)]  # fmt: skip
    for ctx, got in zip(ranks, found, strict=True):
        dispatch_receive(ctx, got.handle)
        for rank, (x, scales) in enumerate(quantised):
            there = (of_rank(calls[rank].ids, ctx.experts_of(ctx.rank)) >= 0).any(1)
            here = slice(rank * MOST, rank * MOST + 4)
            assert torch.equal(got.rows.view(torch.uint8)[here][there], x.view(torch.uint8)[there])
            assert torch.equal(got.scales[here][there], scales[there])


@marked
@pytest.mark.parametrize("start", [0, 2**31 - 20, 2**40])
def test_clocks_go_on_for_ever_and_launches_may_have_other_sizes(start: int) -> None:
    """Words are never reset: 2³² calls are some days of decoding."""
    ranks = contexts(2, 128, 4, 2, 2)
    for ctx in ranks:
        ctx.clock += start
        ctx.words += start
        ctx.last += start
    for step in range(12):
        programs = (1, 3, 2)[step % 3]
        calls = [sent(rank, (rank + step) % 3, 128, 4, 2, step) for rank in range(2)]
        found = dispatched(ranks, calls, DispatchConfig("push", programs, 4, 128))
        check_rows(ranks, found, calls)
        config = CombineConfig(("pull", "push")[step % 2], 1 + step % 4, 4, 128)
        check_sums(combined(ranks, found, config), calls)
    assert all(ctx.clock.min() == ctx.clock.max() > start + 24 for ctx in ranks)


@marked
def test_slots_take_dispatches_that_no_combine_follows() -> None:
    ranks = contexts(2, HIDDEN, 6, TOPK, MOST, slots=2)
    for step in range(6):
        calls = [sent(rank, 3, HIDDEN, 6, TOPK, step) for rank in range(2)]
        found = dispatched(ranks, calls)
        assert {got.handle.slot for got in found} == {step % 2}
        check_rows(ranks, found, calls)


@marked
def test_two_contexts_do_not_disturb_each_other() -> None:
    pairs = [contexts(2, HIDDEN, 6, TOPK, MOST) for _ in range(2)]
    for step in range(2):
        calls = [[sent(rank, 4, HIDDEN, 6, TOPK, 10 * n + step) for rank in range(2)] for n in range(2)]
        found = [dispatched(ranks, each) for ranks, each in zip(pairs, calls, strict=True)]
        for ranks, each, got in zip(pairs, calls, found, strict=True):
            check_rows(ranks, got, each)
            check_sums(combined(ranks, got, (PULL, PUSH)[step]), each)


@marked
@pytest.mark.parametrize("world, missing", [(2, 1), (2, 0), (4, 2)])
def test_a_rank_that_does_not_come_is_named_and_waited_for_once(world: int, missing: int) -> None:
    ranks = contexts(world, 128, world, 1, 2)
    calls = [sent(rank, 2, 128, world, 1, 0) for rank in range(world)]
    come = [rank for rank in range(world) if rank != missing]
    found = [dispatch(ranks[r], calls[r].x, calls[r].ids, calls[r].weights, config=DISPATCH, receive=False)
             for r in come]  # fmt: skip
    for rank, got in zip(come, found, strict=True):
        dispatch_receive(ranks[rank], got.handle)
        named = f"rank {rank} of {world} waited for rank {missing} to send its rows"
        with pytest.raises(TeamLost, match=named):
            ranks[rank].check()
        ranks[rank].patience = 2**31 - 1
        out = combine(ranks[rank], got.sums, got.handle, config=PULL)
        assert out.shape == (2, 128)
        with pytest.raises(TeamLost, match=named):
            ranks[rank].check()


@marked
def test_the_next_dispatch_into_a_slot_waits_until_the_peers_have_made_a_call() -> None:
    ranks = contexts(2, 128, 2, 1, 2)
    calls = [sent(rank, 2, 128, 2, 1, 0) for rank in range(2)]
    dispatched(ranks, calls)
    one = calls[0]
    got = dispatch(ranks[0], one.x, one.ids, one.weights, config=DISPATCH, receive=False)
    with pytest.raises(TeamLost, match="waited for rank 1 to have done with the rows of an earlier dispatch"):
        ranks[0].check()
    assert got.handle.slot == 0


@marked
def test_a_layer_is_dispatch_experts_and_combine() -> None:
    (ctx,) = contexts(1, HIDDEN, 4, TOPK, MOST)
    one = sent(0, 4, HIDDEN, 4, TOPK, 0)

    def experts(rows, w1, w2, weights, ids, *, out, expert_map, scale):
        assert (w1, w2) == ("w1", "w2") and expert_map is ctx.expert_map
        y = scale * worked(rows, ids, weights)
        return y if out is None else out.copy_(y)

    for config, exact in product((None, PUSH), (False, True)):
        got = ep_moe(
            ctx,
            one.x,
            "w1",
            "w2",
            one.weights,
            one.ids,
            fused_moe=experts,
            combine_config=config,
            exact=exact,
            scale=2.0,
        )
        check_sums([got / 2], [one])


@marked
def test_exact_rows_are_those_that_hold_something() -> None:
    ranks = contexts(3, 256, 7, TOPK, MOST, wire="fp8")
    calls = [sent(rank, (MOST, 0, 2)[rank], 256, 7, TOPK, 2, ("uniform", "none", "rank")[rank]) for rank in range(3)]
    for config in (PULL, PUSH):
        whole = dispatched(ranks, calls)
        found = [_kept(got) for got in whole]
        for ctx, all_rows, got in zip(ranks, whole, found, strict=True):
            there = (all_rows.ids >= 0).any(1)
            assert 0 < len(got.rows) == len(got.sums) == there.sum() < len(there) and len(got.scales) == len(got.rows)
            assert torch.equal(dequantised(ctx, got), dequantised(ctx, all_rows)[there])
            assert torch.equal(got.ids, all_rows.ids[there]) and torch.equal(got.weights, all_rows.weights[there])
        outs = combined(ranks, found, config)
        wanted = combined(ranks, dispatched(ranks, calls), config)
        assert all(torch.equal(out, want) for out, want in zip(outs, wanted, strict=True))


# --- redundant experts; the last one runs kernels ---


PUSHED = _pair(DispatchConfig("push", 2, 4, 128), CombineConfig("push", 2, 4, 128))
PLACES = [3, 0, 1, 2, 0, 4, 0, 3]  # physical → logical: three replicas of 0, two of 3


def replica(expert: int, token: int, rank: int) -> int:
    held = [physical for physical, logical in enumerate(PLACES) if logical == expert]
    return held[(token + rank) % len(held)] if held else -1


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_tokens_take_the_replicas_of_an_expert_in_turn(kind: torch.dtype) -> None:
    ranks = contexts(2, 128, 5, 3, 1000, physical_to_logical=PLACES)
    ids = torch.randint(-2, 8, (1000, 3), generator=torch.Generator().manual_seed(1)).to(kind)
    for ctx in ranks:
        want = [[replica(expert, token, ctx.rank) for expert in row] for token, row in enumerate(ids.tolist())]
        assert ctx.experts == 8 and ctx.physical(ids).tolist() == want
        assert ctx.physical(ids[:0]).shape == (0, 3)
        ctx.rebalance([0, 1, 2, 3, 4, 4, 4, 4])
        turns = ctx.physical(ids[:1].new_full((4, 1), 4)).flatten().tolist()
        assert turns == [(4, 5, 6, 7)[(token + ctx.rank) % 4] for token in range(4)]


@pytest.mark.parametrize(
    "places, named",
    [
        ([0, 1, 2, 3, 5, 4], "has 5; allowed are 0 to 4"),
        ([0, 1, 2, 3, 3, 0], r"has 6 experts and lacks \[4\]"),
        ([0, 1, 2, 3, 4, -1], "has -1"),
        ([0, 1, 2, 3, 4, "4"], "physical_to_logical is '4'"),
    ],
)
def test_what_replicas_cannot_be(places: Sequence[int], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        contexts(1, 128, 5, 3, 4, physical_to_logical=places)
    (ctx,) = contexts(1, 128, 5, 3, 4, physical_to_logical=[0, 1, 2, 3, 4, 4])
    with pytest.raises(InvalidInput, match=named):
        ctx.rebalance(places)
    with pytest.raises(InvalidInput, match="5 physical experts; this EpContext holds 6 physical experts"):
        ctx.rebalance(range(5))
    with pytest.raises(InvalidInput, match="holds each expert once"):
        contexts(1, 128, 5, 3, 4)[0].rebalance(places)


@marked
def test_an_exchange_with_replicas_is_tuned_on_what_a_router_says() -> None:
    (ctx,) = contexts(1, 128, 5, 3, 4, physical_to_logical=PLACES)
    op, ids = Exchange(ctx), torch.tensor([[0, 4, 7], [5, -1, 2]], dtype=torch.int32)
    question = op.question(by_arch("sm_90"), 2)
    given = op.inputs(question, ids, 1)
    assert question.experts == 8 and given.topk_ids.tolist() == [[0, 4, 2], [0, -1, 2]]
    out = op.outputs(given)
    for config in (op.space(question, by_arch("sm_90"))[0], PUSHED):
        assert op.error(op.bind(config, given, out)(given, out), op.reference(given)) < 1e-5


@marked
def test_rows_go_to_the_replica_whose_turn_it_is() -> None:
    ranks = contexts(3, HIDDEN, 5, TOPK, MOST, physical_to_logical=PLACES)
    calls = [sent(rank, MOST - rank, HIDDEN, 5, TOPK, 3) for rank in range(3)]
    found = dispatched(ranks, calls)
    physical = [Sent(one.x, ctx.physical(one.ids), one.weights) for ctx, one in zip(ranks, calls, strict=True)]
    check_rows(ranks, found, physical)
    logical = torch.tensor([*PLACES, -1])
    same = [replace(got, ids=logical[got.ids.long()]) for got in found]
    check_sums(combined(ranks, same, PULL), calls)


@marked
@pytest.mark.parametrize("experts, world", list(product((8, 13, 128), (1, 2, 3, 6, 8))))
def test_every_expert_has_one_owner(experts: int, world: int) -> None:
    (ctx,) = contexts(1, 128, experts, 1, 1)
    ctx.world = world
    held = [ctx.experts_of(rank) for rank in range(world)]
    assert [expert for each in held for expert in each] == list(range(experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1 and len(held[0]) == max(map(len, held))


# --- the op; no kernel runs ---


@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "cpu"])
@pytest.mark.parametrize("tokens, hidden, wire", [(1, 256, "same"), (4096, 7168, "same"), (4096, 7168, "fp8")])
def test_every_candidate_of_the_op_can_be_launched_and_none_can_be_made_up(
    arch: str, tokens: int, hidden: int, wire: str
) -> None:
    (ctx,) = contexts(1, hidden, 8, 2, 4, dtype=torch.bfloat16, wire=wire)
    device = by_arch(arch) if arch != "cpu" else Device(vendor="cpu", arch="x86_64", name="test", units=2)
    question = Exchange(ctx).question(device, tokens)
    assert question.tokens == tokens and question.dim("hidden") == hidden and question.dim("world") == 1
    space = EXCHANGE.space(question, device)
    assert len(set(space)) == len(space) and all(
        alone_us(EXCHANGE.work(question, each, device), device) > 0 for each in space
    )
    if arch == "cpu":
        assert {each["dispatch"] for each in space} <= {"all_gather", "all_to_all"}
    else:
        there, back = (("push", 128, 8, 256), ("pull", 128, 8, 256, 1)) if tokens == 1 else (
            ("push", 128, 8, 8192), ("pull", 256, 8, 4096, 1))  # fmt: skip
        assert ways(space[0]) == (DispatchConfig(*there), CombineConfig(*back))
    for each in space:
        there, back = ways(each)
        _check_config(there, DISPATCHES)
        _check_config(back, COMBINES)
        assert there.how == "push" or wire == "same"
        assert EXCHANGE.fits(question, each, device) == ""
        params = dict(each.params)
        for changes in ({"programs": 96}, {"dispatch": "pull"}, {"steps": 7}):
            other = Config(variant="pair", params=tuple((params | changes).items()))
            assert EXCHANGE.fits(question, other, device)
        short = Config(variant="pair", params=tuple((k, v) for k, v in params.items() if k != "combine"))
        assert EXCHANGE.fits(question, short, device)


class Scripted(Silent):
    """The first of some ranks, which hears what the others say."""

    def __init__(self, devices: list[str], links: list[list[str]]) -> None:
        self.rank, self.size, self.others = 0, 1 + len(devices), {"devices": devices, "links": links}

    def gather(self, what: str, value: object) -> list[object]:
        return [value, *self.others[what]]


def test_links_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu{index}"))
    monkeypatch.setattr(torch_gpu.TorchGpu, "link", lambda self, a, b: "peer" if b == 1 else "none")
    device = torch.device("cuda", 0)
    assert links(Scripted(["here gpu1"], [["peer"]]), device) == "peer"
    assert links(Scripted(["here gpu1", "here gpu2"], [["peer"], ["none"]]), device) == "none+peer"
    assert links(Scripted(["here gpu0", "there gpu1"], [["device"], ["unseen"]]), device) == "device+unseen"
    assert links(Scripted([], []), device) == "none" and links(Silent(1, 8), torch.device("cpu")) == "cpu"


def test_what_was_measured_on_other_links_or_in_another_fp8_never_answers() -> None:
    (ctx,) = contexts(1, 256, 8, 2, 4, dtype=torch.bfloat16, wire="fp8")
    asked = Exchange(ctx).question(by_arch("gfx942"), 4)
    assert asked.dim("links") == "cpu" and asked.dim("fp8") == "e4m3fn"
    assert distance(asked, asked.model_copy(update={"tokens": 2}))
    for name, value in (("links", "xgmi1"), ("fp8", "e4m3fnuz")):
        other = asked.model_copy(update={"dims": tuple((dict(asked.dims) | {name: value}).items())})
        assert other != asked and distance(asked, other) is None


# --- arguments; no kernel runs ---


def made(**changes: object) -> EpContext:
    known = {"hidden": 256, "num_experts": 8, "topk": 2, "max_tokens_per_rank": 4} | changes
    return contexts(1, known.pop("hidden"), known.pop("num_experts"), known.pop("topk"),
                    known.pop("max_tokens_per_rank"), **known)[0]  # fmt: skip


@pytest.mark.parametrize(
    "changes, named",
    [({"hidden": 100}, "hidden=100"), ({"hidden": 8}, "hidden=8"), ({"num_experts": 0}, "num_experts=0"),
     ({"topk": 33}, "topk=33"), ({"max_tokens_per_rank": 0}, "max_tokens_per_rank=0"), ({"slots": 0}, "slots=0"),
     ({"wire": "fp4"}, "wire='fp4'"), ({"wire": "fp8", "hidden": 144}, "hidden=144"), ({"patience": 0}, "patience=0"),
     ({"dtype": torch.int32}, "dtype=torch.int32"), ({"topk": "2"}, "topk is '2'")],
)  # fmt: skip
def test_what_no_context_can_be(changes: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        made(**changes)


@pytest.mark.parametrize(
    "change, named",
    [({"x": torch.ones(2, 128)}, r"x is torch.float32 \[2, 128\]"), ({"x": torch.ones(2)}, r"x is torch.float32 \[2\]"),
     ({"x": torch.ones(2, 256).double()}, "x is torch.float64"),
     ({"x": torch.ones(513)[1:].view(2, 256)}, "x begins at 0x"),
     ({"x": torch.ones(5, 256)}, "5 tokens, capacity=4"), ({"capacity": 1}, "2 tokens, capacity=1"),
     ({"capacity": 5}, "capacity=5"), ({"ids": torch.zeros(2, 3).int()}, r"topk_ids is torch.int32 \[2, 3\]"),
     ({"ids": torch.zeros(2, 2)}, "topk_ids is torch.float32"), ({"weights": torch.ones(1, 2)}, "topk_weights is"),
     ({"config": DispatchConfig("push", 0, 4, 128)}, "programs=0"),
     ({"config": DispatchConfig("push", 1, 3, 128)}, "num_warps=3"),
     ({"config": DispatchConfig("push", 1, 4, 192)}, "block=192"),
     ({"exact": True, "receive": False}, "exact=True"),
     ({"config": DispatchConfig("pull", 1, 4, 128)}, "how='pull'"),
     ({"x": (torch.ones(2, 256), torch.ones(2, 2))}, "on wire 'same'")],
)  # fmt: skip
def test_what_dispatch_refuses(change: dict[str, object], named: str) -> None:
    call = {"x": torch.ones(2, 256), "ids": torch.zeros(2, 2).int(), "weights": torch.ones(2, 2)} | change
    with pytest.raises(InvalidInput, match=named):
        dispatch(made(), call.pop("x"), call.pop("ids"), call.pop("weights"), **call)


def test_a_launch_begins_early_only_while_no_other_context_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else kernels that have begun early can take the room that the other context's kernel needs."""

    def early(ctx: EpContext) -> tuple[bool, bool]:
        constants = _constants(ctx, DISPATCH, 1)
        return constants["PDL"], constants.get("launch_pdl", False)

    monkeypatch.setattr(EpContext, "_opened", WeakSet())
    with made() as first:
        assert early(first) == (False, False)  # a CPU
        first._can_be_early = True
        assert early(first) == (True, True)
        second = made()
        assert early(first) == (False, False)
        second.close()
        assert early(first) == (True, True)
        forgotten = made()
        assert not first.early
        del forgotten
        gc.collect()
        assert first.early


def test_ranks_hold_at_least_one_expert() -> None:
    with pytest.raises(InvalidInput, match="3 experts for 4 ranks"):
        contexts(4, 128, 3, 2, 4)
    assert contexts(4, 128, 3, 2, 4, physical_to_logical=[0, 1, 2, 0])[3].experts_of(3) == range(3, 4)


def test_a_closed_context_is_closed() -> None:
    ctx = made()
    with ctx:
        pass
    ctx.close()
    with pytest.raises(InvalidInput, match="closed"):
        dispatch(ctx, torch.ones(2, 256), torch.zeros(2, 2).int(), torch.ones(2, 2))
    assert Silent(0, 1).rank == 0
