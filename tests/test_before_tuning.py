"""A call under another routing: what was good under the first is tried, the rest is not."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from toy import CapturingBackend, Toy, ToyClock

from moecache.dispatch import Dispatcher, using
from moecache.dispatch.any_routing import least_loss
from moecache.schemas.config import config
from moecache.tuning.candidates import PROVEN, shortlist

CONFIGS = [config("plain", block=i) for i in range(14)]


@pytest.fixture
def toy() -> Toy:
    """The default is slow, the best predicted middling; the best are the last."""
    return Toy(times={c: 30.0 - i for i, c in enumerate(CONFIGS)}, costs={c: float(i) for i, c in enumerate(CONFIGS)})


@pytest.fixture
def serving(toy: Toy, tmp_path: Path) -> Iterator[Dispatcher]:
    with using(db=tmp_path / "c.sqlite", path=(), mode="tune", backend=CapturingBackend(), clock=ToyClock(toy)) as d:
        yield d


def test_another_routing_is_searched_where_the_first_was_good(toy: Toy, serving: Dispatcher) -> None:
    first = serving.measure(toy, toy.problem(16, "a0e0"))
    assert len(first) == len(CONFIGS)
    second = serving.measure(toy, toy.problem(16, "a0e2"))
    best = sorted(CONFIGS, key=toy.times.__getitem__)[:PROVEN]
    assert {t.config for t in second} == {CONFIGS[0], CONFIGS[1], *best}
    assert second[0].is_default and second[0].config == CONFIGS[0]
    assert {t.config for t in serving.measure(toy, toy.problem(16, "a1e2"))} == {t.config for t in second}


def test_other_calls_are_searched_in_full(toy: Toy, serving: Dispatcher) -> None:
    serving.measure(toy, toy.problem(16, "a0e0"))
    for other in (toy.problem(32, "a0e0"), toy.problem(16, "a0e0", dims=(("block_m", 32),))):
        assert len(serving.measure(toy, other)) == len(CONFIGS)


def test_too_few_prove_nothing(toy: Toy) -> None:
    problem, device = toy.problem(), CapturingBackend().device()
    others = CONFIGS[1:]
    few = shortlist(toy, problem, device, 24, None, others[-PROVEN + 1 :])
    assert len(few) == len(CONFIGS)
    enough = shortlist(toy, problem, device, 24, None, [config("gone"), *others[::-1]])
    assert enough == [CONFIGS[0], CONFIGS[1], *others[::-1][:PROVEN]]
    kept = shortlist(toy, problem, device, 24, CONFIGS[5], others[::-1])
    assert kept == [CONFIGS[0], CONFIGS[1], CONFIGS[5], *others[::-1][:PROVEN]], "the incumbent stays"


names = st.sampled_from("abcdef")


@given(st.dictionaries(st.sampled_from(["a0e0", "a0e1", "a1e2"]), st.dictionaries(names, st.floats(1, 1e3))))
def test_least_loss_is_one_for_a_best_and_never_below(times: dict[str, dict[str, float]]) -> None:
    found = least_loss(times)
    assert set(found) == {name for each in times.values() for name in each}
    assert all(loss >= 1 for loss in found.values())
    for each in times.values():
        if each:
            assert found[min(each, key=each.__getitem__)] == 1
