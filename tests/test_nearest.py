"""Comparing problems: differences, distance, and the nearest stored one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecache.dispatch.nearest import Distance, closest, differences, distance, fields, routing_distance
from moecache.schemas.problem import Problem

problems = st.builds(
    Problem,
    op=st.just("x"),
    vendor=st.sampled_from(["nvidia", "amd"]),
    arch=st.sampled_from(["sm_90", "gfx942"]),
    units=st.sampled_from([1, 4, 38, 304]),
    tokens=st.sampled_from([0, 1, 2, 16, 64, 4096]),
    experts=st.sampled_from([8, 64]),
    topk=st.sampled_from([1, 8]),
    routing=st.sampled_from(["", "a0e0", "a1e2"]),
    dims=st.sampled_from([(), (("n", 16),), (("n", 128),), (("n", 16), ("flag", True))]),
)


def problem(**changes: object) -> Problem:
    base = {"op": "x", "vendor": "amd", "arch": "gfx942", "units": 304, "tokens": 16, "experts": 8, "topk": 2}
    return Problem.model_validate(base | changes)


@given(problems, problems)
def test_nothing_differs_exactly_when_the_keys_are_equal(a: Problem, b: Problem) -> None:
    found = differences(a, b)
    assert (found == []) == (a.key == b.key)
    for field, asked, stored in found:
        assert fields(a).get(field, "") == asked != stored == fields(b).get(field, "")


@given(problems, problems)
def test_distance_is_symmetric_and_zero_only_for_the_same_problem(a: Problem, b: Problem) -> None:
    there, back = distance(a, b, ["n"]), distance(b, a, ["n"])
    assert there == back
    assert (there == Distance(0, 0, 0.0)) == (a == b)


@given(problems, st.lists(problems, max_size=6))
def test_the_closest_has_the_fewest_differences(asked: Problem, stored: list[Problem]) -> None:
    found = closest(asked, stored)
    if not stored:
        assert found is None
    else:
        assert found is not None and found[0] in stored and found[1] == differences(asked, found[0])
        assert len(found[1]) == min(len(differences(asked, p)) for p in stored)


def test_differences_come_in_the_order_of_the_key_and_read_well() -> None:
    a = problem(dims=(("block_m", 64), ("weighted", True)))
    b = problem(tokens=64, source="abc", dims=(("block_m", 16),))
    assert [str(d) for d in differences(a, b)] == [
        "tokens=64 (asked 16)",
        "source=abc (asked default)",
        "dims.block_m=16 (asked 64)",
        "dims.weighted=default (asked 1)",
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tokens": 64}, Distance(0, 0, 2.0)),
        ({"tokens": 128}, None),
        ({"units": 76}, Distance(1, 0, 0.0)),
        ({"units": 38}, None),
        ({"routing": "a2e3"}, Distance(0, 5, 0.0)),
        ({"dims": (("n", 16),)}, Distance(1, 0, 0.0)),
        ({"dims": (("m", 16),)}, None),
        ({"tokens": 0}, None),
    ],
)
def test_how_far_a_neighbour_may_be(change: dict[str, object], expected: Distance | None) -> None:
    assert distance(problem(), problem(**change), ["n"]) == expected


def test_levels_between_routing_buckets() -> None:
    assert [routing_distance("a0e0", b) for b in ("a0e0", "a0e1", "a2e3", "")] == [0, 1, 5, 1]
