"""Warm-up: what it measures, that a second run measures nothing, budgets, interruption, wanted problems."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from toy import A, B, C, CapturingBackend, Toy, ToyClock, timing

from moecache.cli.progress import Meter
from moecache.dispatch import Dispatcher, dispatcher, using
from moecache.kernels import registry as ops
from moecache.models import Model
from moecache.schemas.errors import DeviceLost, InvalidInput
from moecache.schemas.layer import Layer
from moecache.schemas.timing import Environment
from moecache.store import Store
from moecache.warmup import Progress, left_out, problems, warmup

LAYER = Layer(model="m", experts=8, global_experts=8, topk=2, hidden=64, intermediate=32)


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
def serving(toy: Toy, db: Path) -> Iterator[Dispatcher]:
    with using(db=db, mode="tune", strict=False, budget=2.0, backend=CapturingBackend(), clock=ToyClock(toy)) as d:
        yield d


def test_a_layer_is_measured_once_and_a_second_run_measures_nothing(toy: Toy, serving: Dispatcher) -> None:
    rows = warmup(LAYER, tokens=[1, 16, 256], routing=["uniform"], ops=["toy"])
    assert [r.problem.tokens for r in rows] == [1, 16, 256]
    assert all(r.problem.routing for r in rows)
    for row in rows:
        assert (row.config, row.tier, row.measured) == (C, "measured", 3)
        assert (row.us, row.default_us, row.margin) == (10.0, 30.0, pytest.approx(2.0))
    count = len(toy.launches)
    again = warmup(LAYER, tokens=[1, 16, 256], routing=["uniform"], ops=["toy"])
    assert len(toy.launches) == count and again == [replace(row, measured=0) for row in rows]
    serving.reload()  # as another process would
    third = warmup(LAYER, tokens=[1, 16, 256], routing=["uniform"], ops=["toy"])
    assert third[0].measured == 0 and len(toy.launches) == count


def test_the_problems_of_a_warm_up_can_be_listed_without_measuring(toy: Toy, serving: Dispatcher) -> None:
    listed = problems(LAYER, tokens=[1, 16], routing=["uniform", "zipf"], ops=["toy"])
    assert not toy.launches
    rows = warmup(LAYER, tokens=[1, 16], routing=["uniform", "zipf"], ops=["toy"])
    assert listed == [row.problem for row in rows]


def test_the_module_is_callable_because_it_may_stand_in_the_place_of_the_function(
    toy: Toy, serving: Dispatcher
) -> None:
    module = sys.modules["moecache.warmup"]
    assert module([toy.problem()])[0].measured == 3  # type: ignore[operator]


def test_only_what_is_missing_is_measured(toy: Toy, serving: Dispatcher) -> None:
    warmup(LAYER, tokens=[16], routing=["uniform"], ops=["toy"])
    rows = warmup(LAYER, tokens=[16, 64], routing=["uniform"], ops=["toy"])
    assert [r.measured for r in rows] == [0, 3]


def test_each_generator_adds_its_bucket_and_equal_problems_are_tuned_once(toy: Toy, serving: Dispatcher) -> None:
    rows = warmup(LAYER, tokens=[200, 256], routing=["uniform", "zipf", "uniform", "hot1"], ops=["toy"])
    buckets = [r.problem.routing for r in rows if r.problem.tokens == 256]
    assert len(buckets) == len(set(buckets)) >= 2 and buckets[0] == "a0e0"
    assert len({r.problem.key for r in rows}) == len(rows)


def test_a_problem_is_tuned_on_routing_of_its_bucket(toy: Toy, serving: Dispatcher) -> None:
    from moecache import routing

    rows = warmup([toy.problem(64, ""), toy.problem(64, "a0e1")], routing=["zipf"])
    assert {routing.bucket(routing.histogram(ids, 8)) for ids in toy.seen_ids} == {r.problem.routing for r in rows}


def test_a_models_config_file_is_read(toy: Toy, serving: Dispatcher, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    fields = {"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 32}
    file.write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": 2, **fields}))
    rows = warmup(file, tokens=[4], routing=["uniform"], ops=["toy"])
    assert [(r.problem.tokens, r.problem.experts, r.problem.topk) for r in rows] == [(4, 8, 2)]
    with pytest.raises(InvalidInput, match="nowhere"):
        warmup(tmp_path / "nowhere.json")


def test_unverified_answers_are_measured_again_and_stay_candidates(toy: Toy, serving: Dispatcher, db: Path) -> None:
    store = Store.open(db)
    store.put([timing(toy.problem(), B, 20.0, Environment(torch="1.0"))])
    store.close()
    assert serving.choose(toy, toy.problem()).tier == "unverified"
    (row,) = warmup([toy.problem()])
    assert (row.config, row.tier, row.measured) == (C, "measured", 3)
    assert serving.choose(toy, toy.problem()).config == C


def test_wanted_problems_are_warmed_and_then_no_longer_wanted(toy: Toy, serving: Dispatcher) -> None:
    backend = serving.places._backend
    backend.on = True  # type: ignore[union-attr]
    serving.choose(toy, toy.problem(64))
    with pytest.raises(InvalidInput, match="captured"):
        warmup("wanted")
    backend.on = False  # type: ignore[union-attr]
    serving.lookup.tiers.user.want([toy.problem(source="v0"), toy.problem(units=77), toy.problem(op="gone")])
    rows = warmup("wanted")
    assert [(r.problem, r.tier) for r in rows] == [(toy.problem(64), "measured")]
    left = {p.key for p, _ in serving.lookup.tiers.user.wanted()}
    assert left == {toy.problem(units=77).key, toy.problem(op="gone").key}
    rows = warmup(LAYER, tokens=[2], routing=["uniform"], ops=["toy"], wanted=True)
    assert [r.problem.tokens for r in rows] == [2]


def test_layers_of_few_experts_are_warmed_with_the_default_routings(toy: Toy, serving: Dispatcher) -> None:
    for experts in (1, 2):
        rows = warmup(LAYER.model_copy(update={"experts": experts, "topk": 1}), tokens=[8], ops=["toy"])
        assert rows and {row.tier for row in rows} == {"measured"}


def test_a_call_that_asks_for_more_experts_than_there_are_is_warmed(toy: Toy, serving: Dispatcher) -> None:
    asked = toy.problem(8).model_copy(update={"experts": 2, "topk": 3, "routing": ""})
    serving.lookup.tiers.user.want([asked])
    rows = warmup("wanted")
    assert rows and {(row.problem.any_routing, row.tier) for row in rows} == {(asked, "measured")}
    assert not serving.lookup.tiers.user.wanted()


def test_the_budget_is_for_the_whole_run_and_spread_over_what_is_left(
    toy: Toy, serving: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, given = [0.0], []
    real = serving.measure

    def measure(*args: object, seconds: float, **kwargs: object) -> object:
        given.append(round(seconds, 3))
        now[0] += 0.5 if len(given) == 1 else seconds
        return real(*args, seconds=seconds, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(serving, "measure", measure)
    clock = SimpleNamespace(perf_counter=lambda: now[0])  # the run's: the tuner keeps its own
    monkeypatch.setattr(sys.modules["moecache.warmup"], "time", clock)
    warmup([toy.problem(2)])
    given.clear()
    rows = warmup([toy.problem(2), toy.problem(4), toy.problem(8), toy.problem(16)], budget="3s")
    assert given == [1.0, 1.25, 1.25]  # the first took half of its share; the known one cost nothing
    assert [r.measured for r in rows] == [0, 3, 3, 3]
    given.clear()
    rows = warmup([toy.problem(32), toy.problem(64)], budget=0.0)
    assert given == [] and {r.tier for r in rows} == {"neighbour"} and "budget is spent" in rows[0].reason
    with pytest.raises(InvalidInput, match="duration"):
        warmup([toy.problem(64)], budget="soon")


def test_an_interrupted_run_keeps_what_was_done_and_goes_on(
    toy: Toy, serving: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = [toy.problem(t) for t in (1, 2, 4)]
    real, calls = serving.measure, []

    def measure(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(serving, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        warmup(three)
    monkeypatch.setattr(serving, "measure", real)
    serving.reload()
    assert [r.measured for r in warmup(three)] == [0, 3, 3]


def test_one_problem_that_fails_does_not_stop_the_rest(
    toy: Toy, serving: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = serving.measure

    def measure(op: object, problem: object, *args: object, **kwargs: object) -> object:
        if problem == toy.problem(2):
            raise RuntimeError("no memory")
        return real(op, problem, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(serving, "measure", measure)
    rows = warmup([toy.problem(1), toy.problem(2), toy.problem(4)])
    assert [r.tier for r in rows] == ["measured", "neighbour", "measured"]
    assert "no memory" in rows[1].reason and rows[1].us is None

    def lost(*args: object, **kwargs: object) -> None:
        raise DeviceLost("gone")

    monkeypatch.setattr(serving, "measure", lost)
    with pytest.raises(DeviceLost):
        warmup([toy.problem(2), toy.problem(16)])


@pytest.mark.parametrize("mode", ["replay", "off"])
def test_other_modes_measure_nothing_and_say_so(toy: Toy, serving: Dispatcher, mode: str) -> None:
    with using(mode=mode):
        rows = warmup([toy.problem()])
    assert [r.measured for r in rows] == [0] and f"mode={mode}" in rows[0].reason and not toy.launches
    assert rows[0].config == (A if mode == "off" else B)


def test_progress_counts_to_the_end(toy: Toy, serving: Dispatcher) -> None:
    news: list[Progress] = []
    warmup([toy.problem(t) for t in (1, 2, 4)], progress=news.append)
    assert [n.done for n in news] == sorted(n.done for n in news)
    assert {n.total for n in news} == {3} and (news[0].done, news[0].remaining) == (0, None)
    assert (news[-1].done, news[-1].remaining) == (3, 0.0)
    assert any("timing" in n.text for n in news)
    quiet: list[Progress] = []
    warmup([toy.problem(1)], progress=quiet.append)
    assert quiet == []


def test_a_model_is_asked_for_what_its_layers_call_unless_ops_are_named(toy: Toy, serving: Dispatcher) -> None:
    def asked(**more: object) -> set[str]:
        return {problem.op for problem in problems(LAYER, tokens=[4], routing=["uniform"], **more)}  # type: ignore[arg-type]

    assert asked() == {"moe_sort", "fused_moe", "toy"}
    assert asked(ops=["grouped_gemm"]) == {"grouped_gemm"}


def test_defaults_are_every_token_bucket_and_routings_that_differ(toy: Toy, serving: Dispatcher) -> None:
    wide = LAYER.model_copy(update={"experts": 64, "global_experts": 64, "topk": 8})
    found = problems(wide, ops=["toy"])
    assert sorted({p.tokens for p in found}) == [1 << k for k in range(15)]
    buckets = [{p.routing for p in found if p.tokens == t} for t in (256, 16384)]
    assert all(len(each) >= 3 for each in buckets)


def test_what_a_call_left_untried_is_measured_though_it_has_an_answer(toy: Toy, serving: Dispatcher, db: Path) -> None:
    store = Store.open(db)
    store.put([timing(toy.problem(), A, 30.0, serving.places.first().environment)])
    store.want([toy.problem()])
    store.close()
    assert serving.choose(toy, toy.problem()).tier == "measured"
    assert [row.measured for row in warmup([toy.problem()])] == [3]
    assert [row.measured for row in warmup([toy.problem()])] == [0]


def test_a_call_that_could_not_try_all_leaves_the_rest_to_a_warm_up(toy: Toy, serving: Dispatcher) -> None:
    """A hundredth of a second suffices for the likely winner of slow candidates."""
    toy.nap = 5e-3
    with using(budget=0.01):
        assert dispatcher().choose(toy, toy.problem()).tier == "measured"
        assert len({config for config, _ in toy.launches}) == 1
        assert [p for p, _ in dispatcher().lookup.tiers.user.wanted()] == [toy.problem()]
    (row,) = warmup("wanted")
    assert (row.measured, row.config) == (3, C)
    assert serving.lookup.tiers.user.wanted() == []


def test_a_run_that_a_candidate_broke_off_goes_on_without_it(toy: Toy, serving: Dispatcher, db: Path) -> None:
    store, here = Store.open(db), serving.places.first().environment
    lost = timing(toy.problem(), B, 1.0, here).model_copy(update={"status": "timeout", "median_us": None, "n": 0})
    store.put([lost])
    store.close()
    (row,) = warmup([toy.problem()])
    assert (row.measured, row.config) == (2, C) and B not in {config for config, _ in toy.launches}
    assert len(serving.measure(toy, toy.problem())) == 3, "once there is a winner, it is tried again"


class Compilers:
    """Stands for the subprocesses; notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.dropped: list[int] = []

    def compile(self, sources: object, *_: object) -> list[object]:
        self.asked += sources  # type: ignore[arg-type]
        return []

    def drop(self) -> None:
        self.dropped.append(len(self.asked))


def test_the_kernels_of_all_problems_are_asked_for_before_the_first_is_measured(
    toy: Toy, serving: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Compilers()
    monkeypatch.setattr(serving, "helpers", lambda place: pool)
    monkeypatch.setattr(toy, "sources", lambda problem, config, device: [(config.name, problem.tokens)])
    before: list[int] = []
    real = serving.measure
    monkeypatch.setattr(serving, "measure", lambda *a, **k: before.append(len(pool.asked)) or real(*a, **k))
    warmup([toy.problem(2, "a0e0"), toy.problem(2, "a0e1"), toy.problem(4)])
    assert before[0] == 2 * 3 and pool.dropped == [len(pool.asked)]
    assert pool.asked[:4] == [(A.name, 2), (B.name, 2), (C.name, 2), (A.name, 4)], "default and best predicted first"
    pool.asked.clear()
    warmup([toy.problem(2, "a0e0")])
    assert pool.asked == [], "nothing is left to measure"


def test_all_kinds_of_layers_of_a_model_are_warmed(toy: Toy, serving: Dispatcher) -> None:
    model = Model("two", (LAYER, LAYER.model_copy(update={"experts": 6, "global_experts": 6})))
    for what in (model, list(model.layers)):
        asked = problems(what, tokens=[4], routing=["uniform"], ops=["toy", "moe_sort"])
        assert {(p.op, p.experts) for p in asked} == {(op, n) for op in ("toy", "moe_sort") for n in (LAYER.experts, 6)}
    sorts = [(p.dtype, p.dim("block_m")) for p in problems(LAYER, tokens=[4], routing=["uniform"], ops=["moe_sort"])]
    assert sorts == [("int32", 16), ("int64", 16)]


def test_what_is_left_out_is_said_and_a_named_op_without_problems_is_an_error(toy: Toy, serving: Dispatcher) -> None:
    int4 = LAYER.model_copy(update={"dtype": "int4"})
    (left,) = left_out(int4, tokens=[4])
    assert (left.op, left.nothing) == ("fused_moe", True) and "no kernels for int4" in left.reason
    assert str(left).startswith("fused_moe is left out: there are no kernels for int4 weights")
    with pytest.warns(RuntimeWarning, match="fused_moe is left out: there are no kernels for int4"):
        rows = warmup(int4, tokens=[4], routing=["uniform"], budget=0.0)
    assert {row.problem.op for row in rows} == {"moe_sort", "toy"}
    with pytest.raises(InvalidInput, match="grouped_gemm is left out: there are no kernels for int4"):
        warmup(int4, tokens=[4], ops=["toy", "grouped_gemm"])
    large = LAYER.model_copy(update={"hidden": 1024, "intermediate": 512})
    (part,) = left_out(large, tokens=[1, 4096], ops=["fused_moe"])
    assert not part.nothing and part.reason.startswith("tokens 4096: ") and "in part" in str(part)
    assert left_out([LAYER], tokens=[4]) == []


@pytest.mark.parametrize("tokens", [16, "16", b"a", [0], [-3], [1 << 18], [1.0], [True], None, torch.tensor(3)])
def test_tokens_that_no_call_has_are_named(tokens: Any, serving: Dispatcher) -> None:
    for call in (warmup, problems, left_out):
        with pytest.raises(InvalidInput, match=r"tokens.*whole numbers from 1 to 131072"):
            call(LAYER, tokens=tokens)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"ops": True}, "ops is True"), ({"ops": "toy"}, "ops is 'toy'"), ({"ops": [1]}, "ops is"),
        ({"ops": torch.tensor(3)}, "ops is"),
        ({"routing": None}, "routing is None"), ({"routing": "uniform"}, "'uniform'"), ({"routing": [None]}, "routing"),
        ({"tp": "2"}, "tp is '2'"), ({"tp": 2}, "tp=2"), ({"ep": 2}, "ep=2"), ({"dtype": "fp16"}, "dtype=fp16"),
        ({"budget": True}, "budget is True"), ({"budget": -1}, "budget=-1"), ({"budget": float("nan")}, "budget=nan"),
        ({"wanted": 1}, "wanted is 1"), ({"again": "x"}, "again is 'x'"), ({"device": "0"}, "device is '0'"),
        ({"progress": 1}, "progress is 1; allowed is a function or None"),
    ],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_named(given: dict[str, Any], told: str, serving: Dispatcher) -> None:
    with pytest.raises(InvalidInput, match=re.escape(told)):
        warmup(LAYER, **{"tokens": [1], **given})


def test_what_is_no_model_is_named(serving: Dispatcher) -> None:
    for what in (3, [3], [None]):
        with pytest.raises(InvalidInput, match=r"is no layer and no problem"):
            warmup(what)  # type: ignore[arg-type]


def test_unknown_names_are_errors(serving: Dispatcher, toy: Toy) -> None:
    with pytest.raises(InvalidInput, match="no op named 'nope'"):
        warmup(LAYER, ops=["nope"])
    with pytest.raises(InvalidInput, match="generator"):
        warmup(LAYER, tokens=[4], ops=["toy"], routing=["lumpy"])


def test_a_noisy_machine_is_told_at_the_end_of_a_run(toy: Toy, serving: Dispatcher, db: Path) -> None:
    rows = warmup(LAYER, tokens=[1, 16, 256], routing=["uniform"], ops=["toy"])
    assert not any("machine is noisy" in line for line in Meter(db).conclude(rows))
    noisy = [replace(row, noise=share) for row, share in zip(rows, (0.01, 0.2, 0.4), strict=True)]
    assert Meter(db).conclude(noisy)[-1].startswith("this machine is noisy: samples lie 20 % from their median")
    assert not any(
        "machine is noisy" in line for line in Meter(db).conclude([replace(row, measured=0) for row in noisy])
    )
