"""The decision rule: only what is proved faster replaces the default; a file's own view says the same."""

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from samples import HERE, UPGRADED, failed, problem, sql, timing

from moecache.schemas.config import config
from moecache.schemas.rule import Entry, better, decide
from moecache.schemas.timing import Timing
from moecache.store import Store

times = st.floats(9, 11) | st.floats(1e-3, 1e9) | st.sampled_from([10.0, 10.1, 10.2, 20.0])
spreads = st.none() | st.floats(0, 2) | st.floats(0, 1e12) | st.just(0.0)
counts = st.integers(0, 5) | st.integers(0, 10**6)
entries = st.builds(Entry, us=times, name=st.sampled_from("abcdefgh"), mad=spreads, n=counts, default=st.booleans())
fields = st.lists(entries, min_size=1, max_size=8, unique_by=lambda each: each.name)


def test_a_badly_measured_config_neither_wins_nor_ties_the_best_away() -> None:
    best, default, noisy = Entry(100, "a", 1, 72), Entry(120, "d", 1, 24, True), Entry(160, "Z", 400, 3)
    found = decide([best, default, noisy])
    assert (found.won, found.default_us, found.tied, found.runner_up_us) == (best, 120, 2, 120)
    assert decide([default, noisy]).won is default
    assert decide([best._replace(mad=400), default, noisy]).won is default, "a noisy best proves nothing"


@pytest.mark.parametrize(
    ("us", "mad", "n", "won"),
    [
        (90.0, 0.0, 3, True),
        (99.5, 0.0, 1000, False),  # within 1 %
        (50.0, 0.0, 2, False),  # too few samples
        (50.0, 0.0, 1, False),
        (50.0, None, 50, False),  # of unknown spread
        (50.0, 60.0, 9, False),  # two standard errors are 74
        (50.0, 40.0, 9, True),  # and 50
        (50.0, math.inf, 9, False),
    ],
)
def test_what_proves_a_config_better_than_the_default(us: float, mad: float | None, n: int, won: bool) -> None:
    one, default = Entry(us, "a", mad, n), Entry(100.0, "d", 0.0, 50, True)
    for order in ([one, default], [default, one]):
        assert decide(order).won is (one if won else default)
    assert better(one, default) is won and not better(default, one)


def test_without_a_default_the_lower_median_with_enough_samples() -> None:
    rows = [Entry(9.0, "once", 0.0, 1), Entry(10.0, "b", 0.5, 50), Entry(10.01, "a", 0.1, 50)]
    assert decide(rows).won.name == "b", "not the first name of those that are tied"
    assert decide(rows[:1]).won.name == "once"


def test_of_several_defaults_the_fastest_counts() -> None:
    rows = [Entry(12.0, "a", 0, 9, True), Entry(10.0, "b", 0, 9, True), Entry(11.0, "c", 0, 9)]
    assert decide(rows).won.name == "b"


@given(fields)
@settings(max_examples=200, deadline=None)
def test_no_winner_is_slower_than_the_default(rows: list[Entry]) -> None:
    found = decide(rows)
    defaults = [each for each in rows if each.default]
    assert all(found.won.us <= each.us for each in defaults)
    if defaults and not found.won.default:
        assert better(found.won, min(defaults)) and found.won.n >= 3
    assert decide(rows[::-1]) == found and 1 <= found.tied <= len(rows)


def as_timing(entry: Entry, **changed: object) -> Timing:
    return timing(entry.name, entry.us, mad_us=entry.mad, n=entry.n, is_default=entry.default, **changed)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rule") / "cache.sqlite"


@given(fields, fields)
@settings(max_examples=40, deadline=None)
def test_the_view_and_the_store_follow_the_rule(file: Path, here: list[Entry], upgraded: list[Entry]) -> None:
    other = problem(tokens=1)
    with Store.open(file) as store:
        store._connection.execute("DELETE FROM timing")  # type: ignore[union-attr]
        store.put([as_timing(each) for each in here] + [failed("z")])
        store.put([as_timing(each, environment=UPGRADED) for each in upgraded] + [failed("z", problem=other)])
        kept = store.timings(status="ok")
        winners = {winner.environment: winner for winner in store.winners()}
    columns = "config, median_us, default_us, tied, candidates, runner_up_us, mad_us, n"
    for environment in (HERE, UPGRADED):
        rows = [t for t in kept if t.environment == environment]
        found = decide(Entry(t.median_us or 0, t.config.name, t.mad_us, t.n, t.is_default) for t in rows)
        told = (
            found.won.name, found.won.us, found.default_us, found.tied, len(rows), found.runner_up_us,
            found.won.mad or 0.0, found.won.n,
        )  # fmt: skip
        winner = winners[environment]
        assert told == (winner.config.name, *(getattr(winner, name) for name in columns.split(", ")[1:]))
        assert sql(file, f"SELECT {columns} FROM winner WHERE environment = '{environment.id}'") == [told]
        assert winner.margin is None or winner.margin >= 0


def test_several_defaults_and_nonsense_of_a_strangers_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with Store.open(path) as store:
        store.put([timing(name, us) for name, us in (("a", 12.0), ("b", 10.0), ("c", 11.0), ("d", 5.0), ("e", 6.0))])
    sql(
        path,
        "UPDATE timing SET is_default = 1 WHERE config IN ('a()', 'b()')",
        "UPDATE timing SET mad_us = 'none' WHERE config = 'd()'",
        "UPDATE timing SET median_us = 'fast' WHERE config = 'e()'",
    )
    sql(
        path,
        "INSERT INTO timing SELECT problem, environment, 'f', 'ok', 9e999, 0, 9, 0, 0, '', '', '' FROM timing LIMIT 1",
    )
    with Store.open(path, readonly=True) as store:
        (winner,) = store.winners()
    assert (winner.config, winner.default_us, winner.candidates, winner.tied) == (config("b"), 10.0, 3, 1)
    assert sql(path, "SELECT config, default_us, candidates, tied FROM winner") == [("b()", 10.0, 3, 1)]


def test_verify_flags_a_winner_behind_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moecache.verify.usable import verify

    with Store.open(tmp_path / "cache.sqlite") as store:
        store.put([timing("d", 120.0, is_default=True), timing("a", 100.0), timing("Z", 160.0, mad_us=400.0, n=3)])
        (winner,) = store.winners()
        assert winner.config.name == "a()" and verify(store).wrong == []
        slower = winner.model_copy(update={"median_us": 160.0})
        monkeypatch.setattr(Store, "winners", lambda self, **filters: [slower])
        assert verify(store).wrong == [f"{winner.problem.id} a(): it wins and gains -25.0 % over the default"]
