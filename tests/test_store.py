"""The store: rule, tiers, healing, foreign and later files, read-only folders, full disks, many processes."""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import samples
from samples import ELSEWHERE, HERE, UPGRADED, failed, prediction, problem, run, sql, timing

from moecache.schemas.config import Config, config
from moecache.schemas.errors import InvalidInput, StoreError
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Prediction, Timing, Winner
from moecache.settings import default_path
from moecache.store import Store, Tiers, schema
from moecache.store.rows import FILTERS, TIMING


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as store:
        yield store


@pytest.fixture(autouse=True)
def no_silent_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "unclosed database", ResourceWarning)  # that another test left
        yield


def won(*timings: Timing) -> Winner:
    """The winner of timings of one problem."""
    with Store.memory() as store:
        store.put(timings)
        (winner,) = store.winners()
        return winner


# --- writing and reading


def test_what_is_put_is_read(path: Path) -> None:
    put = [
        timing("a"),
        timing("b", 12.5, is_default=True),
        failed("c", "oom"),
        timing("a", problem=problem(tokens=1)),
    ]
    with Store.open(path) as store:
        assert (store.path, store.readonly) == (path, False)
        store.put(put)
    with Store.open(path, readonly=True) as store:
        assert store.timings() == [put[3], *put[:3]], "by problem, best first, failures last"
        assert store.timings(problem()) == put[:3]
        assert store.timings(problem(tokens=2)) == []
        assert store.check() == []


@given(st.lists(samples.timings, max_size=5))
@settings(max_examples=60)
def test_every_written_key_is_found_again(timings: list[Timing]) -> None:
    with Store.memory() as store:
        store.put(timings)
        last = {(t.problem.key, t.config.name, t.environment.id): t for t in timings}
        assert len(store.timings()) == len(last)
        for t in last.values():
            fresh = Problem(**t.problem.model_dump())  # as a caller would build it
            found = {(x.config.name, x.environment.id): x for x in store.timings(fresh)}
            same = found[t.config.name, t.environment.id]
            assert same.model_copy(update={"is_default": t.is_default}) == t
        usable = [t for t in last.values() if t.status == "ok"]
        for t in usable:
            answers = Tiers(store, []).winners(t.environment)
            winner, tier, _ = answers.get(Problem(**t.problem.model_dump()).key)
            assert (winner.problem, winner.environment, tier) == (t.problem, t.environment, "measured")
        assert {w.problem.key for w in store.winners()} == {t.problem.key for t in usable}
        assert store.check() == []


def test_put_replaces_the_same_problem_config_and_environment(store: Store) -> None:
    store.put([timing("a", 10.0), timing("b", 11.0)])
    store.put([timing("a", 9.0), timing("a", 8.0, environment=UPGRADED), failed("b")])
    assert {(t.config.variant, t.median_us, t.environment) for t in store.timings()} == {
        ("a", 9.0, HERE),
        ("b", None, HERE),
        ("a", 8.0, UPGRADED),
    }


def test_put_is_all_or_nothing(store: Store) -> None:
    with pytest.raises(InvalidInput, match="64 bits"):
        store.put([timing("a"), timing("b", problem=problem(units=2**70))])
    assert store.timings() == [] and store.stats()["problems"] == 0


def test_filters(store: Store) -> None:
    store.put([timing("a", problem=problem(tokens=t, arch=arch)) for t in (1, 16, 256) for arch in ("sm_90", "gfx942")])
    store.put([failed("b"), timing("a", environment=UPGRADED)])
    assert len(store.timings()) == 8
    assert len(store.timings(tokens=16)) == 2
    assert len(store.timings(tokens=[1, 16], arch="sm_90")) == 2
    assert len(store.timings(tokens=(1, 16), arch=None)) == 4
    assert [t.config.variant for t in store.timings(status="raised")] == ["b"]
    assert len(store.timings(config="a()", environment=UPGRADED.id)) == 1
    assert store.timings(problem(), op="grouped_gemm") == [] == store.timings(tokens=[])
    assert [w.problem.tokens for w in store.winners(arch="sm_90", environment=HERE.id)] == [1, 16, 256]
    assert [w.problem.arch for w in store.winners(key=problem(tokens=1, arch="gfx942").key)] == ["gfx942"]
    for call in (store.timings, store.winners):
        with pytest.raises(InvalidInput, match="'tokns' is no filter; allowed are key, op, vendor"):
            call(tokns=1)
    with pytest.raises(InvalidInput, match="'status' is no filter"):
        store.winners(status="ok")


def test_columns_are_those_of_the_values(store: Store, path: Path) -> None:
    def columns(table: str) -> list[str]:
        return [row[1] for row in sql(path, f"PRAGMA table_info({table})")]

    assert columns("problem") == ["id", "key", *Problem.model_fields]
    assert columns("config") == ["name", *Config.model_fields]
    assert columns("environment") == ["id", *Environment.model_fields]
    assert sorted(columns("timing")) == sorted(Timing.model_fields) and TIMING[:3] == (
        "problem",
        "config",
        "environment",
    )
    assert columns("prediction") == list(Prediction.model_fields)
    assert set(FILTERS) <= {"key", "environment", "config", "status", *Problem.model_fields}


def test_the_tables_read_well(store: Store, path: Path) -> None:
    store.put([timing("a", 8.0), timing("b", 10.0, is_default=True), failed("c")])
    assert sql(path, "SELECT op, tokens, dims, config, median_us, round(margin, 3), tied, candidates FROM winner") == [
        ("moe_sort", 256, '{"block_m": 64}', "a()", 8.0, 0.25, 1, 2)
    ]
    ranked = "SELECT config, status, round(times_best, 2), reason FROM candidate ORDER BY median_us"
    assert sql(path, ranked) == [
        ("c()", "raised", None, "raised: out of luck"), ("a()", "ok", 1.0, ""), ("b()", "ok", 1.25, ""),
    ]  # fmt: skip
    assert sql(path, "PRAGMA application_id", "PRAGMA user_version") == [(schema.FORMAT,)]
    assert sql(path, "PRAGMA application_id") == [(int.from_bytes(b"moec", "big"),)]


# --- the rule


@pytest.mark.parametrize(
    ("timings", "winner", "tied"),
    [
        ([("b", 10.0, 0, False), ("a", 9.0, 0, False)], "a", 1),  # clearly faster
        ([("d", 10.0, 0, True), ("a", 9.91, 0, False)], "d", 2),  # within 1 %: the default stays
        ([("d", 10.0, 0, True), ("a", 9.90, 0, False)], "a", 1),  # beyond 1 %
        ([("b", 9.95, 0, False), ("a", 10.0, 0, False)], "b", 2),  # within 1 %, no default: the lower
        (
            [("d", 10.0, 0, True), ("b", 9.0, 0, False), ("a", 9.05, 0, False)],
            "b",
            2,
        ),  # the default is not tied
        ([("d", 10.0, 1.0, True), ("a", 9.5, 1.0, False)], "d", 2),  # 5 % off, but within the noise
        ([("d", 10.0, 0.5, True), ("a", 9.5, 0.5, False)], "a", 1),  # 5 % off, and not
        ([("a", 10.0, 0, False)], "a", 1),  # alone
        ([("B", 10.0, 0, False), ("a", 10.0, 0, False)], "B", 2),  # text order: capitals first, as in Python
    ],
)
def test_the_tie_band(timings: list[tuple[str, float, float, bool]], winner: str, tied: int) -> None:
    rows = [timing(name, us, mad_us=mad, is_default=default) for name, us, mad, default in timings]
    for order in (rows, rows[::-1]):
        found = won(*order)
        assert (found.config.variant, found.tied, found.candidates) == (winner, tied, len(rows))


def test_what_the_winner_reports() -> None:
    found = won(
        timing("d", 12.0, is_default=True), timing("a", 9.0, mad_us=0.01, n=30), timing("b", 9.05),
        timing("c", 11.0), timing("z", 10.9), failed("x"),
    )  # fmt: skip
    assert found.config == config("a") and (found.median_us, found.mad_us, found.n) == (9.0, 0.01, 30)
    assert (found.default_us, found.runner_up_us, found.tied, found.candidates) == (12.0, 10.9, 2, 5)
    assert found.margin == pytest.approx(12 / 9 - 1)
    assert found.measured_at == timing("a").measured_at
    assert won(timing("a"), failed("d", is_default=True)).default_us is None


def test_winners_are_per_problem_and_environment_in_a_readable_order(store: Store) -> None:
    sizes = (4096, 1, 256)
    store.put([timing("a", problem=problem(tokens=t)) for t in sizes] + [timing("b", environment=UPGRADED)])
    assert [(w.problem.tokens, w.config.variant) for w in store.winners(environment=HERE.id)] == [
        (1, "a"), (256, "a"), (4096, "a"),
    ]  # fmt: skip
    assert len(store.winners()) == 4


def test_a_problem_has_one_default(store: Store) -> None:
    store.put([timing("old", is_default=True)])
    store.put([timing("new", 10.1, is_default=True), timing("c")])
    assert [t.config.variant for t in store.timings() if t.is_default] == ["new"]
    with Store.memory() as earlier:
        earlier.put([timing("older", is_default=True, measured_at="2020-01-01T00:00:00Z")])
        assert store.merge(earlier) == 1
    assert [t.config.variant for t in store.timings() if t.is_default] == ["new"]


def test_an_ok_without_a_time_never_wins(store: Store) -> None:
    store.put([timing("a", None), timing("b", 10.0)])
    (winner,) = store.winners()
    assert (winner.config.variant, winner.candidates) == ("b", 1)
    assert store.check() == [f"timing of problem 1, a(), environment {HERE.id}: has status ok and no time"]


# --- wanted


def test_wanted_counts(store: Store) -> None:
    one, other = problem(tokens=1), problem(tokens=16)
    for met in (one, other, other):
        store.want([met])
    assert store.wanted() == [(other, 2), (one, 1)]
    store.unwant([other, problem(tokens=99)])
    assert store.wanted() == [(one, 1)]
    assert store.timings() == [] == store.winners()


# --- merge, export


def test_merge_takes_what_is_newer_or_new(store: Store) -> None:
    store.put([timing("a", 10.0), timing("b", 10.0), timing("c", 10.0), timing("n", 10.0, measured_at="")])
    with Store.memory() as other:
        other.put(
            [
                timing("a", 1.0, measured_at="2026-11-20T13:00:00+00:00"),
                timing("b", 1.0, measured_at="2026-11-20T12:30:00+02:00"),  # 10:30 UTC
                timing("c", 1.0, measured_at="not a date"),
                timing("d", 1.0, problem=problem(tokens=1)),
                timing("n", 1.0, measured_at="2001-01-01"),
            ]
        )
        assert store.merge(other) == 3
        assert store.merge(other) == 0
    assert {t.config.variant: t.median_us for t in store.timings()} == {
        "a": 1,
        "b": 10,
        "c": 10,
        "d": 1,
        "n": 1,
    }


def test_export_makes_a_file_to_ship(store: Store, tmp_path: Path) -> None:
    store.put([timing("a"), timing("b", 9.0), timing("a", problem=problem(tokens=1)), failed("c")])
    store.want([problem(tokens=2)])
    shipped = tmp_path / "shipped" / "h200.sqlite"
    assert store.export_file(shipped, tokens=256) == 3
    assert [file.name for file in shipped.parent.iterdir()] == ["h200.sqlite"]
    assert shipped.read_bytes()[18:20] == b"\x01\x01", "journal mode DELETE"
    assert sql(shipped, "PRAGMA application_id") == [(schema.APPLICATION_ID,)]
    assert sql(shipped, "PRAGMA user_version") == [(schema.FORMAT,)]
    with Store.open(shipped, shipped=True) as copy:
        assert copy.timings() == store.timings(tokens=256) and copy.wanted() == [] and copy.check() == []


def test_export_replaces_an_older_export_and_nothing_else(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "out.sqlite"
    store.put([timing("a")])
    assert store.export_file(target) == 1
    store.put([timing("b")])
    assert store.export_file(target) == 2
    with pytest.raises(StoreError, match="is the cache file itself"):
        store.export_file(tmp_path / "x" / ".." / "cache.sqlite")
    notes = tmp_path / "notes.txt"
    notes.write_text("buy milk")
    with pytest.raises(StoreError, match=r"notes\.txt"):
        store.export_file(notes)
    assert notes.read_text() == "buy milk"


def test_equal_content_exports_as_equal_bytes(tmp_path: Path) -> None:
    """Whenever it is made, and whatever order the sets of that process have."""
    code = """
import os, sys
from samples import *
from moecache.store import Store
with Store.memory() as store:
    store.put([timing(v, problem=problem(tokens=t)) for t in (1, 16, 256) for v in "abc"])
    store.predict([prediction(v, problem=problem(tokens=t)) for t, v in ((1, "a"), (2, "x"), (4, "y"))])
    store.export_file(sys.argv[1])
print(hash("x"))
"""
    files = [tmp_path / f"{n}.sqlite" for n in range(3)]
    hashes = {run(code, file) for file in files}
    assert len(hashes) > 1, "the processes differ in nothing"
    assert len({file.read_bytes() for file in files}) == 1


# --- predictions


def test_predictions_are_read_as_written(store: Store) -> None:
    rows = [prediction("a"), prediction("b", device="NVIDIA H100"), prediction("a", problem=problem(tokens=1))]
    store.predict(rows)
    assert store.predictions() == [rows[2], rows[1], rows[0]] and store.predictions(problem()) == [rows[1], rows[0]]
    assert store.predictions(device="NVIDIA H200", tokens=256) == [rows[0]] and store.predictions(config="b()") == [
        rows[1]
    ]
    store.predict([prediction("c", 3.0)])
    assert store.predictions(problem())[1] == prediction("c", 3.0), "one for each problem and device"
    assert store.stats()["predictions"] == 3 and store.check() == []
    with pytest.raises(InvalidInput, match="'environment' is no filter"):
        store.predictions(environment=HERE.id)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="predicted_us"):
            prediction("a", wrong)


def test_a_prediction_is_never_taken_for_a_measurement(store: Store, path: Path) -> None:
    store.predict([prediction("a")])
    assert store.timings() == [] == store.winners() and len(Tiers(store, []).winners(HERE).values()) == 0
    assert sql(path, "SELECT * FROM winner") == [] == sql(path, "SELECT * FROM candidate")
    assert (store.stats()["winners"], store.stats()["timings"]) == (0, 0)
    store.put([timing("b", 50.0)])
    assert [w.config.variant for w in store.winners()] == ["b"] and store.winners()[0].candidates == 1


def test_predictions_travel_in_an_export_and_in_no_merge(store: Store, tmp_path: Path) -> None:
    store.predict([prediction("a"), prediction("b", problem=problem(tokens=1))])
    store.put([timing("c")])
    out = tmp_path / "out.sqlite"
    assert store.export_file(out, tokens=1) == 0
    with Store.open(out, shipped=True) as copy:
        assert copy.predictions() == [prediction("b", problem=problem(tokens=1))] and copy.stats()["problems"] == 1
    assert store.export_file(out, environment=HERE.id) == 1
    with Store.open(out, shipped=True) as copy:
        assert copy.predictions() == [], "they have no environment"
    with Store.memory() as other:
        assert other.merge(store) == 1 and other.predictions() == []


def test_prune_leaves_predictions(store: Store) -> None:
    store.predict([prediction("a"), prediction("b", problem=problem(tokens=1))])
    store.put([failed("c"), failed("a")])
    assert store.prune(failed=True) == 2
    assert len(store.predictions()) == 2 and store.stats()["configs"] == 2 and store.check() == []


def test_a_file_whose_predictions_are_no_table_is_damaged(path: Path) -> None:
    Store.open(path).close()
    sql(path, "DROP TABLE prediction", "CREATE VIEW prediction AS SELECT 1 AS problem")
    with pytest.raises(StoreError, match="prediction are not all there"):
        Store.open(path, shipped=True)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("UPDATE prediction SET predicted_us = -1", "prediction of problem 1 for NVIDIA H200: not valid"),
        ("UPDATE prediction SET predicted_us = 'fast'", "prediction of problem 1 for NVIDIA H200: not valid"),
        ("UPDATE prediction SET device = ''", "prediction of problem 1 for : not valid"),
        ("UPDATE problem SET tokens = 512", "its key is not the key of its columns"),
        ("UPDATE config SET variant = 'z'", "its name is not the name of its columns"),
    ],
)
def test_a_prediction_that_does_not_hold_is_left_out_and_told(path: Path, damage: str, told: str) -> None:
    with Store.open(path) as store:
        store.predict([prediction("a")])
    sql(path, damage)
    with Store.open(path, readonly=True) as store:
        assert store.predictions() == [] and any(told in line for line in store.check()), store.check()


# --- upkeep


def test_prune(store: Store) -> None:
    store.put([timing("a"), failed("b"), timing("c", code="0123456789ab"), timing("a", problem=problem(op="other"))])
    assert store.prune() == 1 and {t.config.variant for t in store.timings()} == {"a", "b"}
    assert store.prune(failed=True) == 1 and len(store.timings()) == 2 and store.check() == []
    assert [store.stats()[name] for name in ("problems", "configs", "environments")] == [2, 1, 1]


def test_prune_keeps_what_is_wanted_and_gives_space_back(store: Store, path: Path) -> None:
    long = {"reason": "x" * 500}
    store.put([failed("a").model_copy(update={"problem": problem(tokens=t), **long}) for t in range(400)])
    store.want([problem(tokens=7)])
    before = path.stat().st_size
    assert store.prune(failed=True) == 400
    assert path.stat().st_size < before / 4
    assert store.wanted() == [(problem(tokens=7), 1)]


def test_stats(store: Store, path: Path) -> None:
    store.put([timing("a"), timing("b"), failed("c"), timing("a", problem=problem(arch="gfx942"))])
    store.want([problem(tokens=1)])
    figures = store.stats()
    assert figures["path"] == str(path) and figures["bytes"] == path.stat().st_size
    assert figures["format"] == schema.FORMAT and figures["readonly"] is False
    assert figures["journal"] == "delete"
    counts = {name: figures[name] for name in ("problems", "timings", "winners", "configs", "environments", "wanted")}
    assert counts == {"problems": 3, "timings": 4, "winners": 2, "configs": 3, "environments": 1, "wanted": 1}
    assert figures["status"] == {"ok": 3, "raised": 1} and figures["ops"] == ["moe_sort"]
    assert figures["archs"] == ["gfx942", "sm_90"]
    assert figures["oldest"] == figures["newest"] == timing("a").measured_at
    assert json.dumps(figures)


# --- rows that do not hold

_KEY, _NAME = "its key is not the key of its columns", "its name is not the name of its columns"
DAMAGE = {
    "UPDATE problem SET tokens = 512": _KEY,
    "UPDATE problem SET key = 'op=x'": _KEY,
    "UPDATE problem SET vendor = 'intel'": _KEY,
    "UPDATE problem SET dims = '{'": _KEY,
    "UPDATE problem SET dims = 'null'": _KEY,
    "UPDATE problem SET units = -1": _KEY,
    "UPDATE problem SET op = CAST(x'ff80' AS TEXT)": _KEY,
    "UPDATE problem SET arch = x'ff80'": _KEY,
    "UPDATE config SET params = '{\"block\": 3}'": _NAME,
    "UPDATE config SET params = '[[[['": _NAME,
    "UPDATE config SET extra = '7'": _NAME,
    "UPDATE config SET variant = 'b'": _NAME,
    "DELETE FROM config": "refers to a missing config",
    "DELETE FROM environment": "refers to a missing environment",
    "UPDATE timing SET mad_us = 'low'": "not valid, so not used",
    "UPDATE timing SET measured_at = x'00ff'": "not valid, so not used",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("shipped", [False, True])
def test_a_row_that_does_not_hold_is_a_miss(path: Path, damage: str, shipped: bool) -> None:
    good = timing("g", problem=problem(tokens=1), config=config("g"), environment=ELSEWHERE)
    with Store.open(path) as store:
        store.put([timing("a")])
    sql(path, "PRAGMA foreign_keys = OFF", damage)
    with Store.open(path) as store:
        store.put([good])
    with Store.open(path, readonly=True, shipped=shipped) as store:
        assert store.timings(tokens=[256, 1]) in ([good], []) and store.timings(problem(tokens=1)) == [good]
        assert [w.config.variant for w in store.winners()] == ["g"]
        assert any(DAMAGE[damage] in line for line in store.check()), store.check()
        with Store.memory() as own:
            answers = Tiers(own, [store]).winners(HERE)
        assert answers.get(problem().key) is None and [each[0].problem for each in answers.values()] == [good.problem]
    with Store.open(path) as store:
        store.put([timing("a")])
        assert store.timings(problem()) == [timing("a")], "measured again, the row is put right"


def test_a_hostile_file_can_only_name_configs(path: Path, tmp_path: Path) -> None:
    """Its views, triggers and tables of other kinds are not run; deep JSON and huge numbers are misses."""
    with Store.open(path) as store:
        store.put([timing("a"), timing("b", 9.0, problem=problem(tokens=1))])
    sql(
        path,
        "DROP VIEW winner",
        "CREATE VIEW winner AS WITH RECURSIVE f(x) AS (SELECT 1 UNION ALL SELECT x FROM f) SELECT x FROM f",
        f"UPDATE problem SET dims = '{'[' * 50_000}' WHERE tokens = 256",
    )
    with Store.open(path, shipped=True) as store:
        assert [w.config.variant for w in store.winners()] == ["b"]
    sql(path, "ALTER TABLE timing RENAME TO hidden", "CREATE VIEW timing AS SELECT * FROM hidden")
    with pytest.raises(StoreError, match="are not all there"):
        Store.open(path, shipped=True)


# --- tiers


def test_the_user_file_answers_before_shipped_ones_and_measured_before_unverified(tmp_path: Path) -> None:
    with Store.memory() as user, Store.memory() as first, Store.memory() as second:
        one, two, three, four = (problem(tokens=t) for t in (1, 2, 4, 8))
        user.put([timing("user", problem=one), timing("user", problem=two, environment=UPGRADED)])
        first.put([timing("first", problem=p) for p in (one, two)])
        first.put([timing("first", problem=three, environment=ELSEWHERE, measured_at="2026-12-01")])
        first.put([timing("same-device", problem=three, environment=UPGRADED)])
        second.put([timing("second", problem=p) for p in (one, two)])
        second.put([timing("second", problem=p, environment=UPGRADED) for p in (three, four)])
        answers = Tiers(user, [first, second]).winners(HERE)
        found = {winner.problem.tokens: (winner.config.variant, tier) for winner, tier, _ in answers.values()}
        assert found == {
            1: ("user", "measured"),
            2: ("first", "measured"),
            4: ("same-device", "unverified"),
            8: ("second", "unverified"),
        }
        assert len(answers.values()) == 4 and answers.get(problem().key) is None


def test_of_two_other_environments_the_latest_answers() -> None:
    with Store.memory() as user:
        newer = UPGRADED.model_copy(update={"torch": "2.9"})
        user.put([timing("old", environment=UPGRADED), timing("new", environment=newer, measured_at="2026-12-01")])
        winner, tier, source = Tiers(user, []).winners(HERE).get(problem().key)
        assert (winner.config.variant, tier, source) == ("new", "unverified", "memory")


def test_a_bad_row_lets_the_next_file_answer(path: Path, tmp_path: Path) -> None:
    with Store.open(path) as user, Store.memory() as behind:
        user.put([timing("a")])
        behind.put([timing("b")])
        sql(path, "UPDATE config SET params = '?'")
        winner, tier, source = Tiers(user, [behind]).winners(HERE).get(problem().key)
        assert (winner.config.variant, tier, source) == ("b", "measured", "memory")


def test_answers_can_be_overwritten_and_forgotten() -> None:
    with Store.memory() as user:
        user.put([timing("a"), timing("a", problem=problem(tokens=1))])
        answers = Tiers(user, []).winners(HERE)
        mine = answers.get(problem().key)
        answers.put("x", mine)
        assert set(answers.keys()) == {problem().key, problem(tokens=1).key, "x"} and answers.get("x") is mine
        answers.put(problem(tokens=1).key, None)
        assert answers.get(problem(tokens=1).key) is None and len(answers.values()) == 2
        assert answers.get("never") is None


def test_tiers_write_to_the_user_file_alone(path: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "made.sqlite") as made:
        made.put([timing("shipped")])
        made.export_file(tmp_path / "shipped.sqlite")
    shipped = tmp_path / "shipped.sqlite"
    before = shipped.read_bytes()
    tiers = Tiers.open(path, [shipped])
    tiers.put([timing("mine", 9.0)])
    tiers.write(lambda store: store.want([problem(tokens=1)]))
    assert tiers.user.wanted() == [(problem(tokens=1), 1)]
    tiers.write(lambda store: store.unwant([problem(tokens=1)]))
    assert tiers.user.wanted() == []
    winner, tier, source = tiers.winners(HERE).get(problem().key)
    assert (winner.config.variant, tier, source) == ("mine", "measured", str(path))
    assert tiers.winners(HERE, tokens=[4]).values() == []
    tiers.close()
    assert shipped.read_bytes() == before
    with Store.open(path) as store:
        assert [t.config.variant for t in store.timings()] == ["mine"]


def test_files_that_cannot_be_used_are_left_out_with_a_warning(path: Path, tmp_path: Path) -> None:
    text, gone = tmp_path / "notes.txt", tmp_path / "gone.sqlite"
    text.write_text("buy milk")
    with pytest.warns(RuntimeWarning) as said:
        tiers = Tiers.open(path, [text, gone])
    assert [("notes.txt" in str(w.message), "gone.sqlite" in str(w.message)) for w in said] == [
        (1, 0),
        (0, 1),
    ]
    assert tiers.shipped == [] and tiers.user.path == path
    tiers.close()


def test_memory_when_there_is_no_user_file() -> None:
    tiers = Tiers.open(None)
    tiers.put([timing("a")])
    assert tiers.user.path is None and tiers.winners(HERE).get(problem().key)[2] == "memory"
    tiers.close()


def test_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_path() == tmp_path / ".cache" / "moecache" / "moecache.sqlite"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_path() == tmp_path / "x" / "moecache" / "moecache.sqlite"


# --- start-up


def test_the_store_loads_nothing_heavy() -> None:
    heavy = run("""
import sys
from moecache.store import *
print(*sorted({"torch", "triton", "numpy", "pandas", "sqlite_utils"} & set(sys.modules)))
""")
    assert heavy == ""


def test_reading_an_existing_file_loads_nothing_heavy(path: Path) -> None:
    with Store.open(path) as store:
        store.put([timing("a")])
    heavy = run(
        """
import sys
from pathlib import Path
from moecache.store import *
tiers = Tiers.open(Path(sys.argv[1]))
assert len(tiers.user.winners()) == 1
tiers.put([])
print(*sorted({"torch", "triton", "numpy", "pandas", "sqlite_utils"} & set(sys.modules)))
""",
        str(path),
    )
    assert heavy == ""
