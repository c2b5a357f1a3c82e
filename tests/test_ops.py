"""The public operations on the CPU: contracts, tiers, and that a hit stays off everything slow."""

import pytest
import torch

import moecache
from moecache import posting, routing
from moecache.kernels.sort import SORT, call_args
from moecache.ops import moe_align_block_size, moe_sorting
from moecache.schemas.config import config
from moecache.schemas.errors import InvalidInput


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
    assert SORT.error(got, SORT.reference(call_args(ids, 16, 16))) == 0.0


def test_routing_is_posted_per_layer(serving):
    balanced = torch.arange(64, dtype=torch.int32).reshape(32, 2) % 16
    hot = torch.zeros(32, 2, dtype=torch.int32)
    assert int(moecache.moe_sort(balanced, 16, 16, layer="first").posted) == 0
    assert int(moecache.moe_sort(hot, 16, 16, layer="second").posted) == routing.NAMES.index("a2e3")
    cpu = torch.device("cpu")
    assert posting.post("first", 32, 16, cpu).word.value == 0
    assert posting.post("second", 32, 16, cpu).word.value == routing.NAMES.index("a2e3")
    assert posting.post("third", 32, 16, cpu).word.value == posting.UNKNOWN


def test_first_call_tunes_in_the_bucket_of_its_routing(tmp_path):
    ids = torch.zeros(64, 2, dtype=torch.int32)
    ids[:, 1] = 1
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=5.0) as active:
        moecache.moe_sort(ids, 16, 16, layer="encounter")
        place = active.places.of_tensor(ids)
        problem = SORT.problem(call_args(ids, 16, 16), place.device, "a2e3")
        assert active.peek(SORT, problem).tier == "measured"


def test_a_config_that_raises_at_launch_is_replaced(tmp_path, monkeypatch):
    ids = routing.draw("uniform", 32, 16, 2, 1)
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=5.0) as active:
        for _ in range(2):
            moecache.moe_sort(ids, 16, 16, layer="raises")
        victim, real = config("by_expert"), type(SORT).launch
        active.hot.update(dict.fromkeys(active.hot, victim))

        def launch(self, cfg, args, out):
            if cfg == victim:
                raise RuntimeError("no kernel image")
            return real(self, cfg, args, out)

        monkeypatch.setattr(type(SORT), "launch", launch)
        got = moecache.moe_sort(ids, 16, 16, layer="raises")
        assert SORT.error(got, SORT.reference(call_args(ids, 16, 16))) == 0.0
        moecache.moe_sort(ids, 16, 16, layer="raises")
        assert active.hot and victim not in active.hot.values()
        problem = SORT.problem(call_args(ids, 16, 16), active.places.of_tensor(ids).device, "")
        failures = [t for t, _ in active.recall.timings(problem.model_copy(update={"routing": bucket_of(got)}))]
        assert [(t.status, "no kernel image" in t.reason) for t in failures if t.config == victim] == [("raised", True)]


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
        problem = SORT.problem(call_args(ids, 2, 4), active.places.of_tensor(ids).device, bucket_of(got))
        assert got.counts.tolist() == [7, 8] and active.peek(SORT, problem).tier == "measured"
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
