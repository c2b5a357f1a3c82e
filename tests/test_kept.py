"""What is said to be kept is kept: files that cannot be written are refused by commands, and cost a call a warning."""

import os
import pwd
import sqlite3
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from samples import timing

import moecache
from moecache.cli import app
from moecache.dispatch import dispatcher, using
from moecache.settings import Settings, default_path, settings_from
from moecache.store import Store, Tiers

MODEL = Path(__file__).parent.parent / "examples" / "models" / "qwen3-30b-a3b.json"
WARM = ["warm", str(MODEL), "--op", "moe_sort", "--tokens", "1", "--routing", "uniform", "--budget", "1s"]
IDS = torch.zeros(4, 2, dtype=torch.int32)


@contextmanager
def forbidden(folder: Path) -> Iterator[Path]:
    """A folder that this process may not even search, as HOME=/root is for a service's user."""
    folder.mkdir()
    folder.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)


def stranger(path: Path, kind: str) -> Path:
    """Something at `path` that no cache file may replace."""
    if kind == "folder":
        path.mkdir()
    elif kind == "json":
        path.write_text('{"model_type": "qwen3_moe"}')
    elif kind == "no folder":
        path.write_text("")
        return path / "x.sqlite"
    elif kind == "later":
        Store.open(path).close()
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 1999")
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE notes (text)")
    return path


@pytest.mark.parametrize("kind", ["folder", "json", "no folder", "other program", "later"])
def test_commands_that_keep_something_refuse_what_they_cannot_write(kind: str, tmp_path: Path) -> None:
    Store.open(tmp_path / "node.sqlite").close()
    db = stranger(tmp_path / "db.json", kind)
    before = db.read_bytes() if db.is_file() else None
    there = sorted(tmp_path.rglob("*"))
    for command in (
        WARM, ["merge", str(tmp_path / "node.sqlite")], ["prune"],
        ["profile", str(MODEL), "--budget", "1s"],
    ):  # fmt: skip
        done = CliRunner().invoke(app, [*command, "--db", str(db)])
        assert done.exit_code == 1 and done.stdout == "" and "moecache:" in done.stderr, (command, done.output)
        assert "Traceback" not in done.stderr and "lost" not in done.stderr, done.stderr
    assert sorted(tmp_path.rglob("*")) == there and (db.read_bytes() if db.is_file() else None) == before


def test_a_warm_up_whose_file_breaks_off_says_that_it_lost_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db, put = tmp_path / "db.sqlite", Store.put

    def full(self: Store, *args: object) -> None:
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink()
            self.path.mkdir()
            self.close()
        put(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "put", full)
    done = CliRunner().invoke(app, [*WARM, "--db", str(db)])
    assert done.exit_code == 1 and "lost" in done.stdout and f"kept in {db}" not in done.stdout, done.output
    assert not list(tmp_path.glob("*.warmed.json"))


def paths(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    return {
        "loop": tmp_path / "loop" / "c.sqlite",
        "long": tmp_path / ("n" * 300) / "c.sqlite",
        "nul": tmp_path / "a\0b" / "c.sqlite",
        "nobody": Path("~nobody-of-that-name/c.sqlite"),
        "file": tmp_path / "file" / "c.sqlite",
    }


def serve(settings: Settings, mode: str) -> list[str]:
    """The warnings of three calls, which must be right."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with using(settings, mode=mode, path=()):  # type: ignore[arg-type]
            for tokens in (1, 2, 4):
                assert int(moecache.moe_sort(IDS[:tokens], 8, 16).counts.sum()) == 2 * tokens
            assert mode == "off" or dispatcher().lookup.tiers.user.path is None
    return [str(warning.message) for warning in caught if "cache file" in str(warning.message)]


@pytest.mark.parametrize("mode", ["tune", "replay", "off"])
@pytest.mark.parametrize("name", ["loop", "long", "nul", "nobody", "file", "forbidden"])
def test_calls_are_served_whatever_the_path_is(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moecache.settings.PREBUILT", Path("/nothing"))
    with using(mode="tune", db=Path(":memory:"), budget=0.1, path=()):
        moecache.moe_sort(IDS, 8, 16)  # loads modules, which the folder of this interpreter may hide below
    if name == "forbidden":
        with forbidden(tmp_path / "home") as home:
            said = serve(Settings(db=home / ".cache" / "c.sqlite", budget=0.0), mode)
    else:
        said = serve(Settings(db=paths(tmp_path)[name], budget=0.0), mode)
    missing = mode == "replay" and name == "file"  # nothing can be there, and nothing is to be written
    assert len(said) == (mode != "off" and not missing), said
    assert not (tmp_path / "~nobody-of-that-name").exists()


def test_a_process_without_a_home_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert not default_path().is_absolute()
    assert len(serve(Settings(budget=0.0), "tune")) == 1
    assert len(serve(settings_from({"MOECACHE_DB": "~/c.sqlite", "MOECACHE_BUDGET": "0"}), "replay")) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_a_stranger_keeps_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at each open nor at each look: whoever waited in vain waits at full length again when it was free."""
    db, waits = tmp_path / "c.sqlite", list[float]()
    connect = sqlite3.connect

    def recording(where: str, *, timeout: float, **how: Any) -> sqlite3.Connection:
        waits.extend([timeout] * where.startswith("file:"))
        return connect(where, timeout=timeout, **how)

    monkeypatch.setattr("moecache.store.locks.most", 0.25)
    monkeypatch.setattr("moecache.store.locks.SHORT_S", 0.01)
    with Store.open(db) as store:
        store.put([timing("a", 8.0)])
    stranger = connect(db, isolation_level=None)
    stranger.execute("PRAGMA journal_mode = DELETE")
    stranger.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr("sqlite3.connect", recording)
    for _ in range(3):
        with pytest.warns(RuntimeWarning, match="database is locked"):
            Tiers.open(db).close()
    assert waits.count(0.25) == 1 and len(waits) > 3
    stranger.execute("COMMIT")
    waits.clear()
    with Store.open(db) as store:
        assert len(store.timings()) == 1
    Store.open(db).close()
    assert waits[-1] == 0.25
    stranger.close()


def test_doctor_says_why_the_file_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("later/c.sqlite")
    told = {
        "~nobody-of-this-name/c.sqlite": "there is no such home", "loop/c.sqlite": "oop",
        "x/" * 3000 + "c": "name too long", "link": "",
    }  # fmt: skip
    for path, reason in told.items():
        done = CliRunner().invoke(app, ["doctor", "--db", path])
        assert reason.casefold() in done.output.casefold() and done.exit_code == bool(reason), (path, done.output)
    Store.open(tmp_path / "link").close()
    assert (tmp_path / "later" / "c.sqlite").is_file()
