"""`verify --sample`: winners timed again beside their rivals; toys take the time that they are told to."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from toy import A, B, C, CapturingBackend, Toy, ToyClock, timing

from moecache import routing
from moecache.cli import app
from moecache.cli.verify import tables, words
from moecache.devices import Places
from moecache.dispatch import Dispatcher
from moecache.kernels import registry as ops
from moecache.schemas.config import Config, config
from moecache.schemas.errors import DeviceLost
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing, Winner
from moecache.settings import MEMORY, Settings
from moecache.store import Store
from moecache.verify.retiming import Drift, retime, spread

D = config("other", block=8)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy()
    monkeypatch.setitem(ops._wrapped, toy.name, toy)
    return toy


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MODE", "DB", "PATH", "BUDGET", "STRICT", "ISOLATE"):
        monkeypatch.delenv(f"MOECACHE_{name}", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("moecache.settings.PREBUILT", tmp_path / "prebuilt")


@pytest.fixture
def here() -> Environment:
    return Places(CapturingBackend()).here("cpu", 0).environment


def again(toy: Toy, stored: Sequence[Timing], **options: Any) -> Drift:
    """Stored timings, then what the toy takes now."""
    serving = Dispatcher(Settings(db=MEMORY, budget=5.0), CapturingBackend(), ToyClock(toy))  # type: ignore[arg-type]
    with Store.memory() as store:
        store.put(stored)
        before = store.timings()
        drift = retime(store, serving, **{"count": 20, **options})
        assert store.timings() == before
    serving.close()
    return drift


def usual(problem: Problem, where: Environment) -> list[Timing]:
    """C wins, B is behind it, A is the default."""
    rows = [timing(problem, A, 30.0, where, is_default=True), timing(problem, B, 20.0, where)]
    return [*rows, timing(problem, C, 8.0, where)]


# --- the verdict


def test_a_winner_that_still_wins_is_no_finding_however_slow_it_became(toy: Toy, here: Environment) -> None:
    toy.times = {A: 300.0, B: 200.0, C: 100.0}
    drift = again(toy, usual(toy.problem(), here))
    (row,) = drift.rows
    assert (row.state, row.loss, row.reason, row.here) == ("wins", 0.0, "", True)
    assert (row.winner.config, row.winner.stored_us, row.winner.us, row.ratio) == (C, 8.0, 100.0, 12.5)
    assert row.runner_up is not None and (row.runner_up.config, row.runner_up.us) == (B, 200.0)
    assert (row.default.config, row.default.stored_us, row.default.us) == (A, 30.0, 300.0)
    assert drift.geomean == pytest.approx(12.5)
    assert (drift.eligible, drift.share, drift.findings, drift.skipped) == (1, 1.0, [], {})


def test_a_winner_that_loses_is_a_finding_past_the_tolerance(toy: Toy, here: Environment) -> None:
    toy.times = {A: 30.0, B: 10.0, C: 12.0}
    stored = usual(toy.problem(), here)
    for tolerance, found in ((0.19, 1), (0.21, 0)):
        drift = again(toy, stored, tolerance=tolerance)
        (row,) = drift.rows
        assert row.state == "loses" and row.loss == pytest.approx(0.2) and drift.share == 0.0
        assert len(drift.findings) == found
    (finding,) = again(toy, stored, tolerance=0.1).findings
    assert toy.problem().id in finding and C.name in finding and "now 12.00 µs, 10.00 with plain(block=2)" in finding


def test_the_default_is_a_rival_too(toy: Toy, here: Environment) -> None:
    toy.times = {A: 5.0, B: 20.0, C: 10.0}
    (row,) = again(toy, usual(toy.problem(), here)).rows
    assert row.state == "loses" and row.loss == pytest.approx(1.0) and A.name in row.reason


def test_within_the_tie_band_nobody_loses(toy: Toy, here: Environment) -> None:
    toy.times = {A: 30.0, B: 10.0, C: 10.07}
    drift = again(toy, usual(toy.problem(), here), tolerance=0.0)
    assert drift.rows[0].state == "ties" and drift.rows[0].loss == pytest.approx(0.007) and drift.findings == []
    toy.times[C] = 10.15
    drift = again(toy, usual(toy.problem(), here), tolerance=0.0)
    assert drift.rows[0].state == "loses" and len(drift.findings) == 1


def test_a_winner_that_fails_is_a_finding_whatever_the_tolerance(toy: Toy, here: Environment) -> None:
    toy.wrong = {C}
    drift = again(toy, usual(toy.problem(), here), tolerance=99.0)
    assert drift.rows[0].state == "fails" and drift.rows[0].winner.us is None and drift.geomean is None
    assert drift.share == 0.0 and "wrong" in drift.findings[0]


def test_a_rival_that_fails_leaves_the_winner(toy: Toy, here: Environment) -> None:
    toy.raises = {A: RuntimeError("no"), B: RuntimeError("no")}
    (row,) = again(toy, usual(toy.problem(), here)).rows
    assert row.state == "wins" and row.winner.us == 10.0 and row.default.us is None
    assert row.runner_up is not None and row.runner_up.us is None


def lose(monkeypatch: pytest.MonkeyPatch, culprit: Config) -> None:
    """The device is lost at every measurement, by this config."""

    def measure(serving: Dispatcher, op: object, problem: Problem) -> list[Timing]:
        lost = DeviceLost("it hangs; restart the process")
        fields: dict[str, Any] = {"problem": problem, "environment": Environment()}
        lost.timings = (Timing(config=culprit, status="timeout", reason="no answer", **fields),)
        raise lost

    monkeypatch.setattr(Dispatcher, "measure", measure)


def test_a_winner_that_loses_the_device_is_a_finding(
    toy: Toy, here: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(monkeypatch, C)
    drift = again(toy, usual(toy.problem(), here))
    assert drift.rows[0].state == "fails" and "timeout: no answer" in drift.findings[0]


def test_where_a_rival_loses_the_device_the_rest_is_skipped(
    toy: Toy, here: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(monkeypatch, A)
    drift = again(toy, [t for tokens in (16, 64) for t in usual(toy.problem(tokens), here)])
    assert drift.rows == () and drift.findings == [] and drift.skipped == {"it hangs; restart the process": 2}


def test_only_the_winner_its_runner_up_and_the_default_are_timed(toy: Toy, here: Environment) -> None:
    toy.times |= {D: 1.0}
    (row,) = again(toy, [*usual(toy.problem(), here), timing(toy.problem(), D, 25.0, here)]).rows
    assert {tried for tried, _ in toy.launches} == {A, B, C} and row.state == "wins"


def test_what_a_file_behind_says_is_no_rival(toy: Toy, here: Environment, tmp_path: Path) -> None:
    toy.times |= {D: 1.0}
    behind = tmp_path / "behind.sqlite"
    with Store.open(behind) as store:
        store.put([timing(toy.problem(), D, 1.0, here)])
    settings = Settings(db=MEMORY, path=(behind,), budget=5.0)
    with Store.memory() as store:
        store.put(usual(toy.problem(), here))
        active = Dispatcher(settings, CapturingBackend(), ToyClock(toy))  # type: ignore[arg-type]
        (row,) = retime(store, active, count=1).rows
    assert row.state == "wins" and row.loss == 0.0


def test_a_default_that_wins_is_timed_beside_its_runner_up(toy: Toy, here: Environment) -> None:
    p = toy.problem()
    (row,) = again(toy, [timing(p, A, 9.0, here, is_default=True), timing(p, B, 9.5, here)]).rows
    assert row.winner.config == row.default.config == A and row.state == "loses"
    assert {tried for tried, _ in toy.launches} == {A, B}


def test_it_is_timed_with_the_routing_of_its_bucket(toy: Toy, here: Environment) -> None:
    again(toy, usual(toy.problem(256, "a1e1"), here))
    assert {routing.bucket(routing.histogram(ids, 8)) for ids in toy.seen_ids} == {"a1e1"}
    assert all(isinstance(ids, torch.Tensor) and tuple(ids.shape) == (256, 2) for ids in toy.seen_ids)


# --- what is drawn


def test_what_cannot_be_timed_here_is_counted_with_its_reason(toy: Toy, here: Environment) -> None:
    other = Environment(device_name="another")
    stored = [
        *usual(toy.problem(), here),
        *usual(toy.problem(), other),
        *usual(toy.problem(4, units=3), here),
        *usual(toy.problem(8, vendor="nvidia", arch="sm_1"), here),
        *usual(toy.problem(32, op="nobody_knows"), here),
        *usual(toy.problem(64, source="v0"), here),
        timing(toy.problem(128), D, 1.0, here),
    ]
    drift = again(toy, sorted(stored, key=lambda t: t.problem.tokens))
    assert [row.problem.tokens for row in drift.rows] == [16] and drift.rows[0].here and drift.eligible == 1
    reasons = ["3 units is not here", "sm_1 with", "nobody_knows is not built in", "code that has changed since"]
    reasons += ["may not serve any more", "of another environment too"]
    assert sorted(drift.skipped.values()) == [1] * 6
    assert all(any(reason in why for why in drift.skipped) for reason in reasons), drift.skipped


def test_a_winner_of_another_environment_is_timed_where_there_is_no_other(toy: Toy) -> None:
    (row,) = again(toy, usual(toy.problem(), Environment(device_name="another"))).rows
    assert not row.here and row.state == "wins" and row.ratio == 1.25


def pool() -> list[Winner]:
    made = []
    for op in ("x", "y", "z"):
        for tokens in (1, 16, 256, 4096):
            for bucket in ("a0e0", "a0e2"):
                p = Problem(
                    op=op, vendor="cpu", arch="x86_64", units=1, tokens=tokens, experts=8, topk=2, routing=bucket
                )
                made.append(Winner(problem=p, config=A, environment=Environment(), median_us=1.0, mad_us=0.0, n=1))
    return made


def test_the_sample_is_spread_and_repeats_itself() -> None:
    drawn = spread(pool(), 12, 7)
    assert drawn == spread(list(reversed(pool())), 12, 7) and len(set(drawn)) == 12
    for op in ("x", "y", "z"):
        asked = [w.problem for w in drawn if w.problem.op == op]
        assert sorted(p.tokens for p in asked) == [1, 16, 256, 4096]
        assert sorted(p.routing for p in asked) == ["a0e0", "a0e0", "a0e2", "a0e2"]
    assert len({tuple(spread(pool(), 12, seed)) for seed in range(5)}) > 1
    assert len(spread(pool(), 99, 0)) == 24 and spread([], 5, 0) == []


def test_no_more_are_timed_than_asked_for(toy: Toy, here: Environment) -> None:
    stored = [t for tokens in (1, 16, 64, 256) for t in usual(toy.problem(tokens), here)]
    told: list[str] = []
    drift = again(toy, stored, count=2, tell=told.append)
    assert (len(drift.rows), drift.eligible) == (2, 4) and [line[:5] for line in told] == ["[1/2]", "[2/2]"]
    assert words(drift)[0] == "timed again: 2 of 4 winners that can be, seed 0"
    ((_, listed),) = tables(drift, fitted=False)
    assert len(listed.rows) == 2


# --- the command, with the clock of the CPU, whose time is what candidates nap


@dataclass
class Napping(Toy):
    """Takes its time, whatever the machine takes."""

    napped = 0  # ns

    def launch(self, config: Config, args: Any, out: torch.Tensor) -> torch.Tensor:
        Napping.napped += round(self.times[config] * 1e3)
        return super().launch(config, args, out)


@pytest.fixture
def db(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: Environment) -> Path:
    """C was the winner; now it takes thrice as long as B."""
    napping = Napping(times={A: 4000.0, B: 1000.0, C: 3000.0})
    monkeypatch.setitem(ops._wrapped, napping.name, napping)
    monkeypatch.setattr("moecache.backends.cpu.time", SimpleNamespace(perf_counter_ns=lambda: Napping.napped))
    path = tmp_path / "x.sqlite"
    with Store.open(path) as store:
        store.put(usual(napping.problem(), here))
    return path


def run(*arguments: object, code: int = 0, **env: str) -> Result:
    done = CliRunner(env=env).invoke(app, [str(each) for each in arguments], prog_name="moecache")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, (arguments, done.exit_code, done.output)
    return done


def test_verify_fails_when_winners_lose_and_leaves_the_file_alone(db: Path) -> None:
    before = db.read_bytes()
    assert "drift" not in json.loads(run("verify", "--db", db, "--json").stdout)[0]
    (found,) = json.loads(run("verify", "--db", db, "--sample", "--json", code=1).stdout)
    assert set(found) == {"file", "findings", "notes", "drift"} and len(found["findings"]) == 1
    drift = found["drift"]
    assert set(drift) == {"seed", "tolerance", "eligible", "geomean", "still_winning", "rows", "skipped"}
    (row,) = drift["rows"]
    assert (drift["tolerance"], drift["still_winning"], row["state"], row["here"]) == (0.05, 0.0, "loses", True)
    assert row["winner"]["stored_us"] == 8.0 and row["winner"]["us"] == 3000.0 and row["ratio"] > 300
    assert row["runner_up"]["config"]["params"] == {"block": 2} and 1 < row["loss"] < 4
    text = run("verify", "--db", db, "--sample", "1", "--tolerance", "900").stdout
    assert "no findings" in text and "still winning: 0 of 1" in text and " loses " in text
    assert db.read_bytes() == before and [file.name for file in db.parent.iterdir()] == [db.name]


def test_sample_takes_a_number_or_none(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fake(store: Store, serving: Dispatcher, *, count: int, **_: Any) -> Drift:
        asked.append(count)
        return Drift(0, 0.05, 0, (), {})

    monkeypatch.setattr("moecache.verify.retiming.retime", fake)
    for arguments in (["--sample"], ["--sample", "--json"], ["--sample", "7"], ["--sample=8"], ["--seed", "1"]):
        run("verify", "--db", db, *arguments)
    assert asked == [20, 20, 7, 8]
    assert "timed again: none of its winners" in run("verify", "--db", db, "--sample").stdout
    assert "'x' is no whole number" in run("verify", "--db", db, "--sample", "x", code=2).stderr
    assert "'x' is no share" in run("verify", "--db", db, "--tolerance", "x", code=2).stderr


def test_where_nothing_may_be_measured_nothing_is(db: Path) -> None:
    assert (
        "MOECACHE_MODE=replay forbids" in run("verify", "--sample", "--db", db, code=1, MOECACHE_MODE="replay").stderr
    )
    run("verify", "--db", db, MOECACHE_MODE="replay")


def test_a_noisy_machine_is_told_at_the_end(toy: Toy, here: Environment) -> None:
    drift = again(toy, usual(toy.problem(), here))
    assert drift.rows[0].noise is not None and not any("noisy" in text for text in words(drift))
    noisy = replace(drift, rows=tuple(replace(row, noise=0.3) for row in drift.rows))
    assert words(noisy)[-1].startswith("this machine is noisy: samples lie 30 % from their median")
