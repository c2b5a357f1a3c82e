"""`warm --ray`: shares of a model's problems on workers that die, break and differ. Processes stand in for Ray's; the
last tests want Ray itself."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moecache.cli import app, fleet
from moecache.cli.fleet import Fleet, Submit, answered, measured, planned
from moecache.dispatch import using
from moecache.models import model_of
from moecache.schemas.errors import DeviceLost, InvalidInput
from moecache.schemas.warm import SPENT, Progress
from moecache.settings import Settings
from moecache.store import Store
from moecache.warmup import problems, warmup

MODEL = model_of(8, 2, 64, 32)
ASKED: dict[str, Any] = {"tokens": [1, 4, 16], "routing": ["uniform"], "ops": ["moe_sort"]}
Works = Callable[..., Any]


@contextmanager
def workers(*stand_in_for: Works | None) -> Iterator[list[Submit]]:
    """Processes; where a function is given, that one is called with the work and its arguments in place of the work."""
    pools = [ProcessPoolExecutor(1, get_context("fork")) for _ in stand_in_for]

    def submit(pool: ProcessPoolExecutor, instead: Works | None, work: Works, *given: Any, **named: Any) -> Future[Any]:
        return pool.submit(answered, *([instead] if instead else []), work, *given, **named)

    try:
        yield [partial(submit, pool, instead) for pool, instead in zip(pools, stand_in_for, strict=True)]
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def dies_at(doomed: Works, tokens: int, work: Works, /, *given: Any, **named: Any) -> Any:
    """Is killed when it shall do that work, for shares of so many tokens, 0 for all."""
    if work is doomed and (not tokens or given[2].problems[0].tokens == tokens):
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*given, **named)


def breaks(work: Works, *given: Any, **named: Any) -> Any:
    """Measures, and loses its device then."""
    if work is measured:

        def lost(*asked: Any, **more: Any) -> Any:
            warmup(*asked, **more)
            raise DeviceLost("a candidate hangs")

        sys.modules["moecache.warmup"].warmup = lost  # type: ignore[attr-defined]
    return work(*given, **named)


def differs(work: Works, *given: Any, **named: Any) -> Any:
    """Is another kind of device: one whose compiler does other things."""
    os.environ["TRITON_DEBUG"] = "1"
    return work(*given, **named)


def settings(db: Path) -> Settings:
    return Settings(db=db)


def warm(crew: list[Submit], db: Path, again: bool = False, budget: float | None = None, **asked: Any) -> Any:
    """Rows, lost shares, and the news."""
    news: list[Progress] = []
    with Store.open(db) as store:
        found = Fleet(crew, settings(db), MODEL, **ASKED | asked)
        return *found.warm(store, again, budget, news.append), news


def keys(db: Path) -> list[str]:
    with using(settings(db)):
        return [each.key for each in problems(MODEL, **ASKED)]


def test_two_workers_measure_what_one_process_would(db: Path) -> None:
    both = {"routing": ["uniform", "hot1"]}
    with using(settings(db)):
        asked = [each.key for each in problems(MODEL, **ASKED | both)]
    with workers(None, None) as crew:
        rows, lost, news = warm(crew, db, **both)
        assert (
            not lost and [row.problem.key for row in rows] == asked and len({row.problem.routing for row in rows}) > 1
        )
        assert {row.tier for row in rows} == {"measured"} and all(row.measured for row in rows)
        with Store.open(db, readonly=True) as store:
            assert store.check() == [] and {t.problem.key for t in store.timings()} == set(asked)
            assert len(store.timings()) == sum(row.measured for row in rows)
        assert [each.done for each in news] == sorted(each.done for each in news) and news[0].remaining is None
        assert {each.total for each in news} == {len(rows)} and news[-1].remaining is not None
        again, _, _ = warm(crew, db, **both)
        assert [row.config for row in again] == [row.config for row in rows] and not any(row.measured for row in again)
        assert all(row.measured for row in warm(crew, db, again=True, tokens=[1])[0])
    with using(settings(db), mode="replay"):
        assert {row.tier for row in warmup(MODEL, **ASKED | both)} == {"measured"}, "as if this process had measured it"


def test_wanted_problems_that_were_measured_are_no_longer_wanted(db: Path) -> None:
    with using(settings(db)):
        asked = problems(MODEL, **ASKED)[0]
    with workers(None) as crew, Store.open(db) as store:
        store.want([asked, asked.any_routing])
        warm(crew, db)
        assert store.wanted() == []


def test_the_budget_is_that_of_all(db: Path) -> None:
    with workers(None, None) as crew:
        rows, lost, _ = warm(crew, db, budget=0.0)
    assert not lost and len(rows) == len(keys(db)) and all(SPENT in row.reason for row in rows)


def test_a_worker_that_dies_loses_its_share_which_another_measures(
    db: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with workers(partial(dies_at, measured, 0), None) as crew:
        rows, lost, _ = warm(crew, db)
    assert not lost and [row.problem.key for row in rows] == keys(db) and {row.tier for row in rows} == {"measured"}
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "is lost with" in line]
    assert "worker 1 (" in told and "moe_sort tokens=" in told and "experts=8" in told and "BrokenProcessPool" in told


def test_a_share_that_two_workers_die_of_is_given_up(db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deadly = partial(dies_at, measured, 4)
    with workers(*[deadly] * 5) as crew:
        rows, lost, _ = warm(crew, db)
    assert {share.problems[0].tokens for share in lost} == {4} and len(lost) == 2, "sorted for int32 and int64"
    assert {row.problem.tokens for row in rows} == {1, 16} and {row.tier for row in rows} == {"measured"}
    assert capsys.readouterr().err.count("is lost with moe_sort tokens=4") == 4, "each was tried twice"
    with Store.open(db, readonly=True) as store:
        assert {timing.problem.tokens for timing in store.timings()} == {1, 16}


def test_where_all_die_what_was_measured_is_kept_and_the_rest_is_named(db: Path) -> None:
    with workers(partial(dies_at, measured, 1)) as crew:
        rows, lost, _ = warm(crew, db)
    assert {row.problem.tokens for row in rows} <= {4, 16} and {1} <= {share.problems[0].tokens for share in lost}
    known = [each.key for share in lost for each in share.problems] + [row.problem.key for row in rows]
    assert sorted(known) == sorted(keys(db))


def test_what_a_worker_measured_before_its_device_broke_the_next_one_knows(db: Path) -> None:
    with workers(breaks, None) as crew:
        rows, lost, _ = warm(crew, db)
    assert not lost and {row.tier for row in rows} == {"measured"}
    assert [row.measured == 0 for row in rows].count(True) == 1, "its share, from its own timings"


def test_another_kind_of_device_measures_all_for_itself(db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with workers(None, None, differs) as crew:
        rows, lost, _ = warm(crew, db)
    told = capsys.readouterr().err
    assert "3 workers: 3 × " in told and "they are of several kinds, and each kind measures all for itself" in told
    assert not lost and sorted(row.problem.key for row in rows) == sorted(2 * keys(db))
    with Store.open(db, readonly=True) as store:
        held = {(timing.environment.flags, timing.problem.key) for timing in store.timings()}
    assert held == {(flags, key) for flags in ("", "TRITON_DEBUG=1") for key in keys(db)}


def test_who_does_not_begin_is_left_out(db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead = partial(dies_at, planned, 0)
    with workers(dead, None) as crew:
        assert {row.tier for row in warm(crew, db, tokens=[1])[0]} == {"measured"}
    assert "worker 1 is left out: BrokenProcessPool" in capsys.readouterr().err
    with workers(dead) as crew, pytest.raises(InvalidInput, match="no worker of the cluster answers"):
        warm(crew, db)


def test_who_does_not_come_is_left_out(db: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "START", 0.0)
    with pytest.raises(InvalidInput, match="no worker"):
        warm([lambda *given, **named: Future()], db)
    assert "it has not begun within 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "told"), [({"routing": ["bogus"]}, "bogus"), ({"ops": ["bogus"]}, "bogus")])
def test_what_is_not_allowed_is_said_as_without_ray(db: Path, asked: dict[str, Any], told: str) -> None:
    with workers(None) as crew, pytest.raises(InvalidInput, match=told):
        warm(crew, db, **asked)


# --- the command ---

WARM = ["warm", "experts=8,topk=2,hidden=64,intermediate=32", "--tokens", "1,4"]
SORT = [*WARM, "--op", "moe_sort", "--routing", "uniform", "--ray"]


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *each: monkeypatch.setattr(fleet, "cluster", lambda: workers(*each))


def test_the_command_prints_what_warm_prints(db: Path, crew: Any) -> None:
    crew(None, None)
    done = CliRunner().invoke(app, [*SORT, "--db", str(db), "--json"])
    assert done.exit_code == 0 and {row["tier"] for row in json.loads(done.stdout)} == {"measured"}
    assert "moecache: 2 workers: 2 × " in done.stderr and "[1/4] moe_sort tokens=" in done.stderr
    done = CliRunner().invoke(app, [*SORT, "--db", str(db)])
    assert done.exit_code == 0 and "nothing to measure: 4 problems known" in done.stdout
    done = CliRunner().invoke(app, [*WARM, "--routing", "uniform", "--ray", "--db", str(db), "--ep", "2"])
    assert "ep_exchange is left out: with --ray each GPU measures alone" in done.stdout


def test_the_command_fails_where_a_share_is_lost_and_names_it(db: Path, crew: Any) -> None:
    crew(partial(dies_at, measured, 0))
    done = CliRunner().invoke(app, [*SORT, "--db", str(db)])
    assert done.exit_code == 1
    assert (
        "moecache: not measured: moe_sort tokens=1 experts=8 (1 problem); the same command tries again" in done.stderr
    )


@pytest.mark.parametrize(
    "arguments", [["warm", "--ray", "--wanted"], ["warm", "--ray", "--again"], [*WARM, "--ray", "--wanted"]]
)
def test_it_takes_a_model(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "--ray" in done.stderr and "it takes a model, and no --wanted" in done.stderr


def test_without_ray_it_says_what_brings_it(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = CliRunner().invoke(app, [*SORT, "--db", str(db)])
    assert done.exit_code == 1 and "pip install 'moecache[ray]'" in done.stderr


# --- with Ray: `make ray` ---


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return pytest.importorskip("ray")


def ends_at_work(submit: Submit, work: Works, *given: Any, **named: Any) -> Future[Any]:
    return submit(os._exit, 1) if work is measured else submit(work, *given, **named)


def test_ray_spreads_a_model_over_this_machine(db: Path, ray: Any) -> None:
    done = CliRunner().invoke(app, [*SORT, "--db", str(db), "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 4 and all(row["tier"] == "measured" and row["measured"] for row in found)
    with Store.open(db, readonly=True) as store:
        assert len(store.winners()) == 4
    assert not ray.is_initialized()


def test_rays_worker_that_dies_loses_its_share_which_another_measures(
    db: Path, ray: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ray.init
    monkeypatch.setattr(ray, "init", lambda **more: start(num_cpus=2, **more))
    with fleet.cluster() as (first, second):
        dying = partial(ends_at_work, first)
        rows, lost, _ = warm([dying, second], db)
    assert not lost and [row.problem.key for row in rows] == keys(db) and {row.tier for row in rows} == {"measured"}
    assert "worker 1 (" in (told := capsys.readouterr().err) and "is lost with moe_sort" in told and "Actor" in told


def test_ray_says_where_nothing_is_free(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda start=ray.init, **more: start(num_cpus=0, **more))
    with pytest.raises(InvalidInput, match="has no free CPU"), fleet.cluster():
        pass
