"""`verify --sample`: winners timed again beside their rivals; toys take the time that they are told to."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
from moecache.devices import Places
from moecache.dispatch import Dispatcher
from moecache.kernels import registry as ops
from moecache.schemas.config import Config, config
from moecache.schemas.errors import DeviceLost
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing
from moecache.settings import MEMORY, Settings
from moecache.store import Store
from moecache.verify.retiming import Retimed, retime

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


def again(toy: Toy, stored: Sequence[Timing], **options: Any) -> tuple[list[Retimed], dict[str, int]]:
    """Stored timings, then what the toy takes now."""
    serving = Dispatcher(Settings(db=MEMORY, budget=5.0), CapturingBackend(), ToyClock(toy))  # type: ignore[arg-type]
    with Store.memory() as store:
        store.put(stored)
        before = store.timings()
        rows, skipped = retime(store, serving, **{"count": 20, **options})
        assert store.timings() == before
    serving.close()
    return rows, skipped


def usual(problem: Problem, where: Environment) -> list[Timing]:
    """C wins, B is behind it, A is the default."""
    rows = [timing(problem, A, 30.0, where, is_default=True), timing(problem, B, 20.0, where)]
    return [*rows, timing(problem, C, 8.0, where)]


# --- the verdict


def test_a_winner_that_still_wins_is_no_finding_however_slow_it_became(toy: Toy, here: Environment) -> None:
    toy.times = {A: 300.0, B: 200.0, C: 100.0}
    ((row,), skipped) = again(toy, usual(toy.problem(), here))
    assert not row.lost and skipped == {} and [rival.config for rival in row.rivals] == [B, A]
    assert str(row).endswith("8.00 µs stored, now 100.00, 200.00 with plain(block=2) (-50.0 %)")


@pytest.mark.parametrize(("now", "lost"), [(10.2, False), (10.4, False), (10.6, True), (30.0, True)])
def test_a_winner_that_loses_by_more_than_the_tolerance_is_a_finding(
    toy: Toy, here: Environment, now: float, lost: bool
) -> None:
    toy.times = {A: 30.0, B: 10.0, C: now}
    ((row,), _) = again(toy, usual(toy.problem(), here))
    assert row.lost == lost and toy.problem().id in str(row) and C.name in str(row)


def test_the_default_is_a_rival_too(toy: Toy, here: Environment) -> None:
    toy.times = {A: 5.0, B: 20.0, C: 10.0}
    ((row,), _) = again(toy, usual(toy.problem(), here))
    assert row.lost and f"5.00 with {A.name} (+100.0 %)" in str(row)


def test_a_winner_that_fails_is_a_finding(toy: Toy, here: Environment) -> None:
    toy.wrong = {C}
    ((row,), _) = again(toy, usual(toy.problem(), here))
    assert row.lost and "now wrong" in str(row)


def test_a_rival_that_fails_leaves_the_winner(toy: Toy, here: Environment) -> None:
    toy.raises = {A: RuntimeError("no"), B: RuntimeError("no")}
    ((row,), _) = again(toy, usual(toy.problem(), here))
    assert not row.lost and row.rivals == () and row.now.median_us == 10.0


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
    ((row,), _) = again(toy, usual(toy.problem(), here))
    assert row.lost and "timeout: no answer" in str(row)


def test_where_a_rival_loses_the_device_the_rest_is_skipped(
    toy: Toy, here: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(monkeypatch, A)
    rows, skipped = again(toy, [t for tokens in (16, 64) for t in usual(toy.problem(tokens), here)])
    assert rows == [] and sum(skipped.values()) == 2


def test_only_the_winner_its_runner_up_and_the_default_are_timed(toy: Toy, here: Environment) -> None:
    toy.times |= {D: 1.0}
    ((row,), _) = again(toy, [*usual(toy.problem(), here), timing(toy.problem(), D, 25.0, here)])
    assert {tried for tried, _ in toy.launches} == {A, B, C} and not row.lost


def test_what_a_file_behind_says_is_no_rival(toy: Toy, here: Environment, tmp_path: Path) -> None:
    toy.times |= {D: 1.0}
    behind = tmp_path / "behind.sqlite"
    with Store.open(behind) as store:
        store.put([timing(toy.problem(), D, 1.0, here)])
    settings = Settings(db=MEMORY, path=(behind,), budget=5.0)
    with Store.memory() as store:
        store.put(usual(toy.problem(), here))
        active = Dispatcher(settings, CapturingBackend(), ToyClock(toy))  # type: ignore[arg-type]
        ((row,), _) = retime(store, active, count=1)
    assert not row.lost and D not in {rival.config for rival in row.rivals}


def test_a_default_that_wins_is_timed_beside_its_runner_up(toy: Toy, here: Environment) -> None:
    p = toy.problem()
    ((row,), _) = again(toy, [timing(p, A, 9.0, here, is_default=True), timing(p, B, 9.5, here)])
    assert row.stored.config == A and row.lost
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
    rows, skipped = again(toy, sorted(stored, key=lambda t: t.problem.tokens))
    assert [row.stored.problem.tokens for row in rows] == [16]
    reasons = ["3 units is not here", "sm_1 with", "nobody_knows is not built in", "code that has changed since"]
    reasons += ["may not serve any more"]
    assert sorted(skipped.values()) == [1] * 5
    assert all(any(reason in why for why in skipped) for reason in reasons), skipped


def test_no_more_are_timed_than_asked_for_and_the_same_each_time(toy: Toy, here: Environment) -> None:
    stored = [t for tokens in (1, 16, 64, 256) for t in usual(toy.problem(tokens), here)]
    told: list[str] = []
    rows, _ = again(toy, stored, count=2, tell=told.append)
    assert [line[:5] for line in told] == ["[1/2]", "[2/2]"]
    assert [row.stored for row in rows] == [row.stored for row in again(toy, stored, count=2)[0]]


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
    assert "no findings" in run("verify", "--db", db).stdout
    text = run("verify", "--db", db, "--sample", "5", code=1).stdout
    assert "1 finding" in text and "8.00 µs stored, now 3000.00, 1000.00 with plain(block=2) (+200.0 %)" in text
    assert db.read_bytes() == before and [file.name for file in db.parent.iterdir()] == [db.name]


def test_where_nothing_may_be_measured_nothing_is(db: Path) -> None:
    done = run("verify", "--sample", "1", "--db", db, code=1, MOECACHE_MODE="replay")
    assert "MOECACHE_MODE=replay forbids" in done.stderr
    run("verify", "--db", db, MOECACHE_MODE="replay")
