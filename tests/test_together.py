"""Ranks that tune an op whose candidates are collectives, in step, and ranks that are served what one of them measured:
real processes over gloo."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from ranks import SHORT, ranks
from toy import A, B, C, Toy, ToyClock

from moecache.backends.cpu import CpuBackend
from moecache.dispatch import Dispatcher, using
from moecache.dispatch.policy import Ask
from moecache.schemas.errors import InvalidInput
from moecache.settings import Settings
from moecache.store import Store
from moecache.team import Team


def by_variant(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["config"]["variant"]: row for row in rows}


def test_what_fails_or_is_slow_on_one_rank_is_so_on_all() -> None:
    first, second = ranks("tuning_scenes:faults", 2)
    assert first == second, "the same timings, by launches in the same order"
    found = by_variant(first["rows"])
    assert {name: row["status"] for name, row in found.items()} == {
        "steady": "ok", "wrong": "wrong", "raise": "raised", "hang": "timeout", "tired": "raised", "lame": "ok",
        "turns": "ok",
    }  # fmt: skip
    assert found["raise"]["reason"] == "on rank 1: ValueError: cannot do that here"
    assert "on rank 1: error" in found["wrong"]["reason"] and "on rank 1: no result" in found["hang"]["reason"]
    assert found["steady"]["median_us"] == 20 and found["lame"]["median_us"] == 40
    assert found["turns"]["median_us"] == 30, "of what each call takes, not of what each rank takes"
    assert found["steady"]["is_default"] and first["order"].count("raise") == first["order"].count("wrong") == 1


def test_ranks_share_a_file_or_have_their_own(tmp_path: Path) -> None:
    first, second = ranks("tuning_scenes:shared_file", 2, FOLDER=str(tmp_path))
    assert "its ranks measure it together, in a warm-up" in second.pop("called") and not first.pop("called")
    assert first == second
    assert first["choice"] == "steady" and len(first["rows"]) == 4
    kind, why = first["refused"]
    assert kind == "InvalidInput" and "the tuning budget is 0" in why
    assert first["alone"] == [4] and first["warm"] == [["steady", 4]] * 2
    with Store.open(tmp_path / "one.sqlite", readonly=True) as store:
        rows = {row.config.variant: row for row in store.timings()}
    assert set(rows) == {"steady", "raise", "lame", "turns"}
    assert rows["raise"].status == "raised" and rows["raise"].n == 1, "one process had it, not one for each rank"


def test_the_clock_of_a_device_makes_as_many_calls_on_all_ranks() -> None:
    first, second = ranks("tuning_scenes:real_clock", 2)
    assert first == second
    for rows in first["rows"]:
        assert {name: row["status"] for name, row in by_variant(rows).items()} == {"steady": "ok", "turns": "ok"}


def test_where_ranks_die_or_hang_in_the_middle_the_others_end(tmp_path: Path) -> None:
    (kind, why, _), dead, hanging = ranks("tuning_scenes:ends", 3, frozen=2, FOLDER=str(tmp_path))
    assert dead is hanging is None
    assert (
        kind == "TeamLost" and "end() for op=meeting" in why and f"rank 1, 2 of 3 did not come within {SHORT:g}" in why
    )
    found = ranks("tuning_scenes:ends", 3, FOLDER=str(tmp_path), AGAIN="1")
    assert found[0] == found[1] == found[2] and found[0]["sound"] == [] and found[0]["notes"] == 0
    assert {name: row["status"] for name, row in by_variant(found[0]["rows"]).items()} == {"steady": "ok"}


def test_all_wait_for_a_slow_rank_and_count_its_time(tmp_path: Path) -> None:
    """By order only: a race scales what left early by the drift of what stayed, and a busy machine drifts far."""
    first, second = ranks("tuning_scenes:slow", 2, FOLDER=str(tmp_path))
    assert first == second and first["choice"] == "turns"
    assert by_variant(first["rows"])["steady"]["median_us"] > by_variant(first["rows"])["turns"]["median_us"]


def test_where_the_rank_that_measures_is_killed_the_others_say_so_and_the_next_start_is_clean(tmp_path: Path) -> None:
    file = tmp_path / "one.sqlite"
    dead, *others = ranks("tuning_scenes:one_measures", 3, FOLDER=str(tmp_path), FIRST="1")
    assert dead is None and all("warm-up: rank 0" in why and "did not come within" in why for why in others)
    with Store.open(file, readonly=True) as store:
        assert store.check() == [] and {row.problem.tokens for row in store.timings()} == {32}, "what was done is kept"
    found = ranks("tuning_scenes:one_measures", 3, FOLDER=str(tmp_path), AGAIN="1")
    assert [each["choices"] for each in found] == [[[C.name, "measured"]] * 2] * 3 and found[0]["measured"] == 0
    with Store.open(file, readonly=True) as store:
        assert {row.config for row in store.timings() if row.status == "crashed"} == {B}
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_a_cold_cache_beside_a_warm_one_is_told_on_all_ranks_until_it_is_filled(tmp_path: Path) -> None:
    found = ranks("tuning_scenes:cold", 2, FOLDER=str(tmp_path))
    for rank, each in enumerate(found):
        kind, why, _ = each["differ"]
        assert (
            kind == "RanksDiffer" and "rank 0: " in why and "rank 1: " in why and "Let all read the same files" in why
        )
        assert each["before"] == ("predicted" if rank else "measured") and each["after"] == [C.name, "measured"]
    assert found[0]["same"] == found[1]["same"]


def test_a_rank_that_raises_ends_all(tmp_path: Path) -> None:
    first, second = ranks("tuning_scenes:raises", 2, FOLDER=str(tmp_path))
    assert second == ["MemoryError", "no room for inputs"]
    assert first[0] == "TeamLost" and "rank 1 of 2 has left: MemoryError: no room for inputs" in first[1]


@pytest.fixture
def absent() -> Team:
    """A team whose other rank never comes: whatever asks it fails."""
    return Team(0, 2, dist.HashStore(), timeout=0.01)


def test_ordinary_ops_ask_no_other_rank(toy: Toy, db: Path, absent: Team) -> None:
    serving = Dispatcher(Settings(db=db, budget=5.0), CpuBackend(), ToyClock(toy), absent)
    assert serving.choose(toy, toy.problem(), key=("a",)).config == C and serving.hot[("a",)].tier == "measured"
    assert len(serving.measure(toy, toy.problem(32))) == 3
    serving.close()


def test_no_call_of_a_collective_op_asks_another_rank(toy: Toy, db: Path, absent: Team) -> None:
    toy.collective = True  # type: ignore[attr-defined]
    serving = Dispatcher(Settings(db=db, budget=5.0), CpuBackend(), ToyClock(toy), absent)
    choice = serving.choose(toy, toy.problem(), key=("a",))
    assert choice.tier == "predicted" and "its ranks measure it together, in a warm-up" in choice.reason
    assert serving.hot[("a",)] is choice and not toy.launches, "a hit from here on"
    serving.flush()
    assert [problem for problem, _ in serving.lookup.tiers.user.wanted()] == [toy.problem()]
    serving.close()


def test_where_all_must_launch_alike_none_falls_back_alone(toy: Toy, db: Path, absent: Team) -> None:
    toy.collective = True  # type: ignore[attr-defined]
    serving = Dispatcher(Settings(db=db), CpuBackend(), ToyClock(toy), absent)
    ask, error = Ask(toy, toy.problem(), serving.places.here("cpu", 0)), RuntimeError("launch failed")
    with pytest.raises(RuntimeError, match="launch failed"):
        serving.rescue(ask, C, error, lambda config: pytest.fail(f"{config} was launched"))
    alone = Dispatcher(Settings(db=db), CpuBackend(), ToyClock(toy))
    assert alone.rescue(ask, C, error, lambda config: config) == A
    serving.close(), alone.close()


def test_the_team_in_force_is_that_of_the_block(absent: Team) -> None:
    with using(mode="off", team=absent), using(mode="replay") as inner:
        assert inner.team is absent
    with using(mode="off") as outside:
        assert outside.team.size == 1
    with pytest.raises(InvalidInput, match=r"Team\.of"), using(team=3):  # type: ignore[arg-type]
        pass
