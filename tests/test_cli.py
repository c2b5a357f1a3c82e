"""The command line as a person and as a program meet it; the store is filled by hand, so that numbers are known."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from drawn import drawn

from moecache.cli import app, progress, tables
from moecache.devices import Places
from moecache.dispatch import using
from moecache.kernels import code
from moecache.kernels import registry as ops
from moecache.kernels.code import code_of
from moecache.schemas.config import Config, config
from moecache.schemas.problem import Problem, problem_from_key
from moecache.schemas.timing import Environment, Timing
from moecache.schemas.warm import OPS
from moecache.settings import Settings
from moecache.store import Store
from moecache.verify.doctor import examine
from moecache.warmup import TOKENS, Progress, WarmRow

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "models" / "qwen3-30b-a3b.json"
SIZES = "experts=8,topk=2,hidden=64,intermediate=32"
COMMANDS = [
    "warm", "ls", "explain", "profile", "doctor", "verify", "report",
    "export", "import", "merge", "push", "pull", "prune",
]  # fmt: skip

H200 = Environment(device_name="NVIDIA H200", driver="580.1", torch="2.12.0", triton="3.9.0")
A, B, C = (
    config("oneshot", programs=1),
    config("oneshot", programs=4, num_warps=8),
    config("multiphase", group=4),
)


def problem(tokens: int, **changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "op": "my_gemm", "vendor": "nvidia", "arch": "sm_90", "units": 132, "tokens": tokens, "experts": 128,
        "topk": 8, "routing": "a0e0", "dtype": "int32", "source": "abc", "dims": {"block_m": 16},
    }  # fmt: skip
    return Problem(**fields | changes)


def timing(asked: Problem, tried: Config, us: float | None, where: Environment = H200, **more: Any) -> Timing:
    sample = {} if us is None else {"median_us": us, "mad_us": us / 100, "n": 40, "error": 0.0}
    return Timing(
        problem=asked,
        config=tried,
        environment=where,
        measured_at="2026-01-02T03:04:05+00:00",
        code="" if asked.source else code_of(asked.op, tried.variant),
        **sample | more,
    )


def rows() -> list[Timing]:
    """Three layers; in each B wins, A is the default, C gives wrong numbers."""
    found = []
    for number, asked in enumerate((problem(16), problem(4096), problem(256, arch="sm_100", routing="a1e2"))):
        us = 10.0 * (number + 1) + 0.125
        found += [
            timing(asked, A, 1.5 * us, is_default=True),
            timing(asked, B, us),
            timing(asked, C, None, status="wrong", error=float("inf"), reason="3 of 64 ids differ"),
        ]
    return found


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A cache file with `rows`."""
    path = tmp_path_factory.mktemp("filled") / "x.sqlite"
    with Store.open(path) as store:
        store.put(rows())
    return path.read_bytes()


@pytest.fixture
def db(tmp_path: Path, filled: bytes) -> Path:
    path = tmp_path / "x.sqlite"
    path.write_bytes(filled)
    return path


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of this machine, no file of the package."""
    for name in [name for name in os.environ if name.startswith("MOECACHE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("moecache.settings.PREBUILT", tmp_path / "prebuilt")


def run(*arguments: object, code: int = 0, **env: str) -> Result:
    done = CliRunner(env=env).invoke(app, [str(each) for each in arguments], prog_name="moecache")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, (arguments, done.exit_code, done.output)
    return done


def said(*arguments: object, **env: str) -> Any:
    """What a command prints as JSON."""
    return json.loads(run(*arguments, "--json", **env).stdout)


def cells(text: str) -> list[dict[str, str]]:
    """A piped table. Titles may hold a blank, cells none, so columns are cut where all lines have two blanks."""
    header, *lines = text.splitlines()
    titles = re.split(r" {2,}", header.strip())
    split = [line.split() for line in lines if line]
    assert all(len(row) == len(titles) for row in split), text
    return [dict(zip(titles, row, strict=True)) for row in split]


# --- help and documentation ---


def test_every_command_has_help_with_an_example() -> None:
    listed = run("--help").stdout
    assert re.findall(r"^  ([a-z]+)  ", listed.split("Commands:")[1], re.MULTILINE) == COMMANDS
    for name in COMMANDS:
        text = run(name, "--help").stdout
        assert f"Usage: moecache {name}" in text and re.search(rf"^  Example: moecache {name}\b", text, re.MULTILINE)
        assert re.search(r"^  [A-Z][^\n]*\.\n", text, re.MULTILINE), f"{name} does not say what it does"
        assert max(map(len, text.splitlines())) <= 80


def test_no_command_prints_help_and_version_prints_itself() -> None:
    assert run().stdout == run("--help").stdout
    assert re.fullmatch(r"moecache \d+\.\d+\.\d+\S*\n", run("--version").stdout)


def test_the_documentation_is_fresh_and_complete() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    page = (ROOT / "docs" / "cli.md").read_text()
    assert page == made.render(), "stale: run python docs/make_cli.py"
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == COMMANDS
    for name in COMMANDS:
        section = page.split(f"## {name}\n")[1].split("\n## ")[0]
        options = set(re.findall(r"--[a-z-]+", run(name, "--help").stdout)) - {"--help"}
        assert all(option in section for option in options), (name, options)


def test_default_tokens_are_those_of_the_library() -> None:
    assert f"`{','.join(map(str, TOKENS))}`" in (ROOT / "docs" / "cli.md").read_text()


TINY = {
    "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64,
    "intermediate_size": 256, "num_hidden_layers": 2, "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_example_of_the_help_runs(db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In a folder with the files that the examples name; a warm-up is given less time than it wants. What the shell
    does with what a command prints, the shell does."""
    page = run(*([name] if name else []), "--help", COLUMNS="200").stdout
    (line,) = re.findall(r"^ *Example: (.+)$", page, re.MULTILINE)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("MOECACHE_DB", str(db))
    monkeypatch.setattr("moecache.settings.PREBUILT", ROOT / "moecache" / "prebuilt")  # as who reads it has
    (here / "config.json").write_text(json.dumps(TINY))
    for file in ("node1.sqlite", "node2.sqlite", *(["h200.sqlite"] if name in ("verify", "push") else [])):
        (here / file).write_bytes(db.read_bytes())
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", MemoryFileSystem)  # no account is needed
    if name == "pull":
        run("push", db, line.split()[2])
    line = line.replace("moecache warm config.json", "moecache warm config.json --budget 0.3s")
    for each in line.split(" && "):
        command, rest = re.fullmatch(r"moecache ((?:'[^']*'|[^'|>])+)(.*)", each).groups()  # type: ignore[union-attr]
        done = run(*shlex.split(command), code=int(name in ("import", "profile")))  # no engine is here, and no GPU
        assert done.stdout or name == "import"
        subprocess.run(["bash", "-c", f"cat {rest}"], input=done.stdout, text=True, check=True)


# --- ls ---


def test_ls_prints_the_stored_numbers_and_nothing_is_cut(db: Path) -> None:
    shown = cells(run("ls", "--db", db).stdout)
    with Store.open(db, readonly=True) as store:
        stored = {winner.problem.id: winner for winner in store.winners()}
    assert len(shown) == 3 == len(stored)
    for row in shown:
        winner = stored[row["id"]]
        assert row["winner"] == winner.config.name == B.name
        assert abs(float(row["µs"]) - winner.median_us) <= 0.0051
        assert winner.default_us is not None and abs(float(row["default µs"]) - winner.default_us) <= 0.0051
        assert row["gain %"] == "+50.0" and row["MAD %"] == "1.0"
        assert row["environment"] == H200.id and row["measured"] == "2026-01-02"
        for name in (
            "op",
            "vendor",
            "arch",
            "units",
            "experts",
            "topk",
            "tokens",
            "routing",
            "source",
            "dtype",
        ):
            assert row[name] == str(getattr(winner.problem, name))
    assert [row["tokens"] for row in shown] == ["256", "16", "4096"]  # by layer, then from few to many


def test_ls_json_has_stable_keys_and_exact_values(db: Path) -> None:
    found = said("ls", "--db", db)
    assert set(found[0]) == {
        "id", "key", "problem", "config", "environment", "median_us", "mad_us", "n", "default_us", "tied",
        "candidates", "runner_up_us", "measured_at", "file",
    }  # fmt: skip
    assert [each["median_us"] for each in found] == [30.125, 10.125, 20.125]
    assert all(problem_from_key(each["key"]).id == each["id"] for each in found)
    assert found[1]["environment"] == {"id": H200.id, **H200.model_dump()}
    assert found[1]["config"] == json.loads(B.model_dump_json()) and found[1]["file"] == str(db)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        (["tokens=16,256"], [256, 16]),
        (["tokens=9"], [16]),
        (["tokens=16", "arch=sm_100"], []),
        (["arch=sm_90,gfx942"], [16, 4096]),
        (["op=my_gemm", "experts=128"], [256, 16, 4096]),
        (["op=other"], []),
        (["routing=a1e2"], [256]),
        ([f"environment={H200.id}"], [256, 16, 4096]),
    ],
)
def test_ls_filters(db: Path, fields: list[str], tokens: list[int]) -> None:
    done = run("ls", "--db", db, "--json", *fields, code=int(not tokens))
    assert [each["problem"]["tokens"] for each in json.loads(done.stdout)] == tokens
    assert done.stderr.startswith("moecache: nothing matches" if not tokens else "")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (["op=nosuch"], "no op nosuch, stored are my_gemm"),
        (["arch=sm90"], "no arch sm90, stored are sm_100, sm_90"),
        (["tokens=17"], "no tokens 32, stored are 16, 256, 4096"),
        (["routing=-"], "no routing -, stored are a0e0, a1e2"),
        (["experts=64,8"], "no experts 64, 8, stored are 128"),
        (["routing=a2e3"], "no routing a2e3, stored are a0e0, a1e2"),
        (["environment=0123"], f"no environment 0123, stored are {H200.id}"),
        (["tokens=16", "arch=sm_100"], "nothing has all of these at once"),
    ],
)
@pytest.mark.parametrize("command", [["ls"], ["export", "y.sqlite"], ["report", "y.html"], ["explain"]])
def test_filters_that_match_nothing_say_what_there_is(
    db: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], fields: list[str], told: str
) -> None:
    monkeypatch.chdir(db.parent)
    if command == ["explain"]:
        if "environment" in fields[0]:
            return
        monkeypatch.setenv("MOECACHE_DB", str(db))
        command, fields = ["explain", "--key", " ".join(fields)], []
    else:
        command = [*command, "--db", str(db)]
    done = run(*command, *fields, code=1)
    assert done.stdout == "" and done.stderr.splitlines()[-1] == f"moecache: nothing matches in {db}: {told}"
    assert not list(db.parent.glob("y.*"))


def test_ls_says_where_nothing_was_found(db: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "none.sqlite") as store:
        store.want([problem(16)])
    assert "no winners" in run("ls", "--db", tmp_path / "none.sqlite").stderr
    done = run("ls")
    assert str(tmp_path / "cache" / "moecache" / "moecache.sqlite") in done.stderr and "warm" in done.stderr
    assert said("ls") == [] and not (tmp_path / "cache").exists()


def test_ls_reads_the_files_that_answer_calls(db: Path, tmp_path: Path) -> None:
    mine, gone = tmp_path / "mine.sqlite", tmp_path / "gone.sqlite"
    with Store.open(mine) as store:
        store.put([timing(problem(64), A, 5.0)])
    env = {"MOECACHE_DB": str(mine), "MOECACHE_PATH": f"{gone}{os.pathsep}{db}"}
    done = run("ls", "--json", **env)
    assert [(each["problem"]["tokens"], each["file"]) for each in json.loads(done.stdout)] == [
        (256, str(db)), (16, str(db)), (64, str(mine)), (4096, str(db)),
    ]  # fmt: skip
    assert str(gone) in done.stderr and "left out" in done.stderr
    assert {row["file"] for row in cells(run("ls", **env).stdout)} == {str(db), str(mine)}


# --- explain ---


def test_explain_takes_an_id_a_key_or_some_fields(db: Path) -> None:
    asked = [problem(16), problem(4096), problem(256, arch="sm_100", routing="a1e2")]

    def keys(text: str) -> set[str]:
        return {row["key"] for row in said("explain", "--db", db, "--key", text)}

    for each in asked:
        assert keys(each.id) == keys(each.key) == {each.key}
        assert keys(each.id[:2]) == {one.key for one in asked if one.id.startswith(each.id[:2])}
    assert keys("arch=sm_90") == {asked[0].key, asked[1].key} and keys("routing=a0e0 tokens=9") == {asked[0].key}
    assert "no id begins with 'zz'" in run("explain", "--db", db, "--key", "zz", code=1).stderr


def test_explain_has_every_timing_with_status_and_reason(db: Path) -> None:
    facts, table = run("explain", "--db", db, "--key", "tokens=16").stdout.split("\n\n")
    assert problem(16).id in facts
    origin, *lines = table.splitlines()
    assert H200.device_name in origin and H200.id in origin and str(db) in origin
    best, default, wrong = ([part.strip() for part in re.split(r" {2,}", line)] for line in lines[1:])
    assert best == [B.name, "answer", "10.12", "0.0", "1.0", "40", "0", "ok", "-"]
    assert default == [A.name, "default", "15.19", "50.0", "1.0", "40", "0", "ok", "-"]
    assert wrong == [C.name, "-", "-", "-", "-", "0", "inf", "wrong", "3 of 64 ids differ"]
    (found,) = said("explain", "--db", db, "--key", "tokens=16")
    assert [each["status"] for each in found["timings"]] == ["ok", "ok", "wrong"]
    assert found["timings"][2]["error"] == "Infinity" and found["timings"][0]["environment"]["id"] == H200.id


def measured_here(db: Path) -> tuple[Problem, Environment]:
    """A problem that a call on this machine asks, with its winner stored."""
    place = Places().here("cpu", 0)
    op = ops.get("moe_sort")
    device = place.device
    asked = problem(256, op="moe_sort", vendor="cpu", arch=device.arch, units=device.units, source=op.source)
    first, second = op.space(asked, device)[:2]
    with Store.open(db) as store:
        store.put(
            [
                timing(asked, first, 80.0, place.environment, is_default=True),
                timing(asked, second, 40.5, place.environment),
                timing(asked, C, None, place.environment, status="crashed", reason="signal 11"),
            ]
        )
    return asked, place.environment


def test_explain_a_hit_a_miss_and_another_environment(db: Path) -> None:
    asked, here = measured_here(db)
    (hit,) = said("explain", "--db", db, "--key", asked.key)
    assert set(hit) == {"id", "key", "choice", "timings", "nearest", "differs", "notes"}
    assert hit["choice"]["tier"] == "measured" and hit["choice"]["expected_us"] == 40.5
    assert hit["nearest"] is None and hit["differs"] == []
    assert [each["status"] for each in hit["timings"]] == ["ok", "ok", "crashed"]
    text = run("explain", "--db", db, "--key", asked.id).stdout
    assert re.search(r"^tier +measured$", text, re.MULTILINE) and re.search(r" answer +40\.50 ", text)
    assert "signal 11" in text and str(db) in text

    missed = asked.model_copy(update={"tokens": 65536})
    (miss,) = said("explain", "--db", db, "--key", missed.key)
    assert miss["choice"]["tier"] in ("predicted", "default") and miss["timings"] == []
    assert miss["nearest"]["key"] == asked.key
    assert miss["differs"] == [{"field": "tokens", "asked": "65536", "stored": "256"}]
    text = run("explain", "--db", db, "--key", missed.key).stdout
    assert re.search(r"^differs in +tokens: asked 65536, stored 256$", text, re.MULTILINE)

    unfit = asked.model_copy(update={"tokens": 1})
    with Store.open(db) as store:
        store.put([timing(unfit, config("teleport", speed=9), 0.1, here)])
    text = run("explain", "--db", db, "--key", unfit.key).stdout
    assert "none of which is served" in text and "teleport" not in text.split("timed on")[0]

    with sqlite3.connect(db) as connection:
        connection.execute("DELETE FROM timing")
    connection.close()
    with Store.open(db) as store:
        old = here.model_copy(update={"torch": "1.0.0"})
        store.put([timing(asked, ops.get("moe_sort").space(asked, Places().here("cpu", 0).device)[0], 70.0, old)])
    (elsewhere,) = said("explain", "--db", db, "--key", asked.key)
    assert elsewhere["choice"]["tier"] == "unverified" and "torch 1.0.0" in elsewhere["choice"]["reason"]


def test_an_explanation_prints_as_the_command_does(db: Path) -> None:
    asked, _ = measured_here(db)
    for each in (asked, asked.model_copy(update={"tokens": 65536}), problem(16), problem(16, op="nobody")):
        with using(db=db) as serving:
            explained = serving.explain(each)
        printed = run("explain", "--db", db, "--key", each.key).stdout
        assert f"{explained}\n" == printed and each.id in printed


def test_explain_a_model(tmp_path: Path) -> None:
    path = tmp_path / "empty.sqlite"
    found = said("explain", MODEL, "--db", path, "--tokens", "1,300", "--routing", "uniform,zipf")
    assert {problem_from_key(each["key"]).tokens for each in found} == {1, 512}
    assert all(each["choice"]["tier"] in ("predicted", "default") and each["choice"]["reason"] for each in found)
    assert "nothing is stored" in run("explain", MODEL, "--db", path, "--tokens", "1").stdout


def test_timings_of_other_code_are_no_winners_and_said_to_be_there(db: Path, tmp_path: Path) -> None:
    with sqlite3.connect(db) as connection:
        connection.execute("UPDATE timing SET code = '0123456789ab'")
    with Store.open(db, readonly=True) as store:
        figures = store.stats()
    assert (figures["winners"], figures["other_code"], figures["timings"]) == (0, 9, 9)
    advice = "9 timings ran code that has changed since: `moecache warm CONFIG` measures anew"
    assert advice in run("doctor", "--db", db).stdout
    nothing = run("ls", "--db", db).stderr
    assert f"no winners: {db} has no winners of" in nothing and advice in nothing
    assert advice in run("ls", "--db", db, "tokens=16", code=1).stderr
    assert advice in run("report", tmp_path / "x.html", "--db", db).stderr
    diagnosis = json.loads(run("doctor", "--db", db, "--json").stdout)
    assert advice in diagnosis["next"] and not any("nothing is measured" in step for step in diagnosis["next"])


# --- files ---


def test_export_comes_back_whole(db: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out.sqlite", tmp_path / "other.sqlite"
    assert "9 timings" in run("export", out, "--db", db).stdout
    assert run("merge", out, "--db", other).stdout.startswith("9 timings")
    assert run("merge", out, "--db", other).stdout.startswith("no timings")  # nothing is newer
    with Store.open(db, readonly=True) as mine, Store.open(other, readonly=True) as theirs:
        assert mine.timings() == theirs.timings()


def test_export_filters(db: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.sqlite"
    run("export", out, "--db", db, "arch=sm_100")
    assert {row["problem"]["arch"] for row in said("ls", "--db", out)} == {"sm_100"}


def test_merge_of_several_names_each(db: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    with Store.open(other) as store:
        store.put([timing(problem(64), A, 5.0)])
    lines = run("merge", db, other, "--db", tmp_path / "all.sqlite").stdout.splitlines()
    assert [line.split(" from ")[0] for line in lines] == ["9 timings", "1 timing"]
    assert len(said("ls", "--db", tmp_path / "all.sqlite")) == 4


def test_verify_passes_what_fits_and_names_what_does_not(db: Path) -> None:
    asked, here = measured_here(db)
    done = run("verify", "--db", db)
    assert "no findings" in done.stdout and "6 timings not judged" in done.stdout and "my_gemm" in done.stdout
    with Store.open(db) as store:
        store.put([timing(asked, config("teleport", speed=9), 0.1, here)])
    done = run("verify", "--db", db, code=1)
    assert "1 finding" in done.stdout and asked.id in done.stdout and "teleport(speed=9)" in done.stdout


def test_verify_finds_a_changed_key(db: Path) -> None:
    with sqlite3.connect(db) as connection:
        connection.execute("UPDATE problem SET tokens = 32 WHERE tokens = 16")
    assert "key" in run("verify", "--db", db, code=1).stdout


def test_verify_does_not_judge_other_kernels(db: Path) -> None:
    asked, here = measured_here(db)
    with Store.open(db) as store:
        stale = asked.model_copy(update={"source": "0123456789ab"})
        store.put([timing(stale, config("teleport", speed=9), 0.1, here)])
    assert "code that has changed since: 1 timings not judged" in run("verify", "--db", db).stdout


def test_prune(db: Path) -> None:
    assert "no timings deleted" in run("prune", "--db", db).stdout
    assert "3 timings deleted" in run("prune", "--db", db, "--failed").stdout
    with sqlite3.connect(db) as connection:
        connection.execute("UPDATE timing SET code = '0123456789ab' WHERE is_default")
    connection.close()
    assert "3 timings deleted" in run("prune", "--db", db).stdout
    with Store.open(db, readonly=True) as store:
        assert [row.config for row in store.timings()] == [B] * 3 and store.check() == []


# --- doctor ---


def test_doctor_reports_and_finds(db: Path, tmp_path: Path) -> None:
    report = said("doctor", MOECACHE_DB=str(db), MOECACHE_BUDGET="7s")
    assert set(report) == {"versions", "backends", "environment", "ops", "settings", "files", "findings", "next"}
    assert [each["name"] for each in report["backends"]] == ["cuda", "hip", "cpu"]
    assert all(bool(each["devices"]) != bool(each["reason"]) for each in report["backends"])
    assert report["environment"]["id"] == Places().first().environment.id
    assert report["ops"]["moe_sort"] == code.whole("moe_sort")
    origins = {each["name"]: (each["value"], each["from"]) for each in report["settings"]}
    assert origins["tune_budget"][0] == "300 s" and origins["tune_gib"][0] == "2 GiB"
    assert origins["budget"] == ("7 s", "MOECACHE_BUDGET") and origins["db"] == (str(db), "MOECACHE_DB")
    assert origins["mode"] == ("tune", "default") and set(origins) == set(Settings.__dataclass_fields__)
    assert report["files"][0]["stats"]["timings"] == 9 and report["findings"] == []
    assert "3 winners, 9 timings" in run("doctor", MOECACHE_DB=str(db)).stdout
    assert {e["name"]: e["from"] for e in said("doctor", "--db", db)["settings"]}["db"] == "--db"


def test_doctor_says_what_to_do_next(db: Path, tmp_path: Path) -> None:
    assert any("moecache warm CONFIG" in step for step in said("doctor")["next"])
    assert any("moecache verify --sample" in step for step in said("doctor", "--db", db)["next"])
    assert "  1  `moecache ls` lists the winners" in run("doctor", "--db", db).stdout
    with Store.open(db) as store:
        store.want([problem(64)])
        store.want([problem(64, op="moe_sort")])
    steps = said("doctor", "--db", db)["next"]
    assert steps[:2] == [
        "1 wanted problem of built-in ops: `moecache warm --wanted` measures",
        "1 wanted problem of my_gemm: its program measures in mode tune, outside a graph's capture",
    ]
    assert ops.names()[:3] == list(OPS)
    assert "next" not in run("doctor", "--db", tmp_path, code=1).stdout


def test_doctor_finds_a_cache_file_that_cannot_be_written(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for closed in (db, db.parent):
        monkeypatch.setattr("os.access", lambda path, mode, closed=closed: Path(path) != closed)
        (finding,) = examine({}, db).findings
        assert f"{db} cannot be written" in finding and "MOECACHE_MODE=replay" in finding
        assert examine({"MOECACHE_MODE": "replay"}, db).findings == []


def test_doctor_survives_what_is_wrong(tmp_path: Path) -> None:
    foreign = tmp_path / "notes.txt"
    foreign.write_text("not a cache")
    env = {"MOECACHE_MODE": "fast", "MOECACHE_DB": str(foreign)}
    text = run("doctor", "--db", foreign, code=1, **env).stdout
    assert "MOECACHE_MODE='fast'" in text and f"{foreign}: unusable" in text
    for wrong in (foreign / "x.sqlite", tmp_path / ("x" * 300), tmp_path / "loop"):
        (tmp_path / "loop").is_symlink() or (tmp_path / "loop").symlink_to("loop")
        (finding,) = json.loads(run("doctor", "--db", wrong, "--json", code=1).stdout)["findings"]
        assert str(wrong) in finding
    gone = tmp_path / "gone.sqlite"
    assert str(gone) in " ".join(examine({"MOECACHE_PATH": str(gone)}).findings)


# --- mistakes ---

ODD = "op={} vendor={} arch={} units=132 tokens=4 experts=8 topk=2"
HUGE = f"op=moe_sort vendor=cpu arch=x units=1 tokens={10**20} experts=8 topk=2"
MISTAKES = [
    (1, ["warm", "nope.json"], ["nope.json"]),
    (1, ["warm", MODEL, "--op", "my_op"], ["'my_op'", "moe_sort"]),
    (1, ["warm", MODEL, "--dtype", "int3"], ["'int3'", "bf16"]),
    (1, ["warm", MODEL, "--tp", "7"], ["tp=7", "768", "1, 2, 3"]),
    (1, ["warm", "org/some-7B"], ["org/some-7B is no file", "hf download org/some-7B config.json"]),
    (1, ["warm", SIZES + ",activation=sine"], ["'sine'", "silu, gelu"]),
    (1, ["explain", SIZES.replace("topk=2", "topk=9")], ["topk=9", "experts=8"]),
    (2, ["warm", "experts=8,topk=2"], ["lacks a size", "hidden=N,intermediate=N"]),
    (2, ["warm", SIZES.replace("8", "many")], ["experts=many", "lacks a size"]),
    (2, ["ls", "colour=red"], ["'colour=red' is no FIELD=VALUES", "tokens"]),
    (2, ["ls", "tokens"], ["'tokens' is no FIELD=VALUES"]),
    (2, ["ls", "tokens=16,"], ["'tokens=16,' is no FIELD=VALUES"]),
    (2, ["export", "x.sqlite", "tokens=16,many"], ["'many' is no whole number"]),
    (2, ["report", "x.html", "op=moe_sort", "op=fused_moe"], ["op comes twice", "op=A,B"]),
    (2, ["ls", "units=" + "9" * 20, "--db", "x.sqlite"], ["9" * 20, "at most"]),
    (2, ["ls", f"tokens={(1 << 63) - 1}"], [str(1 << 63), "at most"]),
    (2, ["explain", "--key", "colour=red"], ["'colour=red' is no FIELD=VALUES"]),
    (2, ["explain", ""], ["CONFIG", "empty"]),
    (2, ["warm", SIZES + ",topk=1"], ["topk=1", "twice"]),
    (2, ["export", "folder"], ["'folder' ends in nothing", ".sqlite"]),
    (1, ["import", "notes.txt", "--from", "vllm"], ["notes.txt", "no table", "E=8,N="]),
    (1, ["import", "nope", "--from", "vllm"], ["nope is no file and no folder"]),
    (2, ["export", "x.json"], ["'.json'", ".sqlite"]),
    (1, ["export", "gone/x.sqlite", "--db", "nope.sqlite"], ["nope.sqlite"]),
    (2, ["import", "x"], ["--from"]),
    (1, ["prune", "--db", "."], ["is a folder"]),
    (1, ["prune", "--db", "nope.sqlite"], ["nope.sqlite"]),
    (2, ["warm", MODEL, "--tokens", "99999999999"], ["--tokens", "99999999999", "from 1 to 131072"]),
    (2, ["explain", MODEL, "--tokens", "0"], ["--tokens", "0 is not allowed", "from 1 to 131072"]),
    (2, ["warm", MODEL, "--tokens", "1,,2"], ["--tokens", "'1,,2'", "1,16,256"]),
    (2, ["warm"], ["CONFIG", "--wanted"]),
    (2, ["warm", MODEL, "--tokens", "1,many"], ["'1,many'", "1,16,256"]),
    (2, ["warm", MODEL, "--tokens", "-4"], ["--tokens"]),
    (2, ["warm", MODEL, "--routing", ","], ["--routing", "uniform"]),
    (2, ["warm", MODEL, "--budget", "soon"], ["'soon'", "60s"]),
    (1, ["warm", MODEL, "--ep", "0"], ["ep=0", "1 to 128"]),
    (2, ["warm", MODEL, "--ep", "two"], ["--ep", "two"]),
    (2, ["ls", "--colour"], ["--colour"]),
    (2, ["list"], ["'list'"]),
    (1, ["ls", "--db", "nope.sqlite"], ["nope.sqlite", "warm"]),
    (1, ["ls", "--db", "notes.txt"], ["notes.txt"]),
    (1, ["merge", "notes.txt", "--db", "new.sqlite"], ["notes.txt"]),
    (1, ["merge", "nope.sqlite", "--db", "new.sqlite"], ["nope.sqlite"]),
    (2, ["explain"], ["--key"]),
    (1, ["ls", "--db", "."], ["is a folder", "moecache.sqlite"]),
    (1, ["explain", "--key", HUGE], ["tokens", "too many"]),
    (1, ["explain", "--key", HUGE + " op=fused_moe"], ["'op' comes twice"]),
    (1, ["explain", "--key", HUGE + " dims.a=1 dims.a=2"], ["'dims.a' comes twice"]),
    (2, ["ls", "--db", "a\0b"], ["embedded null"]),
    (1, ["explain", "--key", ODD.format("fused_moe", "nvidia", "sm_90")], ["op fused_moe knows no problem op="]),
    (1, ["explain", "--key", ODD.format("grouped_gemm", "amd", "gfx942")], ["op grouped_gemm knows no problem op="]),
    (1, ["explain", "--key", ODD.format("fused_moe", "cpu", "x") + " dtype=zz"], ["op fused_moe knows no problem op="]),
]


@pytest.mark.parametrize(
    ("code", "arguments", "named"),
    MISTAKES,
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else str(value),
)
def test_a_mistake_is_one_line_that_names_it(
    db: Path, monkeypatch: pytest.MonkeyPatch, code: int, arguments: list[Any], named: list[str]
) -> None:
    monkeypatch.chdir(db.parent)
    Path("notes.txt").write_text("not a cache")
    Path("deep.json").write_text("[" * 100_000)
    done = run(*arguments, code=code)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("moecache: ")
    assert all(text in done.stderr for text in named), done.stderr
    assert not Path("nope.sqlite").exists() and Path("notes.txt").read_text() == "not a cache"


def test_wrong_files_in_variables_get_advice_that_helps(db: Path, tmp_path: Path) -> None:
    error = run("ls", code=1, MOECACHE_DB=str(tmp_path)).stderr
    assert f"{tmp_path} is a folder" in error and str(tmp_path / "moecache.sqlite") in error
    error = run("ls", "--json", MOECACHE_DB=str(db), MOECACHE_PATH=str(tmp_path / "gone.sqlite")).stderr
    assert "MOECACHE_PATH names it" in error and "warm" not in error and error.count("\n") == 1
    found = json.loads(run("doctor", "--json", code=1, MOECACHE_DB=str(tmp_path)).stdout)["findings"]
    assert len(found) == 1 and f"{tmp_path} is a folder" in found[0]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MOECACHE_MDOE", "is MOECACHE_MODE meant?"),
        ("MOECACHE_BUDGET_S", "is MOECACHE_BUDGET meant?"),
        ("MOECACHE_COLOUR", "known are MOECACHE_MODE"),
    ],
)
def test_a_misspelt_variable_is_one_warning_and_a_finding(db: Path, name: str, meant: str) -> None:
    error = run("ls", "--db", db, **{name: "replay"}).stderr
    assert error.count("\n") == 1 and name in error and meant in error
    done = run("doctor", "--db", db, "--json", code=1, **{name: "replay"})
    found = json.loads(done.stdout)["findings"]
    assert len(found) == 1 and name in found[0] and meant in found[0] and done.stderr == ""


def test_a_malformed_variable_is_one_line(db: Path) -> None:
    error = run("ls", code=1, MOECACHE_STRICT="perhaps").stderr
    assert error.count("\n") == 1 and "MOECACHE_STRICT='perhaps'" in error
    error = run("warm", MODEL, code=1, MOECACHE_MODE="replay").stderr
    assert error.count("\n") == 1 and "MOECACHE_MODE=replay" in error


# --- warm ---


def test_warm_measures_once_and_then_says_so(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    what = ("--tokens", "1,16", "--routing", "uniform", "--op", "moe_sort")
    arguments = ["warm", MODEL, "--db", path, *what, "--budget", "10s"]
    done = run(*arguments)
    told, table, summary = done.stdout.split("\n\n")
    assert told == "qwen3-30b-a3b: 128 experts, top-8, 2048 × 768, silu, bf16, 48 layers"
    with Store.open(path, readonly=True) as store:
        stored = {winner.problem.id: winner for winner in store.winners()}
        tried = len(store.timings())
    shown = cells(table)
    assert len(shown) == 4 == len(stored)
    assert {(w.problem.tokens, w.problem.dtype) for w in stored.values()} == {
        (tokens, dtype) for tokens in (1, 16) for dtype in ("int32", "int64")
    }
    for row in shown:
        winner = stored[row["id"]]
        assert row["tier"] == "measured" and row["winner"] == winner.config.name
        assert row["µs"] == f"{winner.median_us:.2f}" and row["default µs"] == f"{winner.default_us:.2f}"
        assert winner.margin is not None and row["gain %"] == f"{100 * winner.margin:+.1f}"
    assert f"measured 4 problems ({tried} candidates)" in summary and str(path) in summary
    assert re.findall(r"^\[(\d)/4\] moe_sort tokens=(\d+)", done.stderr, re.MULTILINE) == [
        ("1", "1"), ("2", "1"), ("3", "16"), ("4", "16"),
    ]  # fmt: skip

    again = run(*arguments)
    assert (
        f"nothing to measure: 4 problems known in {path}" in again.stdout
        and told in again.stdout
        and again.stderr == ""
    )
    found = said(*arguments)
    assert set(found[0]) == {
        "id",
        "key",
        "config",
        "us",
        "default_us",
        "margin",
        "tier",
        "measured",
        "reason",
    }
    assert [each["measured"] for each in found] == [0] * 4 and {each["tier"] for each in found} == {"measured"}
    assert {each["id"]: each["us"] for each in found} == {id: w.median_us for id, w in stored.items()}


def test_warm_says_what_the_budget_left_out(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    what = ("--tokens", "1,16", "--routing", "uniform", "--op", "moe_sort")
    done = run("warm", MODEL, "--db", path, *what, "--budget", "0s")
    assert "not measured: 4 problems, as the budget is spent" in done.stdout
    assert {row["tier"] for row in cells(done.stdout.split("\n\n")[1])} <= {"predicted", "default"}


def test_an_unknown_routing_is_named_after_what_was_read(tmp_path: Path) -> None:
    done = run("warm", MODEL, "--db", tmp_path / "x", "--tokens", "1", "--routing", "sideways", code=1)
    assert done.stdout.startswith("qwen3-30b-a3b: ")
    assert done.stderr.startswith("moecache: ") and all(w in done.stderr for w in ("'sideways'", "uniform", "zipf"))


def test_warm_says_what_is_left_out_of_a_model(tmp_path: Path) -> None:
    path, model = tmp_path / "new.sqlite", tmp_path / "int4.json"
    said = {"quant_method": "awq", "bits": 4}
    model.write_text(json.dumps({**json.loads(MODEL.read_text()), "quantization_config": said}))
    what = ("--db", path, "--tokens", "1", "--routing", "uniform")
    lines = [
        "int4: 128 experts, top-8, 2048 × 768, silu, int4, 48 layers",
        "fused_moe is left out: there are no kernels for int4 weights; dtype bf16 tunes the layer in bf16",
    ]
    assert run("warm", model, *what).stdout.splitlines()[:2] == lines
    assert run("warm", model, *what, "--op", "moe_sort,fused_moe", code=1).stdout.splitlines()[:2] == lines
    assert run("warm", model, *what, "--op", "fused_moe", code=1).stdout.split() == " ".join(lines).split()
    beside = run("warm", model, *what, "--json")
    assert beside.stderr.splitlines()[:2] == lines and {row["tier"] for row in json.loads(beside.stdout)} == {
        "measured"
    }
    assert run("explain", model, *what, "--op", "fused_moe", code=1).stdout.splitlines()[:2] == lines
    assert "moe_sort" in run("explain", model, *what).stdout


def test_a_model_without_a_file_is_given_by_its_sizes(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    what = ("--db", path, "--tokens", "4", "--routing", "uniform", "--op", "moe_sort", "--ep", "3")
    done = run("warm", SIZES, *what, "--budget", "20s")
    assert done.stdout.splitlines()[:2] == [
        f"layer: {mine} of 8 experts, top-2, 64 × 32, silu, bf16, 1 layer" for mine in (3, 2)
    ]
    with Store.open(path, readonly=True) as store:
        asked = {(w.problem.experts, w.problem.dtype) for w in store.winners()}
    assert asked == {(8, dtype) for dtype in ("int32", "int64")}
    found = run("explain", SIZES + ",activation=relu2", "--tokens", "1", "--op", "moe_sort", "--db", path)
    assert found.stdout.startswith("layer: 8 experts, top-2, 64 × 32, relu2 without gate, bf16, 1 layer\n")


def test_warm_wanted_measures_what_calls_have_met(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    place = Places().here("cpu", 0)
    op = ops.get("moe_sort")
    asked = problem(16, op="moe_sort", vendor="cpu", arch=place.device.arch, units=place.device.units, source=op.source)
    with Store.open(path) as store:
        store.want([asked])
    assert "warm --wanted" in run("doctor", "--db", path).stdout
    found = said("warm", "--wanted", "--db", path, "--budget", "5s")
    assert [(each["key"], each["tier"]) for each in found] == [(asked.key, "measured")] and found[0]["measured"] > 0
    assert said("warm", "--wanted", "--db", path) == []


def process(*arguments: object, **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "moecache", *map(str, arguments)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | env,
    )  # fmt: skip


def test_ctrl_c_keeps_the_finished_problems(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    every = ",".join(str(1 << k) for k in range(12))
    warm = process("warm", MODEL, "--db", path, "--op", "moe_sort", "--tokens", every, "--routing", "uniform,zipf,hot1")
    assert warm.stderr is not None
    for line in warm.stderr:
        if line.startswith("[3/"):
            break
    warm.send_signal(signal.SIGINT)
    out, error = warm.communicate(timeout=600)
    assert warm.returncode == 130 and "qwen3-30b-a3b: 128 experts" in out and "Traceback" not in error
    told = r"interrupted after (\d+) of (\d+) problems, kept in (\S+); the same command goes on from there"
    done = re.search(told, error)
    assert done is not None and done[3] == str(path) and 2 <= int(done[1]) < int(done[2])
    with Store.open(path) as store:
        assert store.check() == [] and len(store.winners()) == int(done[1])
    resumed = run("warm", MODEL, "--db", path, "--op", "moe_sort", "--tokens", "1", "--routing", "uniform")
    assert "nothing to measure" in resumed.stdout


# --- start, pipes, terminals ---

PROBE = """
import runpy, sys
sys.argv = ["moecache", "ls"]
try:
    runpy.run_module("moecache", run_name="__main__")
except SystemExit as done:
    print(done.code, *{"torch", "triton", "numpy", "sqlite_utils", "rich"} & set(sys.modules), file=sys.stderr)
"""


def test_ls_imports_nothing_heavy(db: Path) -> None:
    env = os.environ | {"MOECACHE_DB": str(db)}
    probe = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert probe.stderr == "0\n" and len(probe.stdout.splitlines()) == 4


def shell(command: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """A line of bash in which `moecache` is this one; the exit code is that of the first command of a pipe to fail."""
    line = f'set -o pipefail; moecache() {{ {sys.executable} -m moecache "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


def test_a_reader_may_go_away(tmp_path: Path) -> None:
    path = tmp_path / "many.sqlite"
    with Store.open(path) as store:
        store.put([timing(problem(1 << k, experts=e), A, 5.0) for k in range(12) for e in range(8, 108)])
    done = shell(f"moecache ls --db {path} | head -1")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("id ")
    done = shell(f"moecache ls --db {path} --json | head -1; moecache --help | true; moecache ls --help | true")
    assert done.returncode == 0 and done.stderr == ""


EVERY = [  # each command, so that it prints something
    "ls --db {db}", "explain --db {db} --key {key}", "doctor --db {db}", "export {db}.out.db --db {db}",
    "merge {db} --db {db}.new", "verify --db {db}", "report {db}.htm --db {db}", "prune --db {db}", "ls --help",
    "--version", "warm {model} --op moe_sort --tokens 1 --routing uniform --budget 9s --db {db}.new", "ls --tokens x",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", drawn(EVERY, 5), ids=lambda command: command.split()[0])
def test_closed_streams_change_no_exit_code(db: Path, command: str) -> None:
    command = command.format(db=db, model=MODEL, key=f"'{problem(16).key}'")
    closed = shell(f"moecache {command} >&-")
    assert closed.returncode == (2 if "--tokens x" in command else 0) and closed.stdout == ""
    assert not re.search("Traceback|Exception|Errno", closed.stderr)
    with Store.open(db, readonly=True) as store:
        assert store.check() == [] and len(store.winners()) == 3


@pytest.mark.parametrize("ends", ["2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_notes_that_nobody_reads_are_lost(db: Path, ends: str) -> None:
    done = shell(f"moecache ls --db {db} op=none --json {ends}")
    assert (done.returncode, done.stderr) == (1, "") and done.stdout == ("" if ">&- " in ends else "[]\n")
    done = shell(f"moecache ls --db {db}.none {ends}")
    assert (done.returncode, done.stderr, done.stdout) == (1, "", "")


@pytest.mark.parametrize("command", ["ls --db {db}", "--help"])
def test_what_cannot_be_printed_is_one_line(db: Path, command: str) -> None:
    done = shell(f"moecache {command.format(db=db)} > /dev/full")
    assert done.returncode == 1 and done.stderr == "moecache: input or output: No space left on device\n"


def test_an_encoding_without_micro_signs_escapes_them(db: Path) -> None:
    done = shell(f"moecache ls --db {db}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == "" and "\\xb5s" in done.stdout


def test_a_terminal_gets_a_table_for_each_layer(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(db) as store:
        store.put([timing(problem(8192, dims={"block_m": 64}), C, 5.0)])
    with Store.open(db, readonly=True) as store:
        won = [(each.problem, tables.of_winner(each, str(db))) for each in store.winners(arch="sm_90")]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    head, titles, *lines = tables.lines(won)
    assert head == "my_gemm on nvidia sm_90, 132 SMs: 128 experts, top-8, int32"
    assert titles.split()[:4] == ["id", "tokens", "routing", "dims"] and titles.endswith("winner")
    assert len(lines) == 3 and all(line.endswith(")") and "block_m=" in line for line in lines)


@pytest.mark.parametrize("seconds", [0.4, 0.9])
def test_ctrl_c_while_loading_is_quiet(tmp_path: Path, seconds: float) -> None:
    warm = process("warm", MODEL, "--db", tmp_path / "new.sqlite")
    time.sleep(seconds)  # moecache loads, torch loads; a slower machine is earlier in it
    warm.send_signal(signal.SIGINT)
    out, error = warm.communicate(timeout=600)
    assert warm.returncode in (130, -signal.SIGINT) and out == "" and "Traceback (most recent" not in error


def test_a_swallowed_ctrl_c_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), progress.Meter(Path("x.sqlite")) as news:
        news(Progress(1, 2, problem(16), "", 0.0, None))
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        news(Progress(1, 2, problem(16), "timing", 0.0, None))
    assert "interrupted after 1 of 2 problems, kept in x.sqlite" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (4800, "1 h 20 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_the_meter_estimates_and_concludes(capsys: pytest.CaptureFixture[str]) -> None:
    known = WarmRow(problem(1), A, 1.0, 1.0, 0.0, "measured", 0, "known")
    failed = WarmRow(problem(2), A, None, None, None, "default", 0, "static; not measured: no memory")
    with progress.Meter(Path("x.sqlite")) as news:
        news(Progress(0, 2, problem(16), "", 0.0, None))
        news(Progress(0, 2, problem(16), "timing", 1.0, None))
        news(Progress(1, 2, problem(64), "", 75.0, 61.0))
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] my_gemm tokens=16 routing=a0e0 (0 s)",
        "[2/2] my_gemm tokens=64 routing=a0e0 (1 min 15 s, about 1 min 01 s left)",
    ]
    assert news.conclude([known]) == ["nothing to measure: 1 problem known in x.sqlite"]
    assert news.conclude([]) == ["nothing to measure: x.sqlite names no problem"]
    assert news.conclude([known, failed]) == ["not measured: 1 problem, as no memory"]


def test_files_are_asked_in_order(tmp_path: Path) -> None:
    (tmp_path / "prebuilt").mkdir()
    settings = Settings(db=tmp_path / "u.sqlite", path=(tmp_path / "a.sqlite", tmp_path / "b.sqlite"))
    assert [(file.role, file.path.name) for file in settings.files()] == [
        ("user", "u.sqlite"), ("path", "a.sqlite"), ("path", "b.sqlite"),
    ]  # fmt: skip
    assert [file.role for file in Settings(db=Path(":memory:")).files()] == []


def test_explain_leaves_files_as_they_are(tmp_path: Path) -> None:
    damaged, absent = tmp_path / "damaged.sqlite", tmp_path / "absent.sqlite"
    damaged.write_bytes(b"SQLite format 3\0" + bytes(9000))
    sizes = ["experts=4,topk=2,hidden=8,intermediate=8", "--tokens", "1"]
    for file, why in (damaged, "it is damaged"), (absent, "there is no cache file"):
        told = CliRunner().invoke(app, ["explain", *sizes, "--db", str(file)]).stderr
        assert why in told and str(file) in told
    assert [file.name for file in tmp_path.iterdir()] == ["damaged.sqlite"]
