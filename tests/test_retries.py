"""Failures that belong to the moment are tried again by a later process, and no crash at every start."""

import errno
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from toy import A, B, C, CapturingBackend, Toy, ToyClock, timing

from moecache.devices import Places
from moecache.dispatch import Dispatcher, using
from moecache.kernels import registry as ops
from moecache.schemas.config import Config
from moecache.schemas.errors import DeviceLost, NoDevice
from moecache.schemas.flags import FLAGS, flags_from
from moecache.schemas.timing import Environment, Status, Timing
from moecache.settings import Settings
from moecache.store import Store
from moecache.tuning.failing import kind
from moecache.warmup import warmup


@pytest.fixture
def toy() -> Iterator[Toy]:
    toy = Toy()
    ops.register(toy)
    yield toy
    ops._wrapped.pop(toy.name, None)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "c.sqlite"


@pytest.fixture
def here() -> Environment:
    return Places(CapturingBackend()).first().environment


def process(toy: Toy, db: Path) -> Dispatcher:
    """A dispatcher as another process would make it."""
    toy.launches.clear()
    settings = Settings(db=db, mode="tune", budget=2.0)
    return Dispatcher(settings, CapturingBackend(), ToyClock(toy))


def warmed(toy: Toy, db: Path) -> tuple[Config, int]:
    """What a later process is served after its warm-up, and how many candidates that measured."""
    toy.launches.clear()
    with using(Settings(db=db, mode="tune"), backend=CapturingBackend(), clock=ToyClock(toy)):
        (row,) = warmup([toy.problem()])
    return row.config, row.measured


def bad(toy: Toy, config: Config, status: Status, where: Environment, n: int = 0) -> Timing:
    fields = {"status": status, "median_us": None, "mad_us": None, "n": n}
    return timing(toy.problem(), config, 1.0, where, is_default=config == A).model_copy(update=fields)


def tried(toy: Toy) -> set[Config]:
    return {config for config, _ in toy.launches}


@pytest.mark.parametrize("status", ["oom", "timeout", "crashed", "lost"])
def test_a_warm_up_of_a_later_process_tries_again_what_the_moment_made_fail(
    toy: Toy, db: Path, here: Environment, status: Status
) -> None:
    with Store.open(db) as store:
        store.put([timing(toy.problem(), A, 30.0, here, is_default=True), bad(toy, C, status, here)])
    assert warmed(toy, db) == (C, 3) and C in tried(toy)
    assert warmed(toy, db) == (C, 0), "what is settled is measured once"


@pytest.mark.parametrize("status", ["raised", "compile", "wrong"])
def test_what_is_the_configs_own_fault_stays(toy: Toy, db: Path, here: Environment, status: Status) -> None:
    with Store.open(db) as store:
        store.put([timing(toy.problem(), A, 30.0, here, is_default=True), bad(toy, C, status, here)])
    assert warmed(toy, db) == (A, 0) and tried(toy) == set()


@pytest.mark.parametrize(("error", "status"), [(MemoryError(), "oom"), (NoDevice("gone"), "lost")])
def test_a_failure_that_comes_back_is_given_up_and_counted(
    toy: Toy, db: Path, error: Exception, status: Status
) -> None:
    toy.raises = {C: error}
    assert warmed(toy, db) == (B, 3) and warmed(toy, db) == (B, 3)
    with Store.open(db, readonly=True) as store:
        (row,) = store.timings(config=C.name)
        assert (row.status, row.n, row.passing) == (status, 2, False)
    assert warmed(toy, db) == (B, 0) and C not in tried(toy)


def test_one_process_tries_it_once_and_counts_it_once(toy: Toy, db: Path) -> None:
    toy.raises = {C: MemoryError()}
    with using(Settings(db=db, mode="tune"), backend=CapturingBackend(), clock=ToyClock(toy)) as serving:
        assert [warmup([toy.problem()])[0].measured for _ in range(3)] == [3, 0, 0]
        serving.measure(toy, toy.problem())
        (row,) = [row for row, _ in serving.lookup.timings(toy.problem()) if row.config == C]
    assert row.n == 1 and row.passing


@pytest.mark.parametrize("status", ["raised", "oom", "timeout", "compile", "crashed", "wrong", "lost"])
def test_a_problem_whose_every_candidate_failed_is_asked_again(
    toy: Toy, db: Path, here: Environment, status: Status
) -> None:
    with Store.open(db) as store:
        store.put([bad(toy, config, status, here) for config in (A, B, C)])
    serving = process(toy, db)
    choice = serving.choose(toy, toy.problem())
    serving.close()
    assert (choice.tier, choice.config) == ("measured", C) and tried(toy) == {A, B, C}


class Hanging(ToyClock):
    """Waits in vain for every call."""

    def prepare(self, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        calls[0]()
        raise DeviceLost("the device has not finished a call")


def test_a_crash_at_every_start_ends_after_two(toy: Toy, db: Path) -> None:
    """A candidate that takes the device with it, in a problem without a winner: no third process dies of it."""
    toy.times = {A: 30.0}
    ends = []
    for _ in range(4):
        toy.launches.clear()
        serving = Dispatcher(Settings(db=db, mode="tune"), CapturingBackend(), Hanging(toy))
        try:
            ends.append(serving.choose(toy, toy.problem()).tier)
        except DeviceLost:
            ends.append("lost")
        serving.close()
    assert ends == ["lost", "lost", "predicted", "predicted"] and toy.launches == []


def test_a_failure_of_another_moment_may_be_predicted_and_a_crash_may_not(
    toy: Toy, db: Path, here: Environment
) -> None:
    for status, config in (("oom", B), ("lost", B), ("crashed", C), ("timeout", C), ("wrong", C)):
        db.unlink(missing_ok=True)
        with Store.open(db) as store:
            store.put([bad(toy, B, status, here)])  # type: ignore[arg-type]
        serving = Dispatcher(Settings(db=db, mode="replay"), CapturingBackend(), ToyClock(toy))
        assert serving.choose(toy, toy.problem()).config == config, status
        serving.close()


def test_prune_failed_forgets_failures_alone(toy: Toy, db: Path, here: Environment) -> None:
    with Store.open(db) as store:
        store.put([timing(toy.problem(), A, 30.0, here), bad(toy, B, "wrong", here), bad(toy, C, "oom", here, 2)])
        assert store.prune(failed=True) == 2 and [t.config for t in store.timings()] == [A]
    assert warmed(toy, db) == (A, 0)


def test_again_measures_what_is_stored(toy: Toy, db: Path) -> None:
    assert warmed(toy, db) == (C, 3)
    toy.times = {A: 30.0, B: 20.0, C: 25.0}
    toy.launches.clear()
    with using(Settings(db=db, mode="tune"), backend=CapturingBackend(), clock=ToyClock(toy)):
        assert [row.measured for row in warmup([toy.problem()])] == [0]
        assert [(row.config, row.measured) for row in warmup([toy.problem()], again=True)] == [(B, 3)]
        toy.times[B] = 50.0
        assert [(row.config, row.measured) for row in warmup("stored")] == [(C, 3)]
        assert warmup("stored", ops=["moe_sort"]) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED when calling"), "oom"),
        (RuntimeError("0 active drivers ([]). There should only be one."), "lost"),
        (RuntimeError("Found no NVIDIA driver on your system."), "lost"),
        (RuntimeError("CUDA error: no CUDA-capable device is detected"), "lost"),
        (RuntimeError("No HIP GPUs are available"), "lost"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "lost"),
        (AssertionError("Torch not compiled with CUDA enabled"), "lost"),
        (NoDevice("the driver shows no device"), "lost"),
        (OSError(errno.ENOSPC, "No space left on device"), "lost"),
        (ModuleNotFoundError("No module named 'x'"), "lost"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "raised"),
        (ValueError("no such block"), "raised"),
    ],
)
def test_what_a_failure_says_of_its_config(error: Exception, status: str) -> None:
    assert kind(error) == status


# --- what changes how code runs


def test_flags_are_named_where_they_differ_from_the_default() -> None:
    assert flags_from({}) == flags_from(FLAGS) == flags_from({"PATH": "/bin", "TRITON_INTERPRET": ""}) == ""
    assert flags_from({"TRITON_INTERPRET": "1"}) == flags_from({"TRITON_INTERPRET": "true"}) == "TRITON_INTERPRET=1"
    given = {"TRITON_F32_DEFAULT": "ieee", "TRITON_DEFAULT_FP_FUSION": "off", "CUDA_LAUNCH_BLOCKING": "0"}
    assert flags_from(given) == "TRITON_DEFAULT_FP_FUSION=0 TRITON_F32_DEFAULT=ieee"


def test_timings_of_other_flags_never_mix(toy: Toy, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter's timings answer nothing elsewhere, and its failures are remembered of it alone."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    toy.raises = {C: RuntimeError("interpreted")}
    serving = process(toy, db)
    assert serving.choose(toy, toy.problem()).config == B
    serving.close()
    monkeypatch.delenv("TRITON_INTERPRET")
    toy.raises.clear()
    replay = Dispatcher(Settings(db=db, mode="replay"), CapturingBackend(), ToyClock(toy))
    assert replay.choose(toy, toy.problem()).tier == "predicted", "not even unverified"
    replay.close()
    serving = process(toy, db)
    choice = serving.choose(toy, toy.problem())
    assert (choice.tier, choice.config) == ("measured", C) and tried(toy) == {A, B, C}
    assert [e.flags for e in sorted({t.environment for t, _ in serving.lookup.timings(toy.problem())}, key=str)] != [""]
    serving.close()


def test_an_unset_flag_leaves_the_id_of_an_environment_alone(tmp_path: Path) -> None:
    plain, interpreted = Environment(torch="2.8.0"), Environment(torch="2.8.0", flags="TRITON_INTERPRET=1")
    assert plain.id == "7d41e1985d1f" != interpreted.id
    toy = Toy()
    with Store.open(tmp_path / "c.sqlite") as store:
        store.put([timing(toy.problem(), A, 1.0, plain), timing(toy.problem(), A, 9.0, interpreted)])
    with Store.open(tmp_path / "c.sqlite", readonly=True) as store:
        assert {t.environment for t in store.timings()} == {plain, interpreted} and store.check() == []
