"""Weights that problems share within a block: which are the same tensors, which never are, and how many are held."""

import pytest
import torch

from moecache import routing
from moecache.kernels import shared_inputs
from moecache.kernels.contract import Args
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.schemas.problem import Problem


def problem(tokens: int = 4, **dims: int) -> Problem:
    return Problem(
        op="fused_moe", vendor="cpu", arch="x86_64", units=2, tokens=tokens, experts=4, topk=2, dtype="fp32",
        dims={"hidden": 32, "intermediate": 16, **dims},
    )  # fmt: skip


def inputs(asked: Problem, seed: int) -> Args:
    return FUSED_MOE.inputs(asked, routing.draw("uniform", asked.tokens, 4, 2, seed), seed)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_inputs, "LARGE", 1)


def test_large_weights_are_made_once_and_the_rest_is_fresh(large: None) -> None:
    with shared_inputs.sharing():
        first, other, longer = inputs(problem(), 0), inputs(problem(), 1), inputs(problem(8), 2)
    for args in (other, longer):
        assert args.w1 is first.w1 and args.w2 is first.w2
    assert not torch.equal(first.hidden_states, other.hidden_states)
    assert not torch.equal(first.topk_weights, other.topk_weights)
    assert longer.hidden_states.shape == (8, 32)


def test_small_weights_differ_by_seed_so_that_rotated_sets_stay_cold() -> None:
    with shared_inputs.sharing():
        first, other, again = (inputs(problem(), seed) for seed in (0, 1, 0))
    assert other.w1 is not first.w1 and not torch.equal(other.w1, first.w1)
    assert again.w1 is first.w1


def test_other_weights_are_never_shared(large: None) -> None:
    biased, wide = problem(biased=1), problem(intermediate=32)
    with shared_inputs.sharing():
        plain = inputs(problem(), 0)
        assert inputs(biased, 0).w1_bias is not None and plain.w1_bias is None
        assert inputs(wide, 0).w1.shape == (4, 64, 32) and plain.w1.shape == (4, 32, 32)
        assert inputs(problem(unaligned=1), 0).w1.stride() != plain.w1.stride()


def test_without_a_block_and_after_it_nothing_is_held(large: None) -> None:
    assert inputs(problem(), 0).w1 is not inputs(problem(), 0).w1
    with shared_inputs.sharing():
        with shared_inputs.sharing():
            inner = inputs(problem(), 0).w1
        assert inputs(problem(), 0).w1 is inner, "the outermost block holds them"
    assert inputs(problem(), 0).w1 is not inner
    assert torch.equal(inputs(problem(), 0).w1, inner), "the same values, made again"


def test_what_somebody_may_have_written_to_is_made_anew(large: None) -> None:
    with shared_inputs.sharing():
        args = inputs(problem(), 0)
        args.w1.zero_()
        shared_inputs.forget_shared()
        assert inputs(problem(), 0).w1.any()
    shared_inputs.forget_shared()  # outside, nothing to forget


def test_the_oldest_give_way(monkeypatch: pytest.MonkeyPatch, large: None) -> None:
    monkeypatch.setattr(shared_inputs, "SHELF_BYTES", 100)
    made: list[str] = []

    def ask(key: str, size: int) -> str:
        return shared_inputs.shared(size, 7, key, lambda seed: made.append(f"{key}{seed}") or key)

    with shared_inputs.sharing():
        for key, size in (("a", 40), ("b", 40), ("a", 40), ("c", 60), ("b", 40), ("huge", 900), ("huge", 900)):
            assert ask(key, size) == key
    assert made == ["a0", "b0", "c0", "b0", "huge0"], "b gave way to c, as a was used after it"
