"""Routing: buckets and draws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moecache import routing
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import EFFECTIVE_LEVELS, bucket_levels


def test_buckets_of_known_shapes():
    assert routing.bucket([4] * 64) == "a0e0"
    assert routing.bucket([0] * 10) == "a0e0"
    assert routing.bucket([64] + [0] * 63) == "a2e3"
    assert routing.bucket([8] * 32 + [0] * 32) == "a1e1"
    assert routing.bucket([1000] + [1] * 63) == "a0e3"
    assert routing.bucket([1] + [0] * 63) == "a0e0"  # one pair can only ever reach one expert


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=200), st.permutations(range(5)))
def test_bucket_ignores_order_and_stays_in_range(counts, order):
    index = routing.bucket_index(counts)
    assert routing.bucket_name(index) in routing.NAMES
    assert routing.bucket_index(sorted(counts)) == index
    a, e = bucket_levels(routing.bucket_name(index))
    assert index == a * EFFECTIVE_LEVELS + e
    assert e >= a or a == 2  # effective experts are never more than active ones


@pytest.mark.parametrize("generator", ["uniform", "zipf", "hot1", "dir1.5", "dir2", "dir4"])
def test_draws_are_distinct_and_in_range(generator):
    ids = routing.draw(generator, 200, 32, 4, seed=3)
    assert ids.shape == (200, 4) and ids.dtype == torch.int32
    assert int(ids.min()) >= 0 and int(ids.max()) < 32
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert torch.equal(ids, routing.draw(generator, 200, 32, 4, seed=3))
    assert not torch.equal(ids, routing.draw(generator, 200, 32, 4, seed=4))


def effective(counts):
    return sum(counts) ** 2 / sum(c * c for c in counts)


def test_dirichlet_has_the_promised_effective_experts():
    """Mean over draws of E / (effective experts), top-1 so that distinctness does not flatten it."""
    for x in (1.5, 2, 4):
        found = [effective(routing.histogram(routing.draw(f"dir{x}", 8192, 128, 1, seed), 128)) for seed in range(12)]
        assert 128 / x * 0.8 < sum(found) / 12 < 128 / x * 1.25


@pytest.mark.parametrize("experts", [1, 2, 3, 8])
def test_a_dirichlet_draw_has_one_effective_expert_where_there_are_too_few_for_more(experts):
    for seed in range(8):
        counts = routing.histogram(routing.draw(f"dir{experts + 1}", 512, experts, 1, seed), experts)
        assert effective(counts) < 1.6


def test_hot1_has_one_expert_in_every_row():
    counts = routing.histogram(routing.draw("hot1", 100, 64, 8, 5), 64)
    assert max(counts) == 100 and sorted(counts)[-2] < 40


def test_drawing_does_not_touch_the_global_generator():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    routing.draw("dir2", 64, 32, 4, 1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "tokens, experts, topk", [(1, 128, 8), (16, 128, 8), (256, 64, 8), (1024, 8, 2), (4096, 256, 8)]
)
def test_draw_bucket_lands_in_its_bucket_where_one_exists(tokens, experts, topk):
    seen = set()
    for generator in ("uniform", "dir2", "dir4", "zipf", "hot1"):
        seen.add(routing.bucket(routing.histogram(routing.draw(generator, tokens, experts, topk, 0), experts)))
    for name in seen:
        ids = routing.draw_bucket(name, tokens, experts, topk, seed=11)
        assert routing.bucket(routing.histogram(ids, experts)) == name, (name, tokens, experts)


def test_histogram_leaves_out_invalid_ids():
    assert routing.histogram(torch.tensor([[0, -1], [3, 2], [9, 2]]), 4) == [1, 0, 2, 1]


@pytest.mark.parametrize("bad", ["", "dir", "dir1", "dirx", "Zipf", "hot2"])
def test_unknown_generator_is_named(bad):
    with pytest.raises(InvalidInput, match="uniform, zipf, hot1 or dirX"):
        routing.draw(bad, 4, 8, 2)


def test_bad_bucket_and_topk_are_named():
    with pytest.raises(InvalidInput, match="a9e9"):
        routing.draw_bucket("a9e9", 4, 8, 2)
    with pytest.raises(InvalidInput, match="topk=9"):
        routing.draw("uniform", 4, 8, 9)
