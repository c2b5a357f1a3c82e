"""A file from a stranger is data: what it says is shown as text, what it holds is bounded, and it runs nothing."""

import json
import os
import sqlite3
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from samples import timing

from moecache.cli import app
from moecache.schemas.errors import InvalidInput, StoreError
from moecache.schemas.printing import printable
from moecache.store import Store

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eab\u200f\ufeff\u2066\x00x\r\nmoecache: no findings\u2028y\tz\x85\ud83d"


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


@pytest.mark.parametrize("wanted", [("ls",), ("show", "tokens=256"), ("stats",), ("verify",), ("report",)])
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
    if wanted[0] in ("ls", "show", "stats", "verify"):
        printed = run(*wanted, "--db", path, "--json", code=None).stdout
        assert all(line.isprintable() for line in printed.split("\n")) and json.loads(printed) is not None
    if wanted[0] == "stats":
        assert text in json.loads(printed)[0]["ops"]  # JSON keeps it whole


def test_errors_are_one_printable_line() -> None:
    for error in (InvalidInput(f"{EVIL} is no value"), StoreError(f"cache file {EVIL}: damaged")):
        assert str(error).isprintable() and "no findings" in str(error)
