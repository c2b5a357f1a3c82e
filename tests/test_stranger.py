"""A file from a stranger is data: what it says is shown as text, what it holds is bounded, and it runs nothing."""

import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from samples import HERE, UPGRADED, problem, sql, timing

from moecache.cli import app
from moecache.predict.learned import parse
from moecache.predict.parameters import OWN, VERSION
from moecache.schemas.device import KNOWN
from moecache.schemas.errors import InvalidInput, StoreError, printable
from moecache.store import Store, Tiers
from moecache.store.rows import current
from moecache.store.trying import broken_off

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eab\u200f\ufeff\u2066\x00x\r\nmoecache: no findings\u2028y\tz\x85\ud83d"

os.umask(UMASK := os.umask(0))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of this machine, no file of the package."""
    for name in [name for name in os.environ if name.startswith("MOECACHE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("moecache.settings.PREBUILT", tmp_path / "prebuilt")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "cache.sqlite"
    with Store.open(path) as store:
        store.put([timing("a", 8.0), timing("b", is_default=True)])
    return path


def run(*arguments: object, code: int | None = 0) -> Result:
    done = CliRunner().invoke(app, [str(each) for each in arguments], prog_name="moecache")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert code is None or done.exit_code == code, (arguments, done.exit_code, done.output)
    return done


# --- what is shown


def test_printable_is_one_line_without_hidden_characters() -> None:
    shown = printable(EVIL)
    assert shown.isprintable() and len(shown) == len(EVIL) and "no findings" in shown
    plain = "12 µs, 1.05×, naïve, 漢字"
    assert printable(plain) == plain and printable(3) == "3"


@pytest.mark.parametrize("wanted", [("ls",), ("explain", "--key", "tokens=256"), ("verify",), ("report",)])
def test_what_a_file_says_is_text_wherever_it_is_shown(path: Path, tmp_path: Path, wanted: tuple[str, ...]) -> None:
    text = EVIL.replace("\ud83d", "")  # SQLite takes no half of a pair
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE timing SET reason = ?, measured_at = ?", [text, text])
        connection.execute("INSERT INTO environment (id, device_name) VALUES (?, ?)", [text, text])
        connection.execute("UPDATE environment SET device_name = ?", [text])
        connection.execute("INSERT INTO problem (id, key, op, vendor, arch, units, tokens, experts, topk)"
                           " VALUES (77, ?, ?, ?, ?, 1, 1, 1, 1)", [text] * 4)  # fmt: skip
        connection.execute("INSERT INTO config (name, variant) VALUES (?, ?)", [text, text])
    command = ("report", tmp_path / "x.html") if wanted == ("report",) else wanted
    done = run(*command, "--db", path, code=None)
    lines = (done.stdout + done.stderr).split("\n")
    assert all(line.isprintable() for line in lines) and not any(line.startswith("moecache: no f") for line in lines)
    assert len(lines) > 1
    if wanted[0] in ("ls", "explain"):
        printed = run(*wanted, "--db", path, "--json", code=None).stdout
        assert all(line.isprintable() for line in printed.split("\n")) and json.loads(printed) is not None


def test_errors_are_one_printable_line() -> None:
    for error in (InvalidInput(f"{EVIL} is no value"), StoreError(f"cache file {EVIL}: damaged")):
        assert str(error).isprintable() and "no findings" in str(error)


# --- what runs, and how much


ODD = {
    "trigger": "CREATE TRIGGER spy AFTER INSERT ON timing BEGIN DELETE FROM timing; END",
    "temp-like trigger": "CREATE TRIGGER spy INSTEAD OF INSERT ON winner BEGIN SELECT 1; END",
    "generated column": "ALTER TABLE problem ADD COLUMN g TEXT GENERATED ALWAYS AS (hex(zeroblob(100000))) VIRTUAL",
    "check": "ALTER TABLE timing ADD COLUMN c TEXT CHECK (length(hex(zeroblob(100000))) > 0)",
    "collation": "ALTER TABLE timing ADD COLUMN c TEXT COLLATE NOCASE",
    "default": "CREATE TABLE more (c TEXT DEFAULT (hex(randomblob(9))))",
    "index of an expression": "CREATE INDEX slow ON timing (length(reason))",
    "partial index": "CREATE INDEX slow ON timing (reason) WHERE n > 3",
    "another view": "CREATE VIEW more AS WITH RECURSIVE f(x) AS (SELECT 1 UNION ALL SELECT x FROM f) SELECT x FROM f",
    "a virtual table": "CREATE VIRTUAL TABLE more USING fts5(c)",
    "a table without end": f"CREATE TABLE more ({', '.join(f'c{k} TEXT' for k in range(1500))})",
    "a conflict clause": "CREATE TABLE more (c TEXT UNIQUE ON CONFLICT REPLACE)",
}


@pytest.mark.parametrize("how", ODD)
def test_a_file_with_a_schema_of_its_own_is_left_as_it_is(path: Path, tmp_path: Path, how: str) -> None:
    sql(path, ODD[how])
    before = path.read_bytes()
    for mode in ({}, {"readonly": True}, {"shipped": True}):
        with pytest.raises(StoreError, match=r"cache\.sqlite holds \w+.*left as it is"):
            Store.open(path, **mode)
    with pytest.warns(RuntimeWarning, match="left as it is") as told:
        tiers = Tiers.open(path, [path])
    tiers.put([timing("c")])
    assert tiers.user.path is None and len(tiers.winners(HERE).values()) == 1 and len(told) == 2
    tiers.close()
    assert path.read_bytes() == before and [file.name for file in tmp_path.glob("cache*")] == ["cache.sqlite"]


def test_what_sqlite_tools_add_in_plain_words_is_read(path: Path) -> None:
    notes = 'CREATE TABLE "notes" ("id" INTEGER PRIMARY KEY, text TEXT)'
    index = "CREATE INDEX by_status ON timing (status, n)"
    sql(path, index, notes, "ALTER TABLE timing ADD COLUMN watts REAL DEFAULT 0.5", "ANALYZE")
    with Store.open(path) as store:
        store.put([timing("c")])
        assert len(store.timings()) == 3 and store.check() == []


@pytest.mark.parametrize("name", ["environment", "config"])
def test_columns_of_problems_that_are_called_like_a_winners_change_no_winner(path: Path, name: str) -> None:
    sql(path, f"ALTER TABLE problem ADD COLUMN {name} TEXT DEFAULT 'other'")
    tiers = Tiers.open(None, [path])
    winner, tier, _ = tiers.winners(HERE).get(problem().key) or pytest.fail("it has no winner")
    tiers.close()
    assert (winner.config.variant, winner.environment, tier) == ("a", HERE, "measured")


def test_a_view_under_our_name_is_not_run(path: Path) -> None:
    endless = "WITH RECURSIVE f(x) AS (SELECT 1 UNION ALL SELECT x FROM f) SELECT x FROM f"
    sql(path, "DROP VIEW winner", f"CREATE VIEW winner AS {endless}")
    with Store.open(path) as store:
        assert len(store.winners()) == 1 and store.check() == [] and store.stats()["timings"] == 2


def test_tables_of_notes_that_are_not_ours_say_nothing(path: Path) -> None:
    sql(path, "CREATE TABLE learned (op TEXT)", "CREATE TABLE receipt (request TEXT)")
    tiers = Tiers.open(path)
    with pytest.warns(RuntimeWarning, match="no such column.*it is left out"):
        assert tiers.learned("fused_moe", KNOWN["h100"]) == []
    with pytest.raises(StoreError, match="no such column"):
        tiers.user.receipt("asked")
    assert len(tiers.user.timings()) == 2 and tiers.user.check() == []
    tiers.close()


@pytest.mark.parametrize("suffix", [".sqlite", ".db", ".txt", ""])
@pytest.mark.parametrize(
    "content", [b"buy milk " * 100, bytes(20_000), b"\x93garbage" * 999, b"SQLite format 3\0", b"{}"]
)
def test_a_file_that_is_none_of_sqlites_is_left_as_it_is(tmp_path: Path, suffix: str, content: bytes) -> None:
    mine = tmp_path / f"mine{suffix}"
    mine.write_bytes(content)
    with pytest.raises(StoreError, match=r"mine.* is no cache file .*left as it is"):
        Store.open(mine)
    with pytest.warns(RuntimeWarning, match="left as it is") as told:
        tiers = Tiers.open(mine)
    tiers.put([timing("a")])
    assert len(told) == 1 and tiers.user.path is None and len(tiers.winners(HERE).values()) == 1
    tiers.close()
    assert mine.read_bytes() == content and [file.name for file in tmp_path.iterdir()] == [mine.name]


def test_a_file_that_holds_too_much_is_left_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(path) as store:
        store.put([timing("a", problem=problem(tokens=1 << k)) for k in range(16)])
    for limit, value in (("rows.MOST_ROWS", 15), ("rows.MOST_TEXT", 1000), ("database.MOST_BYTES", 5000),
                         ("database.MOST_STEPS", 0), ("database.LONGEST", 50)):  # fmt: skip
        with monkeypatch.context() as less:
            less.setattr(f"moecache.store.{limit}", value)
            less.setattr("moecache.store.rows.PART", 4)
            if "STEPS" in limit:
                less.setattr("moecache.store.database.PER_STEP", 100)
            with pytest.warns(RuntimeWarning, match=r"cache\.sqlite.*left out"):
                tiers = Tiers.open(None, [path])
                assert len(tiers.winners(HERE).values()) == 0
            tiers.close()
    with Store.open(path) as store:
        assert len(store.winners()) == 16


def test_what_is_read_of_a_problem_does_not_grow_with_the_file(path: Path) -> None:
    """Twenty thousand environments and configs cost the others nothing."""
    rows = [(f"id{k}", f"device {k}") for k in range(20_000)]
    with sqlite3.connect(path) as connection:
        connection.executemany("INSERT INTO environment (id, device_name) VALUES (?, ?)", rows)
        connection.executemany("INSERT INTO config (name, variant) VALUES (?, ?)", rows)
    with Store.open(path) as store:
        found = store.winner_rows()
        assert len(found.environments) == len(found.configs) == 1
        assert [row.environment for row in store.timings(problem())] == [HERE, HERE]


def test_what_is_asked_of_a_problem_costs_the_same_however_many_are_stored(tmp_path: Path) -> None:
    """In instructions of SQLite's, not in time."""

    def steps(count: int) -> int:
        with Store.open(tmp_path / f"{count}.sqlite") as store:
            store.put([timing("a", problem=problem(experts=each + 1)) for each in range(count)])
            taken = []
            with store.reading() as connection:
                connection.set_progress_handler(lambda: taken.append(1), 1)
                connection.execute(f"SELECT * FROM timing WHERE problem = 1 AND {current()}").fetchall()
                connection.set_progress_handler(None, 1)
            return len(taken)

    assert steps(2000) < steps(20) + 50


def test_the_best_of_many_environments_is_found_without_asking_them_all(tmp_path: Path) -> None:
    many = [HERE.model_copy(update={"driver": str(k)}) for k in range(300)]
    with Store.open(tmp_path / "many.sqlite") as store:
        store.put([timing("a", problem=problem(tokens=k + 1), environment=each) for k, each in enumerate(many)])
        answers = Tiers(Store.memory(), [store]).winners(many[7])
        assert [answers.get(problem(tokens=at).key)[1] for at in (8, 9)] == ["measured", "unverified"]
        assert len(answers.values()) == 300


# --- dates


@pytest.mark.parametrize(
    "date", ["2999-01-01T00:00:00+00:00", "9999-12-31", "now", "2460000", "12:00", "zzz", "", "-1"]
)
def test_a_date_that_cannot_be_wins_nothing(tmp_path: Path, date: str) -> None:
    good, bad = timing("a", 9.0), timing("a", 1.0, measured_at=date)
    with Store.open(tmp_path / "mine.sqlite") as mine, Store.memory() as other:
        mine.put([good])
        other.put([bad])
        assert mine.merge(other) == 0 and mine.timings() == [good]
        assert other.merge(mine) == 1 and other.timings() == [good], "it is put right by the next that has a date"
        mine.put([bad])
        assert mine.stats()["newest"] is None
    late = Store.memory()
    late.put([timing("b", 1.0, measured_at=date, environment=UPGRADED)])
    late.put([timing("a", 9.0, environment=UPGRADED.model_copy(update={"torch": "2.9"}))])
    assert Tiers(late, []).winners(HERE).get(problem().key)[0].config.variant == "a"


# --- what is written


TARGETS = {"ship": "out.sqlite", "report": "out.html"}


def write(path: Path, kind: str, to: Path, code: int | None = 0) -> Result:
    return run("report" if kind == "report" else "export", to, "--db", path, code=code)


@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_written_replaces_its_own_kind_alone(path: Path, tmp_path: Path, kind: str) -> None:
    to = tmp_path / TARGETS[kind]
    for content in (b"my notes", b"\x00\xff" * 500, b"{}", b"<html><title>mine</title></html>"):
        to.write_bytes(content)
        done = write(path, kind, to, code=1)
        assert to.name in done.stderr and to.read_bytes() == content
    to.unlink()
    for _ in range(2):
        write(path, kind, to)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["cache.sqlite", to.name])
    assert to.stat().st_mode & 0o777 == 0o666 & ~UMASK


@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_written_goes_through_no_link(path: Path, tmp_path: Path, kind: str) -> None:
    to, precious, made = tmp_path / TARGETS[kind], tmp_path / "precious", tmp_path / "made"
    precious.write_text("keep me")
    to.symlink_to(precious)
    assert write(path, kind, to, code=1).stderr and precious.read_text() == "keep me" and to.is_symlink()
    to.unlink()
    write(path, kind, to)
    to.rename(made)
    before = made.read_bytes()
    to.symlink_to(made)
    with Store.open(path) as store:
        store.put([timing("z")])
    write(path, kind, to)
    assert not to.is_symlink() and made.read_bytes() == before != to.read_bytes()


@pytest.mark.parametrize("kind", TARGETS)
def test_what_cannot_be_written_leaves_the_older_one(
    path: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / TARGETS[kind]
    write(path, kind, to)
    before = to.read_bytes()

    def full(_: object) -> None:
        raise OSError(28, "No space left on device", str(to))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        assert "space" in write(path, kind, to, code=1).stderr
    assert to.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["cache.sqlite", to.name])


def test_a_planted_part_is_not_followed(path: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    for part in (f"out.sqlite.part-{os.getpid()}", "out.sqlite.part"):
        (tmp_path / part).symlink_to(precious)
    write(path, "ship", tmp_path / "out.sqlite")
    assert precious.read_text() == "keep me"


def test_an_export_into_a_loop_of_links_says_so(path: Path, tmp_path: Path, name: str = "loop.sqlite") -> None:
    (tmp_path / name).symlink_to(name)
    done = run("export", tmp_path / name, "--db", path, code=1)
    assert name in done.stderr and (tmp_path / name).is_symlink()


def test_what_lies_beside_the_cache_as_a_note_holds_nothing_up(tmp_path: Path) -> None:
    """A pipe under the name of a note is not waited for, and a cache file may have any name."""
    cache = tmp_path / "c[1]*.sqlite"
    os.mkfifo(f"{cache}.trying-1")
    os.close(os.open(f"{cache}.trying-1", os.O_RDWR))
    Path(f"{cache}.trying-2").write_text(timing("a").model_dump_json())
    assert broken_off(cache) == [timing("a")]


# --- what is given


def test_arguments_of_a_wrong_type_are_named(tmp_path: Path) -> None:
    store = Store.memory()
    calls: list[tuple[str, Any]] = [
        ("path", lambda: Store.open(7)), ("path", lambda: store.export_file(None)),
        ("timings", lambda: store.put(None)), (r"timings\[1\]", lambda: store.put([timing("a"), "b"])),
        ("timings", lambda: store.put("abc")), ("predictions", lambda: store.predict([timing("a")])),
        ("problem", lambda: store.timings("op=x")), ("problem", lambda: store.predictions(3)),
        ("problems", lambda: store.want([None])), ("problems", lambda: store.unwant([1])),
        ("other", lambda: store.merge(tmp_path)), ("tokens", lambda: store.timings(tokens=True)),
        ("tokens", lambda: store.winners(tokens=8.0)), (r"tokens\[1\]", lambda: store.timings(tokens=[1, None])),
        ("op", lambda: store.timings(op=object())),
    ]  # fmt: skip
    for name, call in calls:
        with pytest.raises(InvalidInput, match=rf"{name}.*allowed is"):
            call()
    assert store.timings() == [] and store.wanted() == []


def learned_text(**change: Any) -> str:
    kernel = dict.fromkeys(OWN, 0.5)
    parameters = {"version": VERSION, "bandwidth": 0.9, "reread": 0.5, "early": 0.5, "kernels": {"tile": kernel}}
    works = [{"up": {"kernel": "tile", "m": 64, "n": 64, "k": 64}}]
    whole = {"op": "fused_moe", "parameters": parameters, "works": works, "calls": [[1, 2, 3]], "leftovers": [[0.1]]}
    return json.dumps(whole | {k: v(whole[k]) if callable(v) else v for k, v in change.items()})


@pytest.mark.parametrize("change", [
    {"leftovers": [[1e300]]}, {"leftovers": [[float("inf")]]}, {"leftovers": [[float("nan")]]}, {"leftovers": [[]]},
    {"calls": [[1e9, 0, 0]]}, {"calls": [[1, 2]]}, {"calls": []}, {"works": []}, {"works": [{"launches": 3}]},
    {"works": lambda old: [{"up": old[0]["up"] | {"k": 0}}]},
    {"works": lambda old: [{"up": old[0]["up"] | {"n": "x"}}]},
    {"works": lambda old: [{"up": old[0]["up"] | {"n": 10**400}}]}, {"works": lambda old: [{"down": old[0]["up"]}]},
    {"works": lambda old: old * 3000, "leftovers": [[0.1] * 3000]},
    {"calls": [[1, 2, 3]] * 3000, "leftovers": [[0.1]] * 3000},
    {"parameters": lambda old: old | {"bandwidth": float("inf")}}, {"parameters": lambda old: old | {"version": 0}},
    {"parameters": lambda old: old | {"kernels": {"tile": {**old["kernels"]["tile"], "matmul": -1}}}},
])  # fmt: skip
def test_what_a_model_learnt_elsewhere_is_bounded(change: dict[str, Any]) -> None:
    assert parse(learned_text()) is not None
    assert parse(learned_text(**change)) is None
