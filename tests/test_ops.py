"""The public operations on the CPU: contracts, tiers, captures, and that a hit stays off everything slow."""

import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from toy import CapturingBackend, timing

import moecache
from moecache import feedback, routing
from moecache.kernels import running
from moecache.kernels.fused_moe.op import FUSED_MOE, call_args
from moecache.kernels.grouped_gemm.op import GROUPED_GEMM, ProductCall
from moecache.kernels.sort.op import SORT, SortCall
from moecache.ops import moe_align_block_size, moe_sorting
from moecache.schemas.config import config
from moecache.schemas.errors import InvalidInput
from moecache.schemas.timing import Choice, Tier


@pytest.fixture
def serving(tmp_path):
    with moecache.using(db=tmp_path / "cache.sqlite", path=(), mode="off", strict=False) as active:
        yield active


def test_align_block_size_contract(serving):
    """Three slots, four experts, blocks of four: every group is padded to a multiple of the block."""
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]]) - 1
    sorted_ids, blocks, total = moe_align_block_size(ids, 4, 4)
    assert sorted_ids[:16].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert blocks[:4].tolist() == [0, 1, 2, 3]
    assert total.tolist() == [16] and total.shape == (1,)
    assert (sorted_ids[16:] == 12).all() and (blocks[4:] == -1).all()


def test_align_block_size_with_a_map(serving):
    ids = torch.tensor([[0, 1], [2, 3], [1, 3]], dtype=torch.int32)
    mapping = torch.tensor([-1, 0, -1, 1], dtype=torch.int32)
    _, blocks, total = moe_align_block_size(ids, 2, 4, mapping)
    assert total.tolist() == [8] and blocks[:4].tolist() == [-1, 0, -1, 1]
    sorted_ids, blocks, total = moe_align_block_size(ids, 2, 4, mapping, ignore_invalid_experts=True)
    assert total.tolist() == [4] and blocks[:2].tolist() == [0, 1] and sorted_ids[:4].tolist() == [1, 4, 3, 5]


def test_pad_sorted_ids_rounds_up(serving):
    ids = torch.zeros(5, 3, dtype=torch.int32)
    plain, _, _ = moe_align_block_size(ids, 16, 4)
    padded, _, _ = moe_align_block_size(ids, 16, 4, pad_sorted_ids=True)
    assert plain.numel() == 15 + 4 * 15 and padded.numel() == 80


def test_moe_sorting_contract(serving):
    tokens, topk, experts, block = 9, 3, 6, 4
    ids = routing.draw("uniform", tokens, experts, topk, 3)
    weights = torch.rand(tokens, topk)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.int32)
    limit = torch.tensor([7], dtype=torch.int32)
    sorted_ids, sorted_weights, blocks, valid, buffer = moe_sorting(
        ids, weights, experts, 8, torch.float16, block, mask, limit
    )
    assert sorted_ids.numel() == tokens * topk + experts * block - topk == sorted_weights.numel()
    assert valid.tolist()[1] == 7 and valid.tolist()[0] % block == 0
    local = {0: 0, 2: 1, 3: 2, 5: 3}
    seen = set()
    for row in range(valid.tolist()[0]):
        name = int(sorted_ids[row])
        token, slot = name & 0xFFFFFF, name >> 24
        if slot == topk:
            assert token == tokens and sorted_weights[row] == 0
            continue
        assert blocks[row // block] == local[int(ids[token, slot])]
        assert sorted_weights[row] == weights[token, slot]
        seen.add((token, slot))
    assert seen == {(t, s) for t in range(7) for s in range(topk) if int(ids[t, s]) in local}
    assert buffer.shape == (tokens, 8) and buffer.dtype == torch.float16 and not buffer.any()


def test_dispatch_policy_is_checked(serving):
    ids, weights = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    with pytest.raises(InvalidInput, match="dispatch_policy=3"):
        moe_sorting(ids, weights, 4, 8, torch.float32, dispatch_policy=3)
    with pytest.raises(InvalidInput, match="oneshot"):
        moe_sorting(ids, weights, 4, 8, torch.float32, dispatch_policy=1)


def test_errors_of_engines_functions_name_their_own_parameters(serving):
    ids, weights = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    with pytest.raises(InvalidInput, match=r"^block_size=0;"):
        moe_align_block_size(ids, 0, 4)
    with pytest.raises(InvalidInput, match=r"^block_size=5000;"):
        moe_sorting(ids, weights, 4, 8, torch.float32, block_size=5000)
    with pytest.raises(InvalidInput, match=r"^num_local_tokens is"):
        moe_sorting(ids, weights, 4, 8, torch.float32, num_local_tokens=torch.ones(2, dtype=torch.int32))
    with pytest.raises(InvalidInput, match=f"model_dim={10**30}"):
        moe_sorting(ids, weights, 4, 10**30, torch.float32)


def test_bad_input_is_refused_on_hits_too(serving):
    ids = torch.zeros(4, 2, dtype=torch.int32)
    moecache.moe_sort(ids, 8, 16, topk_weights=torch.ones(4, 2))
    with pytest.raises(InvalidInput, match="topk_weights"):
        moecache.moe_sort(ids, 8, 16, topk_weights=torch.ones(3, 2))


def test_a_hit_opens_nothing_and_asks_nobody(serving, monkeypatch):
    ids = routing.draw("uniform", 32, 16, 2, 1)
    moecache.moe_sort(ids, 16, 16, layer="hit")
    moecache.moe_sort(ids, 16, 16, layer="hit")
    monkeypatch.setattr(type(serving), "choose", lambda *a, **k: pytest.fail("a hit asked the policy"))
    monkeypatch.setattr(routing, "histogram", lambda *a, **k: pytest.fail("a hit read the routing back"))
    got = moecache.moe_sort(ids, 16, 16, layer="hit")
    assert SORT.error(got, SORT.reference(SortCall(ids, 16, 16))) == 0.0


def test_routing_is_posted_per_layer(serving):
    balanced = torch.arange(64, dtype=torch.int32).reshape(32, 2) % 16
    hot = torch.zeros(32, 2, dtype=torch.int32)
    assert int(moecache.moe_sort(balanced, 16, 16, layer="first").posted) == 0
    assert int(moecache.moe_sort(hot, 16, 16, layer="second").posted) == routing.NAMES.index("a2e3")
    cpu = torch.device("cpu")
    assert feedback.post("first", 32, 16, cpu).word.value == 0
    assert feedback.post("second", 32, 16, cpu).word.value == routing.NAMES.index("a2e3")
    assert feedback.post("third", 32, 16, cpu).word.value == feedback.UNKNOWN


def test_reading_the_routing_is_part_of_what_the_budget_counts(tmp_path, monkeypatch):
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=5.0) as active:
        choose, histogram, times = active.choose, routing.histogram, []

        def counted(*args):
            times.append(time.perf_counter())
            return histogram(*args)

        def noted(*args, began, **more):
            times.append(began)
            return choose(*args, began=began, **more)

        monkeypatch.setattr(routing, "histogram", counted)
        monkeypatch.setattr(active, "choose", noted)
        moecache.moe_sort(torch.zeros(64, 2, dtype=torch.int32), 16, 16, layer="counted")
        assert times[1] < times[0]


def test_first_call_tunes_in_the_bucket_of_its_routing(tmp_path):
    ids = torch.zeros(64, 2, dtype=torch.int32)
    ids[:, 1] = 1
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=5.0) as active:
        moecache.moe_sort(ids, 16, 16, layer="encounter")
        place = active.places.of_tensor(ids)
        problem = SORT.problem(SortCall(ids, 16, 16), place.device, "a2e3")
        assert active.peek(SORT, problem).tier == "measured"


def test_a_config_that_raises_at_launch_is_replaced(tmp_path, monkeypatch):
    ids = routing.draw("uniform", 32, 16, 2, 1)
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=5.0) as active:
        for _ in range(2):
            moecache.moe_sort(ids, 16, 16, layer="raises")
        victim = config("by_expert")
        broken(monkeypatch, SORT, victim, active.hot)
        got = moecache.moe_sort(ids, 16, 16, layer="raises")
        assert SORT.error(got, SORT.reference(SortCall(ids, 16, 16))) == 0.0
        moecache.moe_sort(ids, 16, 16, layer="raises")
        assert active.hot and victim not in {served.what for served in active.hot.values()}
        problem = SORT.problem(SortCall(ids, 16, 16), active.places.of_tensor(ids).device, "")
        failures = [t for t, _ in active.lookup.timings(problem.model_copy(update={"routing": bucket_of(got)}))]
        assert [(t.status, "no kernel image" in t.reason) for t in failures if t.config == victim] == [("raised", True)]


def broken(monkeypatch, op, victim, hot=()):
    """A config raises when it runs; everything in `hot` is served it."""
    bind = type(op).bind

    def raises(args, out):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(
        type(op), "bind", lambda self, what, args, out: raises if what == victim else bind(self, what, args, out)
    )
    for key in list(hot):
        hot[key] = hot[key]._replace(run=raises, what=victim)


def bucket_of(result):
    return routing.bucket_name(int(result.posted))


def test_an_error_of_the_call_itself_surfaces(tmp_path, monkeypatch):
    ids = routing.draw("uniform", 32, 16, 2, 1)
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=5.0) as active:
        moecache.moe_sort(ids, 16, 16, layer="faulty")
        monkeypatch.setattr(type(SORT), "outputs", lambda self, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            moecache.moe_sort(ids, 16, 16, layer="faulty")
        assert active.hot  # nothing was blamed


def test_more_choices_than_experts_tune_like_any_call(tmp_path, recwarn):
    ids = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]])
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=5.0) as active:
        got = moecache.moe_sort(ids, 2, 4, layer="twice")
        problem = SORT.problem(SortCall(ids, 2, 4), active.places.of_tensor(ids).device, bucket_of(got))
        assert got.counts.tolist() == [7, 8] and active.peek(SORT, problem).tier == "measured"
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


# --- captures, and calls whose routing nobody posts ---


class Capture:
    """A CPU that records a graph while `on`, and the configs that are launched on it."""

    def __init__(self, monkeypatch, op):
        self.backend, self.launched = CapturingBackend(), []
        read, bind = feedback.read, type(op).bind

        def seen(slot, device):
            return feedback.ANY if self.on else read(slot, device)

        def noted(op, chosen, args, out):
            run = bind(op, chosen, args, out)

            def launch(args, out):
                self.launched.append(chosen)
                return run(args, out)

            return launch

        monkeypatch.setattr(feedback, "read", seen)
        monkeypatch.setattr(type(op), "bind", noted)

    on = property(lambda self: self.backend.on, lambda self, value: setattr(self.backend, "on", value))

    def taken(self):
        """What was launched since the last call of this."""
        found, self.launched = self.launched, []
        return found


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """moe_sort timed under two routings: (dispatcher, capture, ids of each, winners of each and what loses least)."""
    capture = Capture(monkeypatch, SORT)
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="replay", backend=capture.backend) as active:
        ids = [torch.arange(128, dtype=torch.int32).reshape(64, 2) % 16, torch.tensor([[0, 1]] * 64, dtype=torch.int32)]
        place = active.places.of_tensor(None)
        asked = [SORT.problem(SortCall(each, 16, 16), place.device, bucket_of_ids(each, 16)) for each in ids]
        space = SORT.space(asked[0], place.device)[:3]
        for problem, times in zip(asked, ((10.0, 30.0, 10.5), (30.0, 10.0, 10.5)), strict=True):
            rows = [timing(problem, c, us, place.environment) for c, us in zip(space, times, strict=True)]
            active.lookup.put(rows, place)
        yield active, capture, ids, space


def bucket_of_ids(ids, experts):
    return routing.bucket(routing.histogram(ids, experts))


def test_a_capture_is_served_for_any_routing_and_eager_calls_for_theirs(measured, monkeypatch):
    active, capture, ids, (first, second, both) = measured
    calls = [("leak, even", ids[0], first), ("leak, hot", ids[1], second)]
    for layer, given, own in calls:
        moecache.moe_sort(given, 16, 16, layer=layer)
        assert capture.taken() == [both], "nothing is posted yet"
        moecache.moe_sort(given, 16, 16, layer=layer)
        assert capture.taken() == [both, own], "loaded for a capture, then served"
        capture.on = True
        moecache.moe_sort(given, 16, 16, layer=layer)
        assert capture.taken() == [both]
        capture.on = False
    monkeypatch.setattr(type(active), "choose", lambda *a, **k: pytest.fail("a hit asked the policy"))
    for capture.on in (False, True, False, True):
        for layer, given, own in calls:
            moecache.moe_sort(given, 16, 16, layer=layer)
            assert capture.taken() == [both if capture.on else own]


def asked_of_captures(monkeypatch):
    """The calls that ask whether a graph is captured, as they are made."""
    asked, read = [], feedback.read

    def noted(slot, device):
        asked.append(slot)
        return read(slot, device)

    monkeypatch.setattr(feedback, "read", noted)
    return asked


def test_only_calls_that_a_capture_is_served_otherwise_ask_for_one(measured, monkeypatch):
    active, capture, ids, (first, _, both) = measured
    place = active.places.of_tensor(None)
    alone = SORT.problem(SortCall(ids[0], 16, 32), place.device, bucket_of_ids(ids[0], 16))
    active.lookup.put([timing(alone, first, 10.0, place.environment)], place)
    for block in (16, 32):
        for _ in range(2):
            moecache.moe_sort(ids[0], 16, block, layer=("asks", block))
    asked = asked_of_captures(monkeypatch)
    moecache.moe_sort(ids[0], 16, 16, layer=("asks", 16))
    assert len(asked) == 1, "another config serves captures of this call"
    moecache.moe_sort(ids[0], 16, 32, layer=("asks", 32))
    assert len(asked) == 1
    capture.on = True
    capture.taken()
    for block, served in ((16, both), (32, first)):
        moecache.moe_sort(ids[0], 16, block, layer=("asks", block))
        assert capture.taken() == [served]


@pytest.mark.parametrize("strict", [False, True])
def test_which_answers_a_capture_keeps(tmp_path, strict):
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="off", strict=strict) as active:
        lasting = [tier for tier in get_args(Tier) if active.lasts(Choice(config=config("x"), tier=tier, reason=""))]
        assert lasting == (["measured"] if strict else list(get_args(Tier)))


def test_a_capture_of_what_is_not_measured_is_still_noted(tmp_path, monkeypatch):
    """The eager call and the graph are served one config, but no timing says so: the graph's question stays open."""
    capture = Capture(monkeypatch, SORT)
    ids = routing.draw("uniform", 64, 16, 2, 1)
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=0, backend=capture.backend) as active:
        for capture.on in (False, False, True):
            moecache.moe_sort(ids, 16, 16, layer="noted")
        assert len(set(capture.taken())) == 1
        assert [problem.routing for problem in active.wanted()] == [""]


def test_a_capture_before_any_eager_call_does_not_decide_for_eager_calls(measured):
    _, capture, ids, (first, _, both) = measured
    feedback.post("captured first", 64, 16, torch.device("cpu")).tensor.fill_(routing.NAMES.index("a0e0"))
    capture.on = True
    moecache.moe_sort(ids[0], 16, 16, layer="captured first")
    capture.on = False
    moecache.moe_sort(ids[0], 16, 16, layer="captured first")
    assert capture.taken() == [both, both, first]


def test_a_config_for_captures_that_raises_is_replaced_before_any(measured, monkeypatch):
    _, capture, ids, (first, _, both) = measured
    feedback.post("cannot load", 64, 16, torch.device("cpu")).tensor.fill_(routing.NAMES.index("a0e0"))
    broken(monkeypatch, SORT, both)
    moecache.moe_sort(ids[0], 16, 16, layer="cannot load")
    assert capture.taken()[-1] == first
    capture.on = True
    moecache.moe_sort(ids[0], 16, 16, layer="cannot load")
    assert capture.taken()[0] != both


def test_a_capture_never_tunes_or_reads_routing(tmp_path, monkeypatch):
    capture = Capture(monkeypatch, SORT)
    capture.on = True
    ids = routing.draw("uniform", 64, 16, 2, 1)
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", backend=capture.backend) as active:
        for _ in range(2):
            moecache.moe_sort(ids, 16, 16, layer="captured alone")
        (wanted,) = active.wanted()
        assert len(capture.taken()) == 2 and not active.hot and wanted.routing == ""
        capture.on = False
        moecache.moe_sort(ids, 16, 16, layer="captured alone")
        assert not active.wanted() and active.peek(SORT, wanted).tier == "measured"


def test_a_layer_of_few_pairs_is_one_question_whatever_its_routing(tmp_path, monkeypatch):
    capture = Capture(monkeypatch, FUSED_MOE)
    x, w1, w2, weights = torch.randn(16, 32), torch.randn(8, 32, 32), torch.randn(8, 32, 16), torch.rand(16, 4)
    same = torch.tensor([[0, 1, 2, 3]] * 16, dtype=torch.int32)  # as in a dry run
    drawn = routing.draw("uniform", 16, 8, 4, 1)
    with moecache.using(db=tmp_path / "c.sqlite", path=(), budget=1.0, backend=capture.backend) as active:
        moecache.fused_moe(x, w1, w2, weights, same, layer="few")
        place = active.places.of_tensor(None)
        problem = FUSED_MOE.problem(call_args(x, w1, w2, weights, same), place.device, "")
        tuned = [name for name in routing.NAMES if active.lookup.timings(problem.model_copy(update={"routing": name}))]
        assert tuned == [bucket_of_ids(routing.draw("uniform", 16, 8, 4), 8)] != [bucket_of_ids(same, 8)]
        (chosen,) = {served.what for served in active.hot.values()}
        capture.taken()
        with monkeypatch.context() as patch:
            patch.setattr(type(active), "choose", lambda *a, **k: pytest.fail("a hit asked the policy"))
            for capture.on in (False, True):
                for ids in (same, drawn):
                    moecache.fused_moe(x, w1, w2, weights, ids, layer="few")
        assert capture.taken() == [chosen] * 4
    assert feedback.post("few", 16, 8, x.device).word.value == feedback.UNKNOWN
    capture.on = False
    with moecache.using(mode="off"):
        many = torch.cat([x, x])
        moecache.fused_moe(many, w1, w2, torch.rand(32, 4), routing.draw("uniform", 32, 8, 4), layer="few")
    assert feedback.post("few", 32, 8, x.device).word.value != feedback.UNKNOWN


def test_a_grouped_product_is_tuned_in_its_first_routing_and_answers_for_any(tmp_path):
    a, b = torch.randn(32, 16), torch.randn(4, 24, 16)
    offsets = [torch.tensor(each, dtype=torch.int32) for each in ([0, 30, 31, 32, 32], [0, 8, 16, 24, 32])]
    with moecache.using(db=tmp_path / "c.sqlite", path=(), budget=1.0) as active:
        moecache.grouped_gemm(a, b, offsets[0])
        problem = GROUPED_GEMM.problem(ProductCall(a, b, offsets[0]), active.places.of_tensor(None).device, "")
        first = problem.model_copy(update={"routing": routing.bucket([30, 1, 1, 0])})
        rows = active.lookup.timings(first)
        hot = dict(active.hot)
        assert len(rows) >= 2 and len(hot) == 1 and "alone is measured" in active.peek(GROUPED_GEMM, problem).reason
        moecache.grouped_gemm(a, b, offsets[1], layer="another")
        assert active.hot == hot and active.lookup.timings(first) == rows


def test_slots_start_on_sixteen_bytes():
    """Triton compiles anew for an address that does not, and a capture may not."""
    cpu = torch.device("cpu")
    slots = [feedback.post(("aligned", number), 1, 1, cpu) for number in range(5)]
    assert all(slot.tensor.data_ptr() % 16 == 0 for slot in slots)
    slots[3].tensor.fill_(7)
    assert [slot.word.value for slot in slots] == [feedback.UNKNOWN] * 3 + [7, feedback.UNKNOWN]


def test_posting_asks_torch_for_a_capture_on_a_gpu_alone(monkeypatch):
    slot = feedback.Post(None, type(feedback.post("ask", 1, 1, torch.device("cpu")).word)(3))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert feedback.read(slot, -1) == 3
    assert feedback.read(slot, 0) == feedback.ANY
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert feedback.read(slot, 0) == 3


# --- what was checked once is not checked again, and nothing else passes for it ---


def changed(tensor, change):
    return change(tensor) if callable(change) else change


FUSED = {
    "hidden_states": torch.randn(20, 32), "w1": torch.randn(8, 32, 32), "w2": torch.randn(8, 32, 16),
    "topk_weights": torch.rand(20, 4), "topk_ids": routing.draw("uniform", 20, 8, 4),
}  # fmt: skip
GROUPED = {"a": torch.randn(32, 16), "b": torch.randn(4, 24, 16), "offsets": torch.tensor([0, 8, 16, 24, 32])}
SORTED = {"topk_ids": routing.draw("uniform", 20, 8, 4), "num_experts": 8, "block_m": 16}
BAD = [
    (moecache.fused_moe, FUSED, {"hidden_states": lambda t: t[:, :30]}),
    (moecache.fused_moe, FUSED, {"hidden_states": lambda t: t[:19]}),
    (moecache.fused_moe, FUSED, {"hidden_states": lambda t: t[None]}),
    (moecache.fused_moe, FUSED, {"hidden_states": lambda t: t.double()}),
    (moecache.fused_moe, FUSED, {"hidden_states": lambda t: t.to("meta")}),
    (moecache.fused_moe, FUSED, {"w1": lambda t: t[:, :31]}),
    (moecache.fused_moe, FUSED, {"w1": lambda t: t[0]}),
    (moecache.fused_moe, FUSED, {"w1": lambda t: t.bfloat16()}),
    (moecache.fused_moe, FUSED, {"w2": lambda t: t[:7]}),
    (moecache.fused_moe, FUSED, {"w2": lambda t: t.half()}),
    (moecache.fused_moe, FUSED, {"w2": lambda t: t.to("meta")}),
    (moecache.fused_moe, FUSED, {"topk_ids": lambda t: t.short()}),
    (moecache.fused_moe, FUSED, {"topk_ids": lambda t: t[:, :3]}),
    (moecache.fused_moe, FUSED, {"topk_ids": lambda t: t[:, 0]}),
    (moecache.fused_moe, FUSED, {"topk_weights": lambda t: t.int()}),
    (moecache.fused_moe, FUSED, {"topk_weights": lambda t: t[:19]}),
    (moecache.fused_moe, FUSED, {"activation": "relu"}),
    (moecache.fused_moe, FUSED, {"global_num_experts": 9}),
    (moecache.fused_moe, FUSED, {"w1_bias": torch.zeros(8, 31)}),
    (moecache.fused_moe, FUSED, {"expert_map": torch.zeros(8)}),
    (moecache.fused_moe, FUSED, {"out": torch.empty(20, 31)}),
    (moecache.grouped_gemm, GROUPED, {"a": lambda t: t[:, :15]}),
    (moecache.grouped_gemm, GROUPED, {"a": lambda t: t[None]}),
    (moecache.grouped_gemm, GROUPED, {"a": lambda t: t.half()}),
    (moecache.grouped_gemm, GROUPED, {"b": lambda t: t[0]}),
    (moecache.grouped_gemm, GROUPED, {"b": lambda t: t.to("meta")}),
    (moecache.grouped_gemm, GROUPED, {"offsets": lambda t: t[:4]}),
    (moecache.grouped_gemm, GROUPED, {"offsets": lambda t: t.short()}),
    (moecache.grouped_gemm, GROUPED, {"rows": torch.zeros(32)}),
    (moecache.grouped_gemm, GROUPED, {"bias": torch.zeros(4, 23)}),
    (moecache.moe_sort, SORTED, {"topk_ids": lambda t: t.short()}),
    (moecache.moe_sort, SORTED, {"topk_ids": lambda t: t[:, 0]}),
    (moecache.moe_sort, SORTED, {"num_experts": 0}),
    (moecache.moe_sort, SORTED, {"block_m": 2000}),
    (moecache.moe_sort, SORTED, {"topk_weights": torch.rand(19, 4)}),
    (moecache.moe_sort, SORTED, {"expert_map": torch.zeros(7, dtype=torch.int32)}),
    (moecache.moe_sort, SORTED, {"num_tokens": torch.zeros(2, dtype=torch.int32)}),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_no_bad_argument_passes_for_one_that_was_checked(serving, number):
    op, good, change = BAD[number]
    bad = good | {name: changed(good.get(name), how) for name, how in change.items()}
    op(**good), op(**good)
    hits = dict(serving.hot)
    for _ in range(2):
        with pytest.raises(InvalidInput):
            op(**bad)
    assert serving.hot == hits


def test_strides_of_one_row_and_of_one_expert_say_nothing(serving):
    """torch calls such tensors contiguous whatever their strides. No element is read by them: such a call is a hit, and
    asks and launches what any other does."""
    x, w1, w2 = torch.randn(1, 32), torch.randn(8, 32, 32), torch.randn(8, 32, 16)
    ids, weights = torch.zeros(1, 4, dtype=torch.int32), torch.rand(1, 4)
    odd, apart = torch.randn(1, 33)[:, :32].copy_(x), torch.randn(1025)[:-1].view(1, 32, 32)
    apart = apart.copy_(w1[:1]).as_strided((1, 32, 32), (1025, 32, 1))
    assert odd.is_contiguous() and odd.stride() == (33, 1) and apart.is_contiguous()
    many, one, each = torch.randn(40, 32), torch.zeros(40, 1, dtype=torch.int32), torch.rand(40, 1)
    device = serving.places.of_tensor(x).device
    for usual, other in (((x, w1, w2, weights, ids), (odd, w1, w2, weights, ids)),
                         ((many, w1[:1], w2[:1], each, one), (many, apart, w2[:1], each, one))):  # fmt: skip
        want, hits = moecache.fused_moe(*usual), dict(serving.hot)
        assert torch.equal(moecache.fused_moe(*other), want) and serving.hot == hits
        plain, strided = call_args(*usual), call_args(*other)
        problem = FUSED_MOE.problem(plain, device, "")
        assert FUSED_MOE.problem(strided, device, "") == problem and not problem.dim("unaligned")
        for name in ("hidden_states", "w1"):
            operands = [running.described(getattr(call, name)) for call in (plain, strided)]
            assert operands[0].strides == operands[1].strides == getattr(plain, name).contiguous().stride()
        for cfg in FUSED_MOE.space(problem, device):
            got = FUSED_MOE.launch(cfg, strided, FUSED_MOE.outputs(strided))
            assert torch.allclose(got, want, atol=1e-5), cfg.name


@pytest.mark.parametrize(("op", "good"), [(moecache.fused_moe, FUSED), (moecache.grouped_gemm, GROUPED)])
def test_rows_off_sixteen_bytes_are_another_problem(serving, op, good):
    """The key holds strides and addresses, from which `unaligned` follows."""
    op(**good), op(**good)
    name = next(iter(good))
    wide = torch.zeros(len(good[name]), good[name].shape[1] + 1)
    for other in (wide[:, 1:], wide[:, :-1]):
        hits = set(serving.hot)
        op(**good | {name: other})
        assert len(set(serving.hot) - hits) == 1


def test_a_number_of_tokens_that_kernels_do_not_read_right_is_refused():
    many = torch.tensor([2**31 - 1], dtype=torch.int32)
    debugging = moecache.using(mode="replay", debug=True, db=":memory:", path=())
    with debugging, pytest.raises(InvalidInput, match="allowed are counts below 268435456"):
        moecache.moe_sort(torch.zeros(4, 8, dtype=torch.int32), 4, 16, num_tokens=many)


def test_a_mask_of_floats_is_refused(serving):
    ids, weights = torch.zeros(4, 2, dtype=torch.int32), torch.rand(4, 2)
    with pytest.raises(InvalidInput, match=r"expert_mask is torch\.float32"):
        moe_sorting(ids, weights, 4, 8, torch.bfloat16, expert_mask=torch.ones(4))
