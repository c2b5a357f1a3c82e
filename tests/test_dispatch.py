"""Dispatch: every tier with its reason, modes, capture, threads, forks, bad files, and the hot path."""

import hashlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from toy import A, B, C, CapturingBackend, Toy, ToyClock, served, stored, timing

from moecache import dispatch, routing
from moecache.dispatch import Dispatcher, dispatcher, using
from moecache.dispatch import serving as machinery
from moecache.dispatch.bounded import Bounded
from moecache.dispatch.serving import BUSY
from moecache.kernels import registry as ops
from moecache.schemas.config import config
from moecache.schemas.errors import InvalidInput, NotTuned
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Choice, Environment
from moecache.settings import Settings
from moecache.store import Store
from moecache.tuning.run import Budget
from moecache.tuning.tuner import Tuned

OTHER = Environment(device_name="another", torch="1.0")


def wanted(db: Path) -> set[str]:
    store = Store.open(db)
    found = {problem.key for problem, _ in store.wanted()}
    store.close()
    return found


# --- the tiers ---


def test_the_first_encounter_tunes_and_a_second_process_reads_it(toy: Toy, db: Path) -> None:
    first = served(toy, db)
    choice = first.choose(toy, toy.problem())
    assert (choice.config, choice.tier) == (C, "measured")
    assert "10.00 µs" in choice.reason and "30.00 µs of the default" in choice.reason and "best of 3" in choice.reason
    launched = len(toy.launches)
    assert launched > 0
    first.close()
    again = served(toy, db)
    choice = again.choose(toy, toy.problem())
    assert (choice.config, choice.tier, choice.source) == (C, "measured", str(db))
    assert len(toy.launches) == launched


def test_another_environment_is_unverified_and_not_tuned_on_the_hot_path(toy: Toy, db: Path, here: Environment) -> None:
    old = here.model_copy(update={"torch": "1.0", "driver": "another"})
    stored(db, timing(toy.problem(), B, 20.0, old), timing(toy.problem(), A, 30.0, old, is_default=True))
    serving = served(toy, db)
    choice = serving.choose(toy, toy.problem())
    assert (choice.config, choice.tier) == (B, "unverified")
    assert "torch 1.0 (here " in choice.reason and "driver another" in choice.reason
    assert toy.launches == []
    assert wanted(db) == {toy.problem().key}


def test_measured_here_outranks_unverified_in_an_earlier_file(
    toy: Toy, db: Path, tmp_path: Path, here: Environment
) -> None:
    stored(db, timing(toy.problem(), B, 1.0, OTHER))
    shipped = tmp_path / "shipped.sqlite"
    stored(shipped, timing(toy.problem(), C, 20.0, here))
    choice = served(toy, db, path=(shipped,)).choose(toy, toy.problem())
    assert (choice.config, choice.tier, choice.source) == (C, "measured", str(shipped))


@pytest.mark.parametrize(
    ("near", "field"),
    [
        ({"tokens": 64}, "tokens=64 (asked 16)"),
        ({"routing": "a1e2"}, "routing=a1e2 (asked a0e0)"),
        ({"units": 3}, "units=3"),
        ({"dims": (("block_m", 64),)}, "dims.block_m=64 (asked 16)"),
    ],
)
def test_a_neighbour_says_what_differs(
    toy: Toy, db: Path, here: Environment, near: dict[str, object], field: str
) -> None:
    stored(db, timing(toy.problem(**near), B, 20.0, here))  # type: ignore[arg-type]
    choice = served(toy, db, mode="replay").choose(toy, toy.problem())
    assert (choice.config, choice.tier) == (B, "neighbour")
    assert field in choice.reason and "mode=replay" in choice.reason


@pytest.mark.parametrize(
    "far",
    [
        {"tokens": 128},
        {"tokens": 2},
        {"experts": 16},
        {"topk": 1},
        {"dtype": "bf16"},
        {"source": "v0"},
        {"arch": "sm_90"},
        {"policy": 2},
        {"dims": (("block_m", 128),)},
        {"dims": (("block_m", 16), ("hidden", 64))},
    ],
)
def test_what_differs_too_much_is_no_neighbour(toy: Toy, db: Path, here: Environment, far: dict[str, object]) -> None:
    stored(db, timing(toy.problem(**far), C, 20.0, here))  # type: ignore[arg-type]
    choice = served(toy, db, mode="replay").choose(toy, toy.problem())
    assert (choice.config, choice.tier) == (B, "predicted")


def test_the_nearest_neighbour_answers_tokens_before_routing_before_dims(toy: Toy, db: Path, here: Environment) -> None:
    by_tokens = timing(toy.problem(tokens=64), A, 20.0, here)
    by_routing = timing(toy.problem(routing="a0e1"), B, 20.0, here)
    by_dim = timing(toy.problem(dims=(("block_m", 32),)), C, 20.0, here)
    for kept, expected in ([by_tokens, by_routing, by_dim], A), ([by_routing, by_dim], B), ([by_dim], C):
        db.unlink(missing_ok=True)
        stored(db, *kept)
        assert served(toy, db, mode="replay").choose(toy, toy.problem()).config == expected


def test_a_neighbour_that_does_not_fit_is_passed_over(toy: Toy, db: Path, here: Environment) -> None:
    stored(db, timing(toy.problem(32), C, 20.0, here), timing(toy.problem(64), A, 20.0, here))
    toy.unfit = {C: "too large"}
    assert served(toy, db, mode="replay").choose(toy, toy.problem()).config == A


def test_predicted_is_the_cheapest_and_default_is_where_nothing_is_predicted(toy: Toy, db: Path) -> None:
    choice = served(toy, db, mode="replay").choose(toy, toy.problem())
    assert (choice.config, choice.tier, choice.expected_us) == (B, "predicted", 1.0)
    assert "lowest predicted time of 3 candidates: 1.00 µs" in choice.reason
    toy.costs = {}
    choice = served(toy, db, mode="replay").choose(toy, toy.problem())
    assert (choice.config, choice.tier) == (A, "default")


# --- what a file may not do ---


def test_a_changed_kernel_is_a_miss(toy: Toy, db: Path) -> None:
    served(toy, db).choose(toy, toy.problem())
    toy.source = "v2"
    assert served(toy, db, mode="replay").choose(toy, toy.problem()).tier == "predicted"


def test_a_stored_config_that_does_not_fit_gives_way_to_the_next_best(toy: Toy, db: Path, here: Environment) -> None:
    stored(db, *(timing(toy.problem(), c, us, here) for c, us in toy.times.items()))
    toy.unfit = {C: "not on this driver"}
    choice = served(toy, db, mode="replay").choose(toy, toy.problem())
    assert (choice.config, choice.tier) == (B, "measured")
    assert "may not be used here" in choice.reason


@pytest.mark.parametrize("complaint", ["refuses", "raises"])
def test_a_config_that_nobody_knows_is_a_miss(toy: Toy, db: Path, here: Environment, complaint: str) -> None:
    stored(db, timing(toy.problem(), config("invented", block=9), 1.0, here))
    if complaint == "raises":
        toy.fits = lambda problem, config, device: {}[config.name] if config.variant == "invented" else ""  # type: ignore[method-assign, assignment]
    choice = served(toy, db, mode="replay").choose(toy, toy.problem())
    assert (choice.config, choice.tier) == (B, "predicted")


def test_a_recorded_failure_is_not_predicted(toy: Toy, db: Path, here: Environment) -> None:
    failed = timing(toy.problem(), B, 1.0, here).model_copy(update={"status": "raised", "median_us": None})
    stored(db, failed)
    assert served(toy, db, mode="replay").choose(toy, toy.problem()).config == C


def test_a_file_that_is_no_cache_does_not_stop_a_call(toy: Toy, db: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.sqlite"
    foreign.write_bytes(b"not a database at all" * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choice = served(toy, db, path=(foreign,)).choose(toy, toy.problem())
    assert (choice.config, choice.tier) == (C, "measured")


# --- modes ---


def test_mode_off_serves_the_first_config_and_opens_no_file(toy: Toy, db: Path) -> None:
    choice = served(toy, db, mode="off", strict=True).choose(toy, toy.problem())
    assert (choice.config, choice.tier) == (A, "default") and "mode=off" in choice.reason
    assert not db.exists() and not toy.launches


def test_replay_writes_nothing(toy: Toy, db: Path, here: Environment) -> None:
    stored(db, timing(toy.problem(), C, 20.0, here))
    before = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in db.parent.iterdir()}
    serving = served(toy, db, mode="replay")
    assert serving.choose(toy, toy.problem()).tier == "measured"
    assert serving.choose(toy, toy.problem(64)).tier == "neighbour"
    assert serving.choose(toy, toy.problem(4096)).tier == "predicted"
    serving.failed(toy.problem(), C, RuntimeError("x"))
    assert [p.tokens for p in serving.wanted()] == [64, 4096]
    serving.close()
    assert {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in db.parent.iterdir()} == before
    assert not toy.launches


def test_replay_makes_no_file_and_misses_none(
    toy: Toy, db: Path, here: Environment, recwarn: pytest.WarningsRecorder
) -> None:
    db = db.parent / "deeper" / db.name
    serving = served(toy, db, mode="replay")
    assert serving.choose(toy, toy.problem()).tier in ("predicted", "default")
    serving.close()
    assert not db.parent.exists() and not recwarn.list
    stored(db, timing(toy.problem(), C, 20.0, here))
    db.write_bytes(damaged := db.read_bytes()[:9000])
    served(toy, db, mode="replay").choose(toy, toy.problem())
    assert [each.name for each in db.parent.iterdir()] == [db.name] and db.read_bytes() == damaged
    assert "it is left out" in str(recwarn.pop(RuntimeWarning).message)


def test_strict_accepts_only_what_was_measured_here(
    toy: Toy, db: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stored(db, timing(toy.problem(), B, 20.0, OTHER))
    serving = served(toy, db, mode="replay", strict=True)
    for problem in toy.problem(), toy.problem(64):
        with pytest.raises(NotTuned) as caught, caplog.at_level("INFO", "moecache"):
            serving.choose(toy, problem)
        assert problem.key in str(caught.value)
    assert serving.hot == {} and not caplog.records, "the log tells what a problem gets"
    monkeypatch.setattr(dispatch.policy, "decide", lambda *args: pytest.fail("it was decided before"))
    with pytest.raises(NotTuned):
        serving.choose(toy, toy.problem())
    monkeypatch.undo()
    choice = served(toy, db, strict=True).choose(toy, toy.problem())
    assert (choice.config, choice.tier) == (C, "measured")  # strict tunes what is only unverified


def test_a_budget_of_zero_never_tunes_on_a_call(toy: Toy, db: Path) -> None:
    serving = Dispatcher(Settings(db=db, budget=0.0), CapturingBackend(), ToyClock(toy))
    assert "budget is 0" in serving.choose(toy, toy.problem()).reason
    assert not toy.launches
    assert wanted(db) == {toy.problem().key}


# --- capture ---


def test_under_capture_nothing_is_measured_or_written_and_it_is_tuned_later(toy: Toy, db: Path) -> None:
    backend = CapturingBackend()
    serving = served(toy, db, backend)
    backend.on = True
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "unclosed database", ResourceWarning)  # that another test left
            choice = serving.choose(toy, toy.problem(), key=("k",))
        assert (choice.config, choice.tier) == (B, "predicted") and "captured" in choice.reason
    assert not toy.launches and serving.hot == {} and [p.key for p in serving.wanted()] == [toy.problem().key]
    assert wanted(db) == set()
    backend.on = False
    serving.choose(toy, toy.problem(256))  # any miss outside a capture writes what was noted
    assert wanted(db) == {toy.problem().key}
    assert serving.choose(toy, toy.problem(), key=("k",)).tier == "measured"
    assert serving.hot[("k",)].config == C
    assert wanted(db) == set()


def test_under_capture_what_is_known_is_served_and_kept(toy: Toy, db: Path, here: Environment) -> None:
    stored(db, timing(toy.problem(), C, 20.0, here))
    backend = CapturingBackend()
    backend.on = True
    serving = served(toy, db, backend)
    assert serving.choose(toy, toy.problem(), key=("k",)).tier == "measured"
    assert serving.hot[("k",)].config == C


def test_measure_refuses_to_run_under_capture_or_in_replay(toy: Toy, db: Path) -> None:
    backend = CapturingBackend()
    backend.on = True
    with pytest.raises(InvalidInput, match="captured"):
        served(toy, db, backend).measure(toy, toy.problem())
    with pytest.raises(InvalidInput, match="mode=replay"):
        served(toy, db, mode="replay").measure(toy, toy.problem())
    assert not toy.launches


# --- the hot path ---


def test_a_hit_touches_nothing_but_the_dict(toy: Toy, db: Path) -> None:
    serving = served(toy, db)
    serving.choose(toy, toy.problem(), key=("k", 1), prepare=lambda choice: choice.config.name)
    for poisoned in "lookup", "places", "settings", "_lock":
        setattr(serving, poisoned, None)
    assert serving.hot.get(("k", 1)) == C.name
    with pytest.raises((AttributeError, TypeError)):
        serving.choose(toy, toy.problem(64))


def test_the_hot_dict_does_not_grow_for_ever(toy: Toy, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecache.dispatch.serving.BOUND", 4)
    serving = served(toy, db, mode="replay")
    for tokens in range(10):
        serving.choose(toy, toy.problem(), key=(tokens,))
        assert len(serving.hot) <= 4 and (tokens,) in serving.hot


def test_an_answer_is_worked_out_once(toy: Toy, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = served(toy, db, mode="replay")
    first = serving.choose(toy, toy.problem())
    monkeypatch.setattr(dispatch.policy, "decide", None)
    assert serving.choose(toy, toy.problem()) is first


def hammer(serving: Dispatcher, toy: Toy) -> list[Choice]:
    """The answers of eight threads that meet one miss at once."""
    barrier, found = threading.Barrier(8), []

    def call() -> None:
        barrier.wait()
        found.append(serving.choose(toy, toy.problem(), key=("k",)))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_threads_that_meet_the_same_miss_tune_it_once_and_do_not_wait(toy: Toy, db: Path) -> None:
    toy.nap = 0.002  # the tuning takes longer than any thread needs to meet it
    serving = served(toy, db)
    found = hammer(serving, toy)
    tiers = [choice.tier for choice in found]
    assert tiers.count("measured") == 1 and tiers.count("predicted") == 7
    assert all(BUSY in choice.reason for choice in found if choice.tier == "predicted")
    assert sum(1 for ids in toy.seen_ids) == toy.inputs_of_one_tuning
    assert serving.hot[("k",)].config == serving.choose(toy, toy.problem()).config == C


def test_strict_threads_wait_for_the_one_that_tunes(toy: Toy, db: Path) -> None:
    toy.nap = 0.002
    found = hammer(served(toy, db, strict=True), toy)
    assert [(choice.config, choice.tier) for choice in found] == [(C, "measured")] * 8
    assert sum(1 for ids in toy.seen_ids) == toy.inputs_of_one_tuning


# --- variants ---


def test_a_variant_restricts_the_answer(toy: Toy, db: Path, here: Environment) -> None:
    problem = toy.problem()
    stored(db, *(timing(problem, c, us, here) for c, us in toy.times.items()))
    serving = served(toy, db, mode="replay")
    assert serving.choose(toy, problem).config == C
    choice = serving.choose(toy, problem, variant="plain")
    assert (choice.config, choice.tier) == (B, "measured") and "variant plain" in choice.reason
    choice = serving.choose(toy, toy.problem(4096), variant="other")
    assert (choice.config, choice.tier) == (C, "predicted")
    assert not toy.launches


def test_a_variant_is_predicted_not_tuned_on_a_miss(toy: Toy, db: Path) -> None:
    choice = served(toy, db).choose(toy, toy.problem(), variant="plain")
    assert (choice.config, choice.tier) == (B, "predicted") and "variant=plain" in choice.reason
    assert not toy.launches


def test_a_variant_that_cannot_serve_says_why(toy: Toy, db: Path) -> None:
    serving = served(toy, db, mode="replay")
    toy.unfit = {C: "needs 99 bytes of shared memory"}
    with pytest.raises(InvalidInput, match="99 bytes"):
        serving.choose(toy, toy.problem(), variant="other")
    with pytest.raises(InvalidInput, match="allowed are plain"):
        serving.choose(toy, toy.problem(), variant="nonsense")


# --- failures at launch ---


def test_a_config_that_failed_is_recorded_and_its_runner_up_serves(toy: Toy, db: Path) -> None:
    serving = served(toy, db)
    problem = toy.problem()
    serving.choose(toy, problem, key=("k",))
    serving.failed(problem, C, RuntimeError("illegal address"))
    assert serving.hot == {}
    assert (serving.choose(toy, problem).config, serving.choose(toy, problem).tier) == (B, "measured")
    serving.close()
    fresh = served(toy, db, mode="replay")
    assert fresh.choose(toy, problem).config == B
    rows = {t.config: t for t, _ in fresh.lookup.timings(problem)}
    assert rows[C].status == "raised" and "illegal address" in rows[C].reason


def test_running_out_of_memory_once_condemns_a_config_for_this_process_only(toy: Toy, db: Path) -> None:
    serving = served(toy, db)
    serving.choose(toy, toy.problem())
    serving.failed(toy.problem(), C, torch.OutOfMemoryError("busy"))
    assert serving.choose(toy, toy.problem()).config == B
    serving.close()
    assert served(toy, db, mode="replay").choose(toy, toy.problem()).config == C


def test_a_reason_says_whether_time_or_candidates_were_missing(
    toy: Toy, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for left, why in ((3, "not measured here: MOECACHE_BUDGET, 5 s, does not suffice"), (0, "have failed earlier")):
        monkeypatch.setattr(machinery, "tune", lambda *args, left=left, **more: Tuned([], left))
        assert why in served(toy, db).choose(toy, toy.problem()).reason


def test_the_budget_of_a_call_counts_from_its_beginning(toy: Toy, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Budget, float | None]] = []

    def noted(*args: object, budget: Budget, began: float | None, **more: object) -> Tuned:
        given.append((budget, began))
        return Tuned([], 0)

    monkeypatch.setattr(machinery, "tune", noted)
    serving = served(toy, db)
    serving.choose(toy, toy.problem(), began=12.5)
    before = time.perf_counter()
    serving.choose(toy, toy.problem(tokens=64))
    serving.measure(toy, toy.problem(tokens=128), seconds=7.0)
    (first, early), (_, now), (third, unset) = given
    assert (first.seconds, first.hurry, early) == (5.0, True, 12.5)
    assert now is not None and before <= now <= time.perf_counter()
    assert (third.seconds, third.hurry, unset) == (7.0, False, None)


def test_tuning_that_fails_never_fails_the_call(toy: Toy, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no memory for inputs")

    monkeypatch.setattr(machinery, "tune", broken)
    serving = served(toy, db)
    with pytest.warns(RuntimeWarning, match="no memory for inputs"):
        choice = serving.choose(toy, toy.problem(), key=("k",))
    assert choice.tier == "predicted" and "no memory for inputs" in choice.reason
    assert ("k",) in serving.hot  # final: the next call does not try again


# --- routing, ranks, processes ---


@pytest.mark.parametrize(
    ("tokens", "bucket", "given", "shape", "seen"),
    [
        (64, "a0e0", None, (64, 2), "a0e0"),
        (64, "a0e1", None, (64, 2), "a0e1"),
        (64, "a0e0", ("uniform", 64), (64, 2), "a0e0"),
        (64, "", ("hot1", 50), (64, 2), None),
        (64, "a0e0", ("zipf", 64), (64, 2), "a0e0"),
    ],
)
def test_tuning_uses_the_routing_of_the_problem(
    toy: Toy,
    db: Path,
    tokens: int,
    bucket: str,
    given: tuple[str, int] | None,
    shape: tuple[int, int],
    seen: str | None,
) -> None:
    ids = routing.draw(given[0], given[1], 8, 2, seed=5) if given else None
    kept = None if ids is None else ids.clone()
    served(toy, db).choose(toy, toy.problem(tokens, bucket), topk_ids=ids)
    used = toy.seen_ids[0]
    expected = seen or routing.bucket(routing.histogram(ids, 8))  # type: ignore[arg-type]
    assert tuple(used.shape) == shape and routing.bucket(routing.histogram(used, 8)) == expected
    if ids is not None:
        assert torch.equal(ids, kept)  # type: ignore[arg-type]
        assert all(t.data_ptr() != ids.data_ptr() for t in toy.seen_ids)
        if given == ("uniform", 64):
            rows = (sorted(routing.histogram(each, 8)) for each in (used, ids))
            assert len(set(map(tuple, rows))) == 1  # this very routing, tokens and experts in other places


def test_tuning_leaves_the_random_state_alone(toy: Toy, db: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    served(toy, db).choose(toy, toy.problem(routing="a0e2"))
    assert torch.equal(torch.rand(3), expected)


def test_digests_agree_exactly_when_the_winners_do(toy: Toy, db: Path, tmp_path: Path, here: Environment) -> None:
    rows = [timing(toy.problem(), C, 20.0, here), timing(toy.problem(64), B, 20.0, here)]
    stored(db, *rows)
    other = tmp_path / "other.sqlite"
    stored(other, *reversed(rows))
    ranks = [served(toy, file, mode="replay") for file in (db, other)]
    assert ranks[0].digest(["toy"]) == ranks[1].digest(["toy"])
    stored(other, timing(toy.problem(256), B, 20.0, here))
    assert ranks[0].digest(["toy"]) == ranks[1].digest(["toy"])  # a snapshot: files are read once
    ranks[1].reload()
    assert ranks[0].digest(["toy"]) != ranks[1].digest(["toy"])
    stored(db, timing(toy.problem(256), B, 21.0, here))
    ranks[0].reload()
    assert ranks[0].digest(["toy"]) == ranks[1].digest(["toy"])  # same config; another time is no disagreement


def test_a_forked_child_opens_its_own_connection(toy: Toy, db: Path) -> None:
    serving = served(toy, db)
    serving.choose(toy, toy.problem())
    parent = serving.lookup.tiers.user._connection
    held = threading.Event()
    release = threading.Event()

    def hold() -> None:
        with serving._lock:
            held.set()
            release.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forking with threads: that is the point
        child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that waits for the parent's lock ends as a failure
        try:
            choice = serving.choose(toy, toy.problem(64))
            fine = choice.tier == "measured" and serving.lookup.tiers.user._connection is not parent
            os._exit(0 if fine else 1)
        except BaseException:
            os._exit(2)
    release.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert serving.lookup.tiers.user._connection is parent
    serving.reload()
    assert serving.choose(toy, toy.problem(64)).tier == "measured"


def test_the_default_dispatcher_is_made_once_and_using_replaces_it(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_default", None)
    monkeypatch.setenv("MOECACHE_MODE", "replay")
    monkeypatch.setenv("MOECACHE_DB", str(db))
    found: list[Dispatcher] = []
    threads = [threading.Thread(target=lambda: found.append(dispatcher())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(d) for d in found}) == 1 and found[0].settings == Settings(mode="replay", db=db)
    with using(mode="off") as inner:
        assert dispatcher() is inner and inner.settings == Settings(mode="off", db=db)
        with using(strict=True) as nested:
            assert nested.settings == Settings(mode="off", strict=True, db=db)
        assert dispatcher() is inner
    assert dispatcher() is found[0]
    with pytest.raises(InvalidInput, match="allowed are mode"), using(moed="off"):
        pass


# --- explaining ---


@pytest.fixture
def registered(toy: Toy) -> Iterator[Toy]:
    ops.register(toy)
    yield toy
    ops._wrapped.pop(toy.name)


def test_explain_a_hit(registered: Toy, db: Path) -> None:
    toy = registered
    toy.raises = {B: ValueError("bad tile")}
    serving = served(toy, db)
    serving.choose(toy, toy.problem())
    told = serving.explain(toy.problem())
    assert told.choice is not None and (told.choice.config, told.choice.tier) == (C, "measured")
    assert [(t.config, t.status) for t, _ in told.timings] == [(C, "ok"), (A, "ok"), (B, "raised")]
    assert "bad tile" in told.timings[-1][0].reason and {file for _, file in told.timings} == {str(db)}
    assert told.nearest is None and told.differs == () and told.notes == ()


def test_explain_a_miss_names_the_first_field_that_differs(registered: Toy, db: Path, here: Environment) -> None:
    toy = registered
    stored(
        db,
        timing(toy.problem(experts=64, topk=4), C, 9.0, here),
        timing(toy.problem(tokens=64, topk=1), C, 9.0, here),
    )
    stored(db, timing(toy.problem(source="v0"), C, 9.0, here))
    told = served(toy, db).explain(toy.problem())
    assert told.choice is not None and told.choice.tier == "predicted"
    assert told.nearest == toy.problem(source="v0")
    assert str(told.differs[0]) == "source=v0 (asked v1)"
    told = served(toy, db).explain(toy.problem(4096, topk=1))
    assert [d.field for d in told.differs] == ["tokens"]
    assert not toy.launches and wanted(db) == set()


def test_explain_what_this_process_or_machine_does_not_have(registered: Toy, db: Path, here: Environment) -> None:
    toy = registered
    old = toy.problem(source="v0")
    unknown = toy.problem(op="someone_elses")
    foreign = toy.problem(vendor="amd", arch="gfx942", units=304)
    stored(db, timing(old, C, 9.0, here), timing(unknown, C, 9.0, here), timing(foreign, C, 9.0, OTHER))
    serving = served(toy, db)
    assert "asked of other code (source v0, now v1)" in serving.explain(old).notes[0]
    told = serving.explain(unknown)
    assert told.choice is not None and told.choice.config == C and "does not know op" in told.notes[0]
    told = serving.explain(foreign)
    assert told.choice is not None and told.choice.tier == "unverified" and "gfx942" in told.notes[0]
    missing = serving.explain(Problem(**{**unknown.model_dump(), "op": "never_seen"}))
    assert missing.choice is None and missing.nearest is None


# --- the defects of ROCm/aiter#3525, as far as they live here ---


class TestDefectsOfTheFirstAttempt:
    """That pull request timed two sorting paths at the first call of a size; each flaw of it is one test."""

    def test_the_capture_state_is_asked_before_anything_is_timed(self, toy: Toy, db: Path) -> None:
        backend = CapturingBackend()
        backend.on = True
        served(toy, db, backend).choose(toy, toy.problem())
        assert toy.launches == []

    def test_a_failure_is_not_a_time_of_zero(self, toy: Toy, db: Path) -> None:
        toy.raises = {C: RuntimeError("hipErrorInvalidValue")}
        toy.times[C] = 0.001  # an ignored error leaves the elapsed time at 0.0, the best of all
        assert served(toy, db).choose(toy, toy.problem()).config == B

    def test_wrong_numbers_do_not_win(self, toy: Toy, db: Path) -> None:
        toy.wrong = {C}
        assert served(toy, db).choose(toy, toy.problem()).config == B

    def test_no_choice_rests_on_one_cold_sample(self, toy: Toy, db: Path) -> None:
        serving = served(toy, db)
        serving.choose(toy, toy.problem())
        assert min(t.n for t, _ in serving.lookup.timings(toy.problem())) >= 3

    def test_candidates_are_timed_on_their_own_buffers(self, toy: Toy, db: Path) -> None:
        ids = routing.draw("uniform", 16, 8, 2)
        before = ids.clone()
        served(toy, db).choose(toy, toy.problem(), topk_ids=ids)
        assert torch.equal(ids, before) and all(seen.data_ptr() != ids.data_ptr() for seen in toy.seen_ids)

    @pytest.mark.parametrize(
        "change",
        [{"topk": 1}, {"units": 3}, {"arch": "gfx950"}, {"dims": (("block_m", 64),)}, {"dtype": "int64"}],
    )
    def test_the_key_holds_what_decides(self, toy: Toy, db: Path, here: Environment, change: dict[str, object]) -> None:
        stored(db, timing(toy.problem(**change), C, 9.0, here))  # type: ignore[arg-type]
        assert served(toy, db, mode="replay").choose(toy, toy.problem()).tier in ("neighbour", "predicted")

    def test_a_restart_and_another_size_of_the_bucket_pay_nothing(self, toy: Toy, db: Path) -> None:
        served(toy, db).choose(toy, toy.problem())
        count = len(toy.launches)
        assert served(toy, db).choose(toy, toy.problem()).tier == "measured"
        assert len(toy.launches) == count

    def test_a_small_gain_within_the_noise_keeps_the_default(self, toy: Toy, db: Path) -> None:
        toy.times = {A: 30.0, B: 29.8}
        assert served(toy, db).choose(toy, toy.problem()).config == A


def calls_of(run: Callable[[], object]) -> int:
    """Python functions that are entered meanwhile: work, but no time."""
    count = 0

    def tally(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(tally)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("mode", ["replay", "tune"])
def test_a_miss_is_as_much_work_however_many_there_were(mode: str, toy: Toy, db: Path) -> None:
    def asked(hidden: int, tokens: int = 16) -> Problem:
        return toy.problem(tokens, dims=(("block_m", 16), ("hidden", hidden)))

    stored(db, *(timing(asked(hidden, tokens), C, 9.0, OTHER) for hidden in range(50) for tokens in (4, 8)))
    serving = Dispatcher(Settings(db=db, budget=0.0, mode=mode), CapturingBackend())  # type: ignore[arg-type]
    assert serving.choose(toy, asked(7)).tier == "neighbour"
    work = []
    for hidden in range(1000, 1150):
        problem = asked(hidden)
        work.append(calls_of(lambda problem=problem: serving.choose(toy, problem, key=(problem.key,))))  # type: ignore[misc]
    assert sorted(work[-20:])[10] <= 1.2 * sorted(work[20:40])[10]
    assert len(serving.lookup.known(toy.name, serving.places.here("cpu", 0)).keys()) == 100
    for each in vars(serving).values():
        if isinstance(each, Bounded):
            each.limit = 100
    for hidden in range(2000, 2020):
        serving.choose(toy, asked(hidden))
    assert len(serving.wanted()) <= 100


def test_blocks_that_overlap_leave_nothing_behind() -> None:
    """Threads may end their blocks in another order than they began them."""
    before = dispatcher()
    first, second, third = (using(mode="replay", db=Path(":memory:")) for _ in range(3))
    one, two = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert dispatcher() is two
    three = third.__enter__()
    second.__exit__(None, None, None)
    assert dispatcher() is three and one is not two
    third.__exit__(None, None, None)
    assert dispatcher() is before
