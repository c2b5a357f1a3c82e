"""Teams: ranks agree, and none waits for one that died, hangs or left. Real processes, over gloo."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from ranks import SHORT, ranks

from moecache.schemas.errors import InvalidInput
from moecache.team import ALONE, LONGEST, TIMEOUT, Team


def test_three_ranks_agree() -> None:
    found = ranks("team_scenes:agree", 3)
    assert [each["rank"] for each in found] == [0, 1, 2] and {each["size"] for each in found} == {3}
    for each in found:
        assert (each["max"], each["min"], each["broadcast"]) == (1.0, 0, {"from": 0})
        assert each["gather"] == [[rank, None, "µ", float("inf")] for rank in range(3)]
        assert each["same"] == "equal" and each["after"] == [0, 1, 2]
        kind, message = each["differ"]
        assert kind == "RanksDiffer" and "rank 0, 2: other" in message and "rank 1: one" in message
        assert each["again"] == [[0, 1, 2], [0, -1, -2], [0, 2, 4]]
    assert [each["part"] for each in found] == [[0, 2], [1], [0, 2]]
    kind, message = found[1]["outside"]
    assert kind == "InvalidInput" and "not in that process group" in message


def test_who_asks_something_else_or_raises_is_named_at_once_on_all_ranks() -> None:
    found = ranks("team_scenes:part", 3)
    for elsewhere, again, _ in found:
        assert elsewhere[0] == "TeamLost" and "rank 0 at 'hit', rank 1 at 'miss', rank 2 at 'hit'" in elsewhere[1]
        assert again == elsewhere
    *others, raising = [left for *_, left in found]
    assert raising == ["InvalidInput", "cannot go on"]
    assert all(kind == "TeamLost" and "rank 2 of 3 has left: InvalidInput: cannot go on" in why for kind, why in others)


def test_ranks_that_died_or_hang_are_named_after_the_timeout() -> None:
    (kind, why, seconds), dead, hanging = ranks("team_scenes:gone", 3, frozen=2)
    assert dead is hanging is None
    assert kind == "TeamLost" and f"after: rank 1, 2 of 3 did not come within {SHORT:g} s" in why and "logs" in why
    assert SHORT <= seconds < TIMEOUT


@pytest.mark.parametrize(("scene", "frozen"), [("keeper_dies", -1), ("keeper_freezes", 0)])
def test_where_the_keeper_of_the_store_is_gone_nobody_waits_longer(scene: str, frozen: int) -> None:
    gone, (kind, why, seconds) = ranks(f"team_scenes:{scene}", 2, keeper=0, frozen=frozen)
    assert gone is None and kind == "TeamLost" and seconds < TIMEOUT
    assert "the store that the ranks share is gone" in why and "mostly rank 0" in why


def test_alone_everything_is_answered_by_oneself() -> None:
    began, value = time.perf_counter(), object()
    ALONE.barrier("x")
    assert ALONE.gather("x", value) == [value] and ALONE.broadcast("x", value) is value
    assert ALONE.agree("x", 3, max) == 3 and ALONE.same("digest") == "digest"
    assert time.perf_counter() - began < TIMEOUT
    with pytest.raises(KeyError), ALONE.staying():
        raise KeyError("not of the team")
    ALONE.barrier("x")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rank": 1}, "rank=1"), ({"rank": -1}, "rank=-1"), ({"size": 0}, "size=0"), ({"size": 2}, "store=None"),
        ({"timeout": 0}, "timeout=0"), ({"timeout": float("nan")}, "timeout=nan"), ({"rank": "0"}, "rank is '0'"),
        ({"size": True}, "size is True"), ({"timeout": "3"}, "timeout is '3'"), ({"size": 2, "store": 1}, "store=1"),
    ],
)  # fmt: skip
def test_what_is_no_team(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        Team(**arguments)


@pytest.mark.parametrize(
    ("what", "value", "named"),
    [
        ("x", object(), "x: .*object.*lists and dicts"), ("x", {(1, 2): 3}, "x: .*lists and dicts"),
        ("x", "y" * LONGEST, "a hash of it"), (None, 1, "what is None"),
    ],
)  # fmt: skip
def test_what_cannot_be_exchanged_is_named_before_anybody_waits(what: Any, value: object, named: str) -> None:
    team = Team(0, 2, dist.HashStore(), SHORT)
    with pytest.raises(InvalidInput, match=named):
        team.gather(what, value)


def test_an_exchange_that_is_complete_does_not_fail_where_the_keeper_of_the_store_is_done() -> None:
    class Leaving(dist.HashStore):
        def delete_key(self, key: str) -> bool:
            raise RuntimeError("Connection reset by peer")

    store = Leaving()
    with ThreadPoolExecutor(2) as pool:
        teams = list(pool.map(lambda rank: Team(rank, 2, store), range(2)))
        for turn in range(3):
            found = pool.map(lambda team, turn=turn: team.gather("x", [turn, team.rank]), teams)
            assert list(found) == [[[turn, 0], [turn, 1]]] * 2


def test_without_a_process_group_there_is_no_team_of_it() -> None:
    with pytest.raises(InvalidInput, match="init_process_group"):
        Team.of()
