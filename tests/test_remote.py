"""`push` and `pull`: cache files at URLs. Whatever is wrong with a copy, nothing here changes."""

import hashlib
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileOpener
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from toy import A, B, Toy, timing

from moecache.cli import app
from moecache.devices import Places
from moecache.schemas.timing import Timing
from moecache.settings import PREBUILT
from moecache.store import Store
from moecache.store.schema import APPLICATION_ID

ON_DISK, IN_MEMORY = "file://{folder}/there/x.sqlite", "memory://fleet/x.sqlite"


def run(*arguments: object, code: int = 0) -> str:
    """What a command prints."""
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == code, done.output
    return done.output


def row(tokens: int, us: float = 10.0) -> Timing:
    return timing(Toy().problem(tokens), A if us < 15 else B, us, Places().here("cpu", 0).environment)


def made(path: Path, *rows: Timing) -> Path:
    with Store.open(path) as store:
        store.put(rows)
    return path


def held(path: Path) -> set[tuple[int, float | None]]:
    with Store.open(path, readonly=True) as store:
        assert store.check() == []
        return {(each.problem.tokens, each.median_us) for each in store.timings()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return made(tmp_path / "mine.sqlite", row(16), row(32, 20.0))


@pytest.fixture(params=[ON_DISK, IN_MEMORY, "{folder}/there/x.sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    MemoryFileSystem.store.clear()
    yield request.param.format(folder=tmp_path)
    MemoryFileSystem.store.clear()


def at(url: str) -> bytes:
    with fsspec.open(url, "rb") as opened:
        return bytes(opened.read())


def put(url: str, content: bytes, summed: bytes | None) -> None:
    """A file at a URL with the checksum of other content, or without one."""
    told = () if summed is None else ((f"{url}.sha256", hashlib.sha256(summed).hexdigest().encode()),)
    for name, text in ((url, content), *told):
        with fsspec.open(name, "wb") as opened:
            opened.write(text)


def test_a_file_is_replaced_or_merged_into(file: Path, url: str, tmp_path: Path) -> None:
    assert "2 timings" in run("push", file, url)
    first = at(url)
    assert at(f"{url}.sha256").split() == [hashlib.sha256(first).hexdigest().encode(), b"x.sqlite"]
    run("push", file, url)
    assert at(url) == first, "equal timings make equal bytes"
    new, old = tmp_path / "new.sqlite", made(tmp_path / "old.sqlite", row(64))
    for target in (new, old):
        assert f"2 timings from {url} written to {target}" in run("pull", url, target)
        assert target.read_bytes() == first, "as it was pushed, and nothing else"
    own = made(tmp_path / "own.sqlite", row(64))
    assert "2 timings" in run("pull", url, "--db", own) and "no timings" in run("pull", url, "--db", own)
    assert held(own) == {(16, 10.0), (32, 20.0), (64, 10.0)}


def test_without_file_the_users_file_takes_it(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("push", file, tmp_path / "x.sqlite")
    monkeypatch.setenv("MOECACHE_DB", str(tmp_path / "user.sqlite"))
    assert "taken into" in run("pull", tmp_path / "x.sqlite")
    assert held(tmp_path / "user.sqlite") == {(16, 10.0), (32, 20.0)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: (content[:5000] + b"\xff" + content[5001:], content), "is not what"),
        (lambda content: (content[:-4096], content), "is not what"),
        (lambda content: (b"", content), "is not what"),
        (lambda content: (content, None), "there is no {url}.sha256; `moecache push` writes it"),
        (lambda content: (b"not a cache file", b"not a cache file"), "{url}"),
        (lambda content: (content[:-4096], content[:-4096]), "{url}"),
        (lambda content: (_numbered(content, 7001),) * 2, "{url} has format 7001 of a later moecache"),
        (lambda content: (_numbered(content, 1),) * 2, "it has format 1 of an early moecache"),
        (lambda content: (_owned(content),) * 2, "{url} belongs to another program"),
    ],
)
def test_a_copy_that_is_not_right_changes_nothing(
    change: Any, told: str, file: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", file, url)
    content, summed = change(at(url))
    MemoryFileSystem.store.clear()
    Path(f"{tmp_path}/there/x.sqlite.sha256").unlink(missing_ok=True)
    put(url, content, summed)
    target, own = made(tmp_path / "target.sqlite", row(64)), made(tmp_path / "own.sqlite", row(64))
    before, there = (target.read_bytes(), own.read_bytes()), sorted(tmp_path.iterdir())
    for what in ((target,), ("--db", own), (tmp_path / "new.sqlite",)):
        said = run("pull", url, *what, code=1)
        assert told.format(url=url) in said and "copy.sqlite" not in said and len(said.splitlines()) == 1
    assert (target.read_bytes(), own.read_bytes()) == before and sorted(tmp_path.iterdir()) == there


def _changed(content: bytes, at: int, number: int) -> bytes:
    """With another number in the header of SQLite's file."""
    return content[:at] + number.to_bytes(4, "big") + content[at + 4 :]


def _numbered(content: bytes, version: int) -> bytes:
    return _changed(content, 60, version)


def _owned(content: bytes) -> bytes:
    return _changed(content, 68, APPLICATION_ID + 1)


def test_predictions_go_along_and_are_counted(tmp_path: Path) -> None:
    shipped, there, here = PREBUILT / "predicted-sm_90.sqlite", tmp_path / "there.sqlite", tmp_path / "here.sqlite"
    with Store.open(shipped, readonly=True, shipped=True) as store:
        told = f"no timings and {len(store.predictions())} predictions from "
    assert run("push", shipped, there).startswith(told)
    assert run("pull", there, here).startswith(told) and here.read_bytes() == there.read_bytes()


def test_a_push_that_breaks_off_is_never_taken(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither over nothing nor over an older file; the next push is clean."""
    url, target = f"file://{tmp_path}/x.sqlite", made(tmp_path / "target.sqlite", row(64))
    before, write = target.read_bytes(), LocalFileOpener.write

    def full(self: Any, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    for over in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(LocalFileOpener, "write", full)
            assert "x.sqlite: OSError: [Errno 28] No space left" in run("push", file, url, code=1)
        told = "is not what" if over else "there is no"
        assert told in run("pull", url, target, code=1) and target.read_bytes() == before
        run("push", file, url)
    run("pull", url, target)
    assert held(target) == {(16, 10.0), (32, 20.0)}


def test_a_pull_that_breaks_off_leaves_the_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, target = str(tmp_path / "x.sqlite"), made(tmp_path / "target.sqlite", row(64))
    run("push", file, url)
    before = target.read_bytes()

    def gone(self: Any, size: int = -1) -> bytes:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(LocalFileOpener, "read", gone)
    assert f"{url}: ConnectionError: reset by peer" in run("pull", url, target, code=1)
    assert target.read_bytes() == before


def test_what_is_no_cache_file_is_neither_pushed_nor_replaced(file: Path, tmp_path: Path) -> None:
    url, mine = str(tmp_path / "x.sqlite"), tmp_path / "thesis.sqlite"
    with sqlite3.connect(mine) as connection:
        connection.execute("CREATE TABLE thesis (text)")
    before = mine.read_bytes()
    run("push", file, url)
    assert "belongs to another program" in run("pull", url, mine, code=1)
    assert "belongs to another program" in run("push", mine, tmp_path / "y.sqlite", code=1)
    assert mine.read_bytes() == before and not (tmp_path / "y.sqlite").exists()
    assert "there is no cache file" in run("push", tmp_path / "none.sqlite", url, code=1)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("bogus://x/y",), 1, "bogus://x/y: ValueError: Protocol not known: bogus"),
        (("memory://none",), 1, "there is no memory://none"),
        (("",), 1, "'' names no file"),
        (("://",), 1, "'://' names no file"),
        (("memory://folder/",), 1, "'memory://folder/' names no file"),
        (("memory://none", "a.sqlite", "--db", "b.sqlite"), 2, "give FILE, which is replaced, or --db"),
    ],
)
def test_what_cannot_be_reached_is_one_line(arguments: tuple[str, ...], code: int, told: str) -> None:
    said = run("pull", *arguments, code=code)
    assert told in said and len(said.splitlines()) == 1


def test_a_file_system_that_is_not_installed_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    said = run("pull", "s3://bucket/x.sqlite", code=1)
    assert "s3://bucket/x.sqlite" in said and "pip install 'moecache[remote]'" in said
