"""Receipts of warm-ups: a second run loads no torch, and anything that could change the answer makes it look again."""

import contextlib
import importlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moecache import receipts
from moecache.cli import app
from moecache.devices import Places
from moecache.models import read_model
from moecache.schemas.device import KNOWN
from moecache.schemas.timing import Environment
from moecache.store import Store
from moecache.store.cachefile import RECEIPTS

ROOT = Path(__file__).parent.parent
FIELDS = {
    "model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
    "hidden_size": 64, "intermediate_size": 32,
}  # fmt: skip
PROBE = """
import runpy, sys
sys.argv = ["moecache", *sys.argv[1:]]
try:
    runpy.run_module("moecache", run_name="__main__")
except SystemExit as done:
    print(*{"torch", "triton"} & set(sys.modules), file=sys.stderr)
    sys.exit(done.code)
"""


WARM = ["warm", "config.json", "--db", "c.sqlite", "--op", "moe_sort", "--json", "--routing", "uniform"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one."""
    for name in [name for name in os.environ if name.startswith("MOECACHE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return tmp_path


def fresh(folder: Path) -> tuple[list[dict], str]:
    """What `warm` prints in a process of its own, and what it says besides, the heavy modules that it loaded last."""
    command = [sys.executable, "-c", PROBE, *WARM, "--tokens", "1,4"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def sql(path: Path, query: str, *values: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(query, values).fetchall()


def warm(tokens: str = "1,4") -> tuple[list[dict], bool]:
    """What `warm` prints, and whether it looked at its problems: that is what takes torch."""
    module, looked = importlib.import_module("moecache.warmup"), []
    with pytest.MonkeyPatch.context() as patch:
        called = module.warmup
        patch.setattr(module, "warmup", lambda *args, **more: looked.append(1) or called(*args, **more))
        done = CliRunner().invoke(app, [*WARM, "--tokens", tokens], prog_name="moecache")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), bool(looked)


def test_a_second_run_loads_no_torch_and_tells_the_same(folder: Path) -> None:
    first, said = fresh(folder)
    assert "torch" in said and all(row["measured"] for row in first)
    again, said = fresh(folder)
    assert "torch" not in said and f"nothing to measure: {len(first)} problems" in said
    assert warm() == (again, False), "another process finds it too"
    for row, before in zip(again, first, strict=True):
        assert row["measured"] == 0 and row["tier"] == "measured"
        assert {k: v for k, v in row.items() if k not in ("measured", "reason")} == {
            k: v for k, v in before.items() if k not in ("measured", "reason")
        }


def test_what_could_change_the_answer_is_looked_at_again(folder: Path) -> None:
    first, _ = warm()
    more, looked = warm("1,4,16")
    assert looked and {row["key"] for row in first} < {row["key"] for row in more}
    (folder / "config.json").write_text(json.dumps({**FIELDS, "num_local_experts": 16}))
    rows, looked = warm()
    assert looked and all(row["measured"] for row in rows), "another model"


STRANGE = ["my notes", '["x"]', "[" * 100_000, '{"served": ["a"], "left_out": []}', "\x00"]


@pytest.mark.parametrize("harm", ["no cache file", "a problem lost", "wanted", "no receipt", "no table", *STRANGE])
def test_a_receipt_alone_proves_nothing(folder: Path, harm: str) -> None:
    rows, _ = warm()
    cache = folder / "c.sqlite"
    measured = 0
    if harm == "no cache file":
        cache.unlink()
        measured = len(rows)
    elif harm == "no receipt":
        sql(cache, "DELETE FROM receipt")
    elif harm == "no table":
        sql(cache, "DROP TABLE receipt")
    elif harm in STRANGE:
        sql(cache, "UPDATE receipt SET covered = ?", harm)
    else:
        with Store.open(cache) as store:
            kept = [t for t in store.timings() if t.problem.key != rows[0]["key"]]
            (lost,) = {t.problem for t in store.timings() if t.problem.key == rows[0]["key"]}
            if harm == "wanted":
                store.want([lost])
        if harm == "a problem lost":
            cache.unlink()
            with Store.open(cache) as store:
                store.put(kept)
        measured = 1
    again, looked = warm()
    assert looked and sum(bool(row["measured"]) for row in again) == measured
    assert not warm()[1]


def test_the_environment_is_named_as_a_measurement_names_it() -> None:
    here, place = receipts.here(), Places().first()
    if place.device.vendor == "amd":
        assert here is None
    else:
        assert here is not None and here[1] == place.environment
        assert (here[0].name, here[0].arch, here[0].units) == (place.device.name, place.device.arch, place.device.units)


def test_other_code_or_another_device_finds_no_receipt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, torch_1, torch_2 = read_model(folder), Environment(torch="1"), Environment(torch="2")
    here, package = (KNOWN["h100"], torch_1), folder / "package"
    name = receipts.request(here, model, [1, 4])
    assert name == receipts.request(here, read_model(folder / "config.json"), [1, 4])
    names = [name, receipts.request(here, model, [1, 8]), receipts.request(here, read_model(folder, ep=2), [1, 4])]
    half = KNOWN["h100"].model_copy(update={"units": 66})
    names += [receipts.request(other, model, [1, 4]) for other in ((half, torch_1), (KNOWN["h100"], torch_2))]
    (package / "kernels" / "sort").mkdir(parents=True)
    monkeypatch.setattr(receipts, "PACKAGE", package)
    for text in ("one", "two"):
        for file in ("k.py", "sort/gpu.py"):
            (package / "kernels" / file).write_text(text)
            names.append(receipts.request(here, model, [1, 4]))
    assert len(set(names)) == len(names)


def test_the_oldest_receipts_give_way(tmp_path: Path) -> None:
    with Store.open(tmp_path / "c.sqlite") as store:
        for i in range(RECEIPTS + 3):
            store.keep_receipt(str(i), f"covered {i}")
        store.keep_receipt("3", "again")
        store.keep_receipt("new", "covered")
        kept = [name for name in (*map(str, range(RECEIPTS + 3)), "new") if store.receipt(name)]
        assert kept == ["3", *map(str, range(5, RECEIPTS + 3)), "new"] and store.receipt("3") == "again"


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    Store.open(path).close()
    with Store.open(path, readonly=True) as store:
        receipts.keep(store, "x", [], [])
        assert not store.receipt("x")


def test_an_export_takes_no_receipt_along(folder: Path) -> None:
    warm()
    done = CliRunner().invoke(app, ["export", "out.sqlite", "--db", "c.sqlite"])
    there = "SELECT count(*) FROM sqlite_schema WHERE name = 'receipt'"
    assert done.exit_code == 0 and sql(folder / "c.sqlite", there) == [(1,)]
    assert sql(folder / "out.sqlite", there) == [(0,)]
