"""Cache files in trouble: damaged, foreign, later or read-only, full disks, forks, many processes, kills."""

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from samples import HERE, problem, run, sql, start, timing

from moecache.schemas.errors import StoreError
from moecache.settings import PREBUILT
from moecache.store import Store, Tiers, database, locks, schema


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


# --- files that are not what they should be


def flip(path: Path) -> None:
    """Overwrite pages in the middle of a file."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 6000 : middle + 6000] = b"\xa5" * 12000
    path.write_bytes(data)


RUIN = {
    "overwritten": flip,
    "truncated": lambda path: os.truncate(path, 10_000),
    "no timing table": lambda path: sql(path, "DROP TABLE timing"),
}


@pytest.mark.parametrize("ruin", RUIN)
def test_a_damaged_file_is_kept_aside_and_begun_afresh(path: Path, ruin: str) -> None:
    with Store.open(path) as store:
        store.put([timing("a", problem=problem(tokens=t)) for t in range(300)])
    RUIN[ruin](path)
    ruined = path.read_bytes()
    path.with_name(path.name + "-journal").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cache\.sqlite"):
        Store.open(path, readonly=True)
    assert path.read_bytes() == ruined
    with pytest.warns(RuntimeWarning, match=r"was damaged .* kept as cache\.sqlite\.corrupt-"):
        store = Store.open(path)
    assert store.timings() == []
    store.put([timing("b")])
    store.close()
    (aside,) = (file for file in path.parent.glob("*.corrupt-*") if not file.name.endswith("-journal"))
    assert aside.read_bytes() == ruined
    with Store.open(path) as store:
        assert len(store.timings()) == 1 and store.check() == []


def test_the_journals_of_a_damaged_file_are_kept_with_it(path: Path) -> None:
    """Somebody may still write to them; beside the fresh file they would be taken for its own."""
    with Store.open(path) as store:
        store.put([timing("a", problem=problem(tokens=t)) for t in range(300)])
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("UPDATE wanted SET count = 1")
        other.execute("UPDATE timing SET n = 1 WHERE problem = 1")
        flip(path)
        with pytest.warns(RuntimeWarning, match="was damaged"):
            store = Store.open(path)
        assert store.timings() == [] and store.check() == []
        kept = {file.name.partition("Z")[2] for file in path.parent.glob("*.corrupt-*")}
        assert kept == {"", "-wal", "-shm"}
        store.put([timing("b")])
        store.close()
    with Store.open(path) as store:
        assert len(store.timings()) == 1 and store.check() == []


def foreign_id(path: Path) -> None:
    sql(path, "CREATE TABLE bookmarks (url)", "PRAGMA application_id = 77")


def foreign_tables(path: Path) -> None:
    sql(path, "CREATE TABLE bookmarks (url)")


def foreign_damaged(path: Path) -> None:
    foreign_id(path)
    sql(path, "INSERT INTO bookmarks VALUES (zeroblob(50000))")
    os.truncate(path, 9000)


def foreign_twin(path: Path) -> None:
    """The same tables as ours, by another name."""
    Store.open(path).close()
    sql(path, "PRAGMA application_id = 77")


FOREIGN = {
    "another application_id": (foreign_id, "belongs to another program .*: name another file"),
    "the same tables": (foreign_twin, "belongs to another program"),
    "no application_id": (foreign_tables, "belongs to another program"),
    "damaged": (foreign_damaged, ""),
}


@pytest.mark.parametrize("how", FOREIGN)
def test_a_foreign_file_is_never_touched(path: Path, how: str) -> None:
    make, message = FOREIGN[how]
    make(path)
    before, when = path.read_bytes(), path.stat().st_mtime_ns
    for mode in ({}, {"readonly": True}, {"shipped": True}):
        with pytest.raises(StoreError, match=rf"cache\.sqlite.*{message}"):
            Store.open(path, **mode)
    with pytest.warns(RuntimeWarning, match=r"cache\.sqlite"):
        tiers = Tiers.open(path)
    tiers.put([timing("a")])
    assert tiers.user.path is None
    assert path.read_bytes() == before and path.stat().st_mtime_ns == when
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_text_file_given_by_mistake_is_never_touched(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("buy milk " * 100)
    with pytest.raises(StoreError, match=r"is no cache file .* left as it is"):
        Store.open(notes)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_any_name_and_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path = tmp_path / "real" / "a b?c=d#e%20.sqlite"
    with Store.open(path) as store:
        store.put([timing("a")])
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    link = tmp_path / "link.sqlite"
    link.symlink_to(path)
    for shipped in (False, True):
        with Store.open(link, readonly=True, shipped=shipped) as store:
            assert len(store.timings()) == 1
    os.truncate(path, 5000)
    with pytest.warns(RuntimeWarning, match="was damaged"):
        Store.open(link).close()
    assert link.is_symlink() and [file.name for file in tmp_path.iterdir() if ".corrupt" in file.name] == []
    assert len(list(path.parent.glob("*.corrupt-*"))) == 1


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    for mode in ({}, {"readonly": True}):
        with pytest.raises(StoreError, match=str(tmp_path)):
            Store.open(tmp_path, **mode)


def test_reading_needs_a_file(path: Path) -> None:
    with pytest.raises(StoreError, match=r"no cache file at .*warm"):
        Store.open(path, readonly=True)
    path.touch()
    with pytest.raises(StoreError, match="is empty"):
        Store.open(path, readonly=True)
    Store.open(path).close()
    Store.open(path, readonly=True).close()


def test_a_shipped_file_that_somebody_still_writes_is_read_with_its_journal(path: Path) -> None:
    """Opened immutable it would be read without what is in the journal."""
    with Store.open(path) as store:
        store.put([timing("a")])
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("UPDATE timing SET median_us = 7.0")
        with Store.open(path, shipped=True) as store:
            assert [t.median_us for t in store.timings()] == [7.0]


def test_a_file_with_additions_is_read_and_not_written(path: Path) -> None:
    with Store.open(path) as store:
        store.put([timing("a"), timing("b", problem=problem(tokens=1))])
    sql(
        path,
        "ALTER TABLE problem ADD COLUMN ep_mode TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE timing ADD COLUMN watts REAL",
        "ALTER TABLE environment ADD COLUMN firmware TEXT NOT NULL DEFAULT ''",
        "CREATE TABLE profile (id INTEGER PRIMARY KEY)",
        "UPDATE problem SET ep_mode = 'low_latency', key = key || ' ep_mode=low_latency' WHERE tokens = 1",
        f"PRAGMA user_version = {schema.FORMAT + 1}",
    )
    before = path.read_bytes()
    with Store.open(path) as store:
        assert store.readonly
        assert [t.config.variant for t in store.timings()] == ["a"], "another problem than any this version knows"
        assert [w.config.variant for w in store.winners()] == ["a"]
        for write in (lambda: store.put([timing("c")]), lambda: store.want([problem()])):
            with pytest.raises(StoreError, match="for reading only"):
                write()
    with pytest.warns(RuntimeWarning, match="additions by a later moecache"):
        tiers = Tiers.open(path)
    tiers.put([timing("c", problem=problem(tokens=2))])
    answers = tiers.winners(HERE)
    assert answers.get(problem().key)[2] == str(path) and answers.get(problem(tokens=2).key)[2] == "memory"
    tiers.close()
    assert path.read_bytes() == before


def test_an_outdated_file_is_put_aside_whole(path: Path) -> None:
    with Store.open(path) as store:
        store.put([timing("a")])
    sql(path, f"PRAGMA user_version = {schema.OLDEST - 1}")
    before = path.read_bytes()
    for mode in ({"readonly": True}, {"shipped": True}):
        with pytest.raises(StoreError, match=r"format 1005 of an early moecache, this one reads 1006 and later"):
            Store.open(path, **mode)
    assert path.read_bytes() == before
    with pytest.warns(RuntimeWarning, match=r"is outdated .*1005.* kept as cache\.sqlite\.outdated-.*started afresh"):
        store = Store.open(path)
    with store:
        assert store.timings() == []
    (aside,) = path.parent.glob("*.outdated-*")
    assert aside.read_bytes() == before


def test_a_later_format_is_refused_and_left_alone(path: Path) -> None:
    Store.open(path).close()
    sql(path, f"PRAGMA user_version = {schema.FORMAT + 1000}")
    before = path.read_bytes()
    for mode in ({}, {"readonly": True}, {"shipped": True}):
        with pytest.raises(StoreError, match=r"of a later moecache.*upgrade moecache"):
            Store.open(path, **mode)
    assert path.read_bytes() == before


def test_migrations_run_without_plugins(path: Path) -> None:
    """Plugins of sqlite-utils would run whatever is installed beside us."""
    said = run(
        """
import sys
from moecache.store import Store
Store.open(sys.argv[1]).close()
from sqlite_utils import plugins
print(plugins._plugins_loaded)
""",
        path,
    )
    assert said == "False"


def test_the_schema_and_its_number_change_together() -> None:
    """Changed a table, a view or the tie band? Add a step to `schema._steps` and count FORMAT up."""
    text = json.dumps([schema.TABLES, schema.NOTES, schema.VIEWS]).encode()
    assert (schema.FORMAT, hashlib.sha256(text).hexdigest()[:12]) == (1006, "eb76e1a50b63")


# --- folders and disks


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for place in [folder, *folder.rglob("*")]:
        place.chmod(0o755)
    shutil.rmtree(folder)


AS_NOBODY = """
import os, sys, warnings
import urllib.parse  # pathlib loads it late, and nobody may not read every Python
from pathlib import Path
import sqlite_utils
from samples import *
from moecache.schemas.errors import *
from moecache.store import *
if os.getuid() == 0:  # root may write anywhere
    os.setgid(65534)
    os.setuid(65534)
folder, file = sys.argv[1:]
"""


def as_nobody(folder: Path, code: str) -> str:
    """Run `code` as a user who may write neither `folder` nor the files in it."""
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    return run(AS_NOBODY + code, str(folder), str(folder / "cache.sqlite"))


def test_an_exported_file_opens_in_a_read_only_folder(store: Store, public: Path) -> None:
    store.put([timing("a"), timing("b", 9.0)])
    store.export_file(public / "cache.sqlite")
    said = as_nobody(
        public,
        """
tiers = Tiers.open(None, [Path(file)])
print([answer[0].config.variant for answer in tiers.winners(HERE).values()], os.listdir(folder))
""",
    )
    assert said == "['b'] ['cache.sqlite']"


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_read_only_folder(public: Path, journal: str) -> None:
    """What is there is read, what is measured stays in memory, one warning says so."""
    with Store.open(public / "cache.sqlite") as store:
        store.put([timing("a")])
    sql(public / "cache.sqlite", f"PRAGMA journal_mode = {journal}")
    said = as_nobody(
        public,
        """
try:
    Store.open(file)
except StoreError as error:
    print(str(error).replace(folder, ""))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    tiers = Tiers.open(Path(file))
    tiers.put([timing("b", problem=problem(tokens=1))])
    tiers.write(lambda store: store.want([problem(tokens=2)]))
answers = tiers.winners(HERE)
sources = [answers.get(problem(tokens=t).key)[2].replace(folder, "") for t in (256, 1)]
print(len(said), sources, len(tiers.user.wanted()))
print(os.listdir(folder))
""",
    )
    refused, counted, left = said.splitlines()
    assert refused == "cache file /cache.sqlite is read-only: set MOECACHE_DB to a file in a writable folder"
    assert counted == "1 ['/cache.sqlite', 'memory'] 1" and left == "['cache.sqlite']"


def test_a_folder_that_cannot_be_made(public: Path) -> None:
    said = as_nobody(
        public,
        """
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    tiers = Tiers.open(Path(folder) / "deeper" / "cache.sqlite")
    tiers.put([timing("b")])
print(len(said), len(tiers.winners(HERE).values()))
""",
    )
    assert said == "1 1"


FULL = """
import resource, sys, warnings
from pathlib import Path
from samples import *
from moecache.schemas.errors import *
from moecache.store import *
import os
def full(room):  # files of this process may not grow past `room` bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
file = Path(sys.argv[1])
many = [timing("a", problem=problem(tokens=t), reason="x" * 900) for t in range(500)]
"""


def test_a_disk_that_fills_up_loses_nothing_and_stops_nothing(path: Path) -> None:
    said = run(
        FULL
        + """
tiers = Tiers.open(file)
tiers.put([timing("kept", problem=problem(tokens=9999))])
full(file.stat().st_size + 30_000)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    tiers.put(many)
    tiers.put([timing("b")])
    tiers.write(lambda store: store.want([problem(tokens=7777)]))
full(resource.RLIM_INFINITY)
answers = tiers.winners(HERE)
source = answers.get(problem(tokens=9999).key)[2]
print(len(said), "MOECACHE_DB" in str(said[0].message), len(answers.values()), source == str(file))
""",
        str(path),
    )
    assert said == "1 True 501 True"
    with Store.open(path) as store:
        assert [t.config.variant for t in store.timings()] == ["kept"] and store.check() == []


def test_a_disk_that_is_full_from_the_start(path: Path) -> None:
    said = run(
        FULL
        + """
full(1000)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    tiers = Tiers.open(file)
    tiers.put(many)
print(len(said), len(tiers.winners(HERE).values()))
""",
        str(path),
    )
    assert said == "1 500"
    with Store.open(path) as store:
        assert store.timings() == [] and store.check() == []


def test_an_export_or_page_that_does_not_fit_is_named(path: Path) -> None:
    said = run(
        FULL
        + """
from moecache.store import Store, atomic
store = Store.open(file)
store.put(many)
full(1000)
for write in (store.export_file, lambda to: atomic.write(to, "x" * 9999, "x")):
    try:
        write(file.parent / "new.db")
    except Exception as error:
        print(type(error).__name__, "new.db" in str(error), "MOECACHE_DB" in str(error))
print(*(each.name for each in file.parent.iterdir()))
""",
        str(path),
    )
    assert said == f"StoreError True False\nOSError True False\n{path.name}"


def test_advice_for_a_file_that_is_only_read_names_no_setting_of_another(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(database, "_connect", refused)
    with pytest.raises(StoreError, match="unable to open database file; make it readable, or name another file"):
        Store.open(str(store.path), shipped=True)


def test_full_disk_error_says_what_to_do(store: Store) -> None:
    with store.using() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(StoreError, match="the disk is full: free some space, or set MOECACHE_DB"):
        store.put([timing("a", problem=problem(tokens=t), reason="x" * 900) for t in range(100)])
    assert store.timings() == []


# --- journals, threads, forks, processes


def test_threads_share_a_store(store: Store) -> None:
    def work(number: int) -> None:
        try:
            for step in range(20):
                store.put([timing("a", problem=problem(tokens=number, experts=step + 1))])
                store.want([problem()])
                assert len(store.timings(tokens=number)) == step + 1
        except BaseException as error:
            wrong.append(error)

    wrong: list[BaseException] = []
    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(store.timings()) == 160 and store.wanted() == [(problem(), 160)]


@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_forked_child_opens_its_own_connection(path: Path, where: str) -> None:
    said = run("""
import os, sys, threading, time
from samples import *
from moecache.store import *
store = Store.open(sys.argv[1]) if sys.argv[2] == "file" else Store.memory()
store.put([timing("a")])
mine = store._connection
hold = threading.Thread(target=lambda: [store._lock.acquire(), time.sleep(0.5)])
hold.start()
time.sleep(0.1)  # another thread holds the lock while this one forks
children = []
for number in range(3):
    child = os.fork()
    if child == 0:
        store.put([timing("b", problem=problem(tokens=number))])
        fine = store._connection is not mine and len(store.timings(tokens=number)) == 1
        store.close()
        os._exit(0 if fine else 1)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
hold.join()
store._lock = threading.RLock()  # the thread above kept it
assert store._connection is mine
print(len(store.timings()), store.check())
""", str(path), where)  # fmt: skip
    assert said.splitlines() == ["[0, 0, 0]", "4 []" if where == "file" else "1 []"]


def test_writing_holds_the_lock_from_its_first_read(path: Path) -> None:
    """Taken at the first write only, the lock is refused to whoever has read before another process wrote."""
    with Store.open(path) as store, closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
        with store.writing() as connection:
            connection.execute("SELECT count(*) FROM timing")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
        other.execute("BEGIN IMMEDIATE")
        with store.reading() as connection:
            assert connection.execute("SELECT count(*) FROM timing").fetchone() == (0,)


def test_migrations_hold_the_write_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The init lock is not enough: there are file systems without flock."""

    class Racing:
        def apply(self, db: Any) -> None:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
            real.apply(db)

    real = schema._steps()
    monkeypatch.setattr(schema, "_steps", Racing)
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
        Store.open(path).close()
        assert other.execute("SELECT count(*) FROM timing").fetchone() == (0,)


def test_rows_that_others_refer_to_stay(store: Store) -> None:
    store.put([timing("a")])
    for table in ("problem", "config", "environment"):
        with pytest.raises(StoreError, match="FOREIGN KEY"), store.writing() as connection:
            connection.execute(f"DELETE FROM {table}")
    assert store.timings() == [timing("a")]


WORKER = """
import sys
from samples import *
from moecache.store import *
file, number, steps = sys.argv[1], *map(int, sys.argv[2:])
with Store.open(file) as store:
    for step in range(steps):
        before = store.timings(problem())
        store.put([timing(f"a{number}", problem=problem(tokens=step)), timing(f"a{number}")])
        store.want([problem()])
        assert len(store.timings(problem())) >= len(before)
"""


def test_processes_that_read_and_then_write_lose_nothing(path: Path) -> None:
    """A smaller form of benchmarks/store.py. There is no file yet, so the processes race to make it, too."""
    processes, steps = 4, 50
    workers = [start(WORKER, path, n, steps) for n in range(processes)]
    errors = [worker.communicate(timeout=600)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * processes, errors
    with Store.open(path) as store:
        assert store.wanted() == [(problem(), processes * steps)]
        assert len(store.timings()) == processes * (steps + 1)
        assert store.check() == []


WRITER = """
import sys
from samples import *
from moecache.store import *
with Store.open(sys.argv[1]) as store:
    for step in range(int(sys.argv[2]), 1_000_000):
        store.put([timing(name, problem=problem(tokens=step), reason="x" * 2000) for name in "abcd"])
        print(step, flush=True)
"""


def test_killed_while_writing(path: Path) -> None:
    """A smaller form of benchmarks/store.py: what was committed stays, whole, and the file stays sound."""
    committed = -1
    for round in range(5):
        writer = start(WRITER, path, committed + 1)
        assert writer.stdout is not None
        for _ in range(3 + round):
            committed = int(writer.stdout.readline())
        time.sleep(0.0007 * round)
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate()
        committed = max([committed, *(int(line) for line in rest.split())])
        with Store.open(path, readonly=True) as store:
            found = [t.problem.tokens for t in store.timings()]
            assert set(found) >= set(range(committed + 1)) and all(found.count(t) == 4 for t in set(found))
            assert store.check() == []
        committed = max(found)


def test_a_process_that_holds_the_file_is_named_after_the_timeout(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "most", 0.2)
    with Store.open(path) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"another process held it for 0.2 s"):
            store.put([timing("a")])
        other.execute("ROLLBACK")
        store.put([timing("a")])
        assert len(store.timings()) == 1


def test_a_folder_that_somebody_keeps_locked_costs_a_file_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "MAKING_S", 0.2)
    with database._init_lock(path.parent) as alone:
        assert alone
        with Store.open(path) as store:
            store.put([timing("a")])
        monkeypatch.setattr(database, "MAKING_S", 600.0)  # a sound file needs no lock at all
        with Store.open(path) as store:
            store.put([timing("b")])
            assert len(store.timings()) == 2
        path.write_bytes(path.read_bytes()[:100] + b"x" * 5000)
        monkeypatch.setattr(database, "MAKING_S", 0.2)
        with pytest.raises(StoreError, match="locks its folder"):  # to put a file aside takes the lock
            Store.open(path)
    with pytest.warns(RuntimeWarning, match="damaged"):
        Store.open(path).close()


def test_a_damaged_file_and_a_place_that_takes_none_say_what_to_do(tmp_path: Path) -> None:
    whole = (PREBUILT / "h200.sqlite").read_bytes()
    (damaged := tmp_path / "x.sqlite").write_bytes(whole[:300_000] + b"Z" * 60_000 + whole[360_000:])
    with pytest.raises(StoreError, match=r"x\.sqlite: .*; it is damaged: the next open for writing puts it aside"):
        Store.open(damaged, readonly=True)
    with Store.memory() as store, pytest.raises(StoreError, match=r"y\.sqlite: [A-Z][a-z ]+; name a file in a folder"):
        store.export_file(damaged / "y.sqlite")
