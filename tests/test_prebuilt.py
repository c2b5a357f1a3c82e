"""The files inside the package: fresh, answered as predicted and as nothing better, and how they are made."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from ep_local import contexts
from toy import A, B, C, CapturingBackend, Toy, ToyClock, timing

import moecache
from moecache.cli import app
from moecache.devices import Place
from moecache.dispatch import Dispatcher, exchange, policy
from moecache.dispatch.policy import Ask
from moecache.kernels import registry as ops
from moecache.models import read_model
from moecache.schemas import warm
from moecache.schemas.config import Config, config
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Prediction, Timing
from moecache.settings import MEMORY, PREBUILT, Settings
from moecache.store import Store
from moecache.verify.usable import Findings, verify

ROOT = Path(__file__).parent.parent
ARCHS = ("sm_90", "gfx942", "gfx950")
H200 = Environment(device_name="NVIDIA H200", driver="580.1", torch="2.12.0", triton="3.9.0")
OLDER = H200.model_copy(update={"driver": "570.1"})


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prebuilt", ROOT / "benchmarks" / "prebuilt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prebuilt = load()


def shipped(arch: str) -> list[Prediction]:
    with Store.open(PREBUILT / f"predicted-{arch}.sqlite", shipped=True) as store:
        return store.predictions()


# --- what ships


@pytest.mark.parametrize("arch", ARCHS)
def test_the_predicted_files_are_those_of_the_present_kernels(arch: str) -> None:
    """`make prebuilt` makes them anew."""
    pytest.importorskip("triton")
    rows, stale = shipped(arch), "stale: run `make prebuilt`"
    sources = {row.problem.op: row.problem.source for row in rows}
    assert sources == {name: ops.get(name).source for name in ops.names() if ops.built_in(name)}, stale
    assert {row.device for row in rows} == {device.name for device in KNOWN.values() if device.arch == arch}
    by_name = {device.name: device for device in KNOWN.values()}
    for row in random.Random(0).sample(rows, 60):
        assert prebuilt.prediction(row.problem, by_name[row.device]) == row, stale


def test_every_known_architecture_has_one() -> None:
    assert set(prebuilt.archs()) == set(ARCHS)
    assert {f"predicted-{arch}.sqlite" for arch in ARCHS} <= {file.name for file in PREBUILT.glob("*.sqlite")}


def test_they_cover_what_the_layers_ask() -> None:
    rows = [row for row in shipped("gfx942") if row.device == "AMD Instinct MI300X" and row.problem.op == "fused_moe"]
    asked = {(p.experts, p.dim("hidden"), p.dim("intermediate"), p.dim("quant", "")) for p in (r.problem for r in rows)}
    shapes = {(e, h, i, quant) for e, _, h, i in prebuilt.SHAPES.values() for quant in ("", "fp8_block")}
    assert asked == shapes and {row.problem.tokens for row in rows} == set(prebuilt.TOKENS)
    qwen = {row.problem.routing for row in rows if row.problem.experts == 128 and row.problem.tokens == 4096}
    assert qwen == set(prebuilt.buckets(4096, 128, 8)) | set(prebuilt.buckets(4096, 128, 4)) and len(qwen) > 2
    assert all(row.problem.units == 304 and row.problem.vendor == "amd" for row in rows)


def test_they_are_small_sound_and_open_where_nobody_may_write() -> None:
    for file in PREBUILT.glob("*.sqlite"):
        assert file.stat().st_size < 1 << 20 and file.read_bytes()[18:20] == b"\x01\x01", "journal mode DELETE"
        with Store.open(file, shipped=True) as store:
            assert store.check() == []


# --- what they answer


@pytest.fixture
def asked() -> Problem:
    pytest.importorskip("triton")
    rows = [row.problem for row in shipped("gfx942") if row.problem.op == "fused_moe" and row.problem.tokens == 256]
    return rows[0]


def serving(db: Path, *, path: tuple[Path, ...] = ()) -> Dispatcher:
    return Dispatcher(Settings(mode="replay", db=db, path=path))


def test_a_shipped_prediction_answers_as_predicted(asked: Problem, tmp_path: Path) -> None:
    (row,) = [r for r in shipped("gfx942") if r.problem == asked and r.device == "AMD Instinct MI300X"]
    told = serving(tmp_path / "x.sqlite").explain(asked)
    assert told.choice is not None and told.timings == ()
    assert (told.choice.tier, told.choice.config, told.choice.expected_us) == (
        "predicted",
        row.config,
        row.predicted_us,
    )
    assert told.choice.source == str(PREBUILT / "predicted-gfx942.sqlite")
    assert "predicted with the rates of AMD Instinct MI300X, by the cost model" in told.choice.reason and told.choice.by


def test_other_kernels_get_no_answer_from_it(asked: Problem, tmp_path: Path) -> None:
    stale = asked.model_copy(update={"source": "0123456789ab"})
    choice = serving(tmp_path / "x.sqlite").choose(ops.get(asked.op), stale)
    assert (choice.tier, choice.source) == ("predicted", "cost model")


# --- how a measured file is made


TINY = {"tiny": (8, 2, 64, 48), "small": (4, 1, 32, 128)}


def test_measuring_stops_in_time_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prebuilt, "SHAPES", TINY)
    file, now = tmp_path / "m.sqlite", iter([0, 0, *[9] * 9])  # the second problem would begin too late
    monkeypatch.setattr(prebuilt, "time", SimpleNamespace(monotonic=lambda: next(now)))
    command = ["measure", str(file), "--layers", "small:bf16", "tiny:bf16", "--tokens", "1", "4"]
    assert prebuilt.main([*command, "--budget-s", "5"]) == 1
    told = capsys.readouterr().out
    assert "problems are left; the same command goes on" in told and "tiny" not in told
    with Store.open(file, readonly=True) as store:
        first = {(t.problem.key, t.config, t.measured_at) for t in store.timings()}
        assert len({key for key, *_ in first}) == 1
    monkeypatch.undo()
    monkeypatch.setattr(prebuilt, "SHAPES", TINY)
    assert prebuilt.main(command) == 0
    with Store.open(file, readonly=True) as store:
        rows = store.timings()
        assert first <= {(t.problem.key, t.config, t.measured_at) for t in rows}, "nothing is measured twice"
        assert {t.problem.op for t in rows} == {"fused_moe", "moe_sort"}
        assert {t.problem.experts for t in rows} == {4, 8} and {t.problem.tokens for t in rows} == {1, 4}
    assert prebuilt.main(command) == 0 and " 0 candidates now" in capsys.readouterr().out.splitlines()[-1]


def test_measuring_is_what_warm_does_for_the_published_models() -> None:
    """A layer of each shape asks what the model's config.json asks."""
    models = {
        "mixtral_8x7b": ("mixtral-8x7b", 1),
        "mixtral_tp8": ("mixtral-8x7b", 8),
        "qwen3_30b_a3b": ("qwen3-30b-a3b", 1),
        "dsv3_tp8": ("deepseek-v3", 8),
        "gptoss_120b": ("gpt-oss-120b", 1),
    }
    assert tuple(warm.TOKENS) == prebuilt.TOKENS
    for layer in prebuilt.layers():
        name, tp = models[layer.model]
        (asked,) = read_model(ROOT / "examples" / "models" / f"{name}.json", tp=tp, dtype=layer.dtype).layers
        for op in map(ops.get, ("fused_moe", "moe_sort")):
            mine, theirs = ({p.key for p in op.problems(each, (1, 64, 4096), KNOWN["h200"])} for each in (layer, asked))
            assert mine == theirs and mine


def test_a_layer_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no layers olmoe:bf16; there are mixtral_8x7b:bf16"):
        prebuilt.main(["measure", str(tmp_path / "m.sqlite"), "--layers", "olmoe:bf16"])


def measured(problem: Problem, us: float, where: Environment = H200, **more: Any) -> list[Timing]:
    """Two usable timings; the first of the op's configs is the default, the second wins."""
    first, second = ops.get(problem.op).space(problem, device_of(problem))[:2]
    return [timing(problem, first, 2 * us, where, is_default=True, **more), timing(problem, second, us, where, **more)]


def device_of(problem: Problem) -> Device:
    return next(device for device in KNOWN.values() if device.arch == problem.arch)


def test_anything_measured_goes_before_it(asked: Problem, tmp_path: Path) -> None:
    op, mine, behind = ops.get(asked.op), tmp_path / "mine.sqlite", tmp_path / "behind.sqlite"
    neighbour = asked.model_copy(update={"tokens": 512})
    with Store.open(mine) as store:
        store.put(measured(neighbour, 9.0))
    assert serving(mine).choose(op, asked).tier == "neighbour"
    with Store.open(behind) as store:
        store.put(measured(asked, 5.0))
    choice = serving(mine, path=(behind,)).choose(op, asked)
    assert (choice.tier, choice.source, choice.expected_us) == ("unverified", str(behind), 5.0)


@pytest.fixture
def guess(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that predicts A for this CPU, which the toy's own costs never choose."""
    here = CapturingBackend().device()
    monkeypatch.setattr(policy, "KNOWN", {"here": here, "faster": here.model_copy(
        update={"name": "faster", "bandwidth_gbs": 9e9})})  # fmt: skip
    file = tmp_path / "guess.sqlite"
    with Store.memory() as store:
        store.predict([Prediction(problem=toy.problem(), device=here.name, config=A, predicted_us=7.0, model="m")])
        store.export_file(file)
    return file


def toy_serving(toy: Toy, tmp_path: Path, *files: Path, mode: Any = "replay") -> Dispatcher:
    settings = Settings(mode=mode, db=tmp_path / "user.sqlite", path=files, budget=5.0)
    return Dispatcher(settings, CapturingBackend(), ToyClock(toy))  # type: ignore[arg-type]


def change(file: Path, **fields: Any) -> None:
    """The one prediction with other fields."""
    with Store.open(file) as store:
        (row,) = store.predictions()
        with Store.memory() as fresh:
            fresh.predict([row.model_copy(update=fields)])
            fresh.export_file(file.with_name("fresh.sqlite"))
    file.with_name("fresh.sqlite").replace(file)


def test_a_stored_prediction_stands_for_the_ranking(toy: Toy, guess: Path, tmp_path: Path) -> None:
    assert toy_serving(toy, tmp_path).choose(toy, toy.problem()).config == B, "the lowest cost"
    choice = toy_serving(toy, tmp_path, guess).choose(toy, toy.problem())
    assert (choice.config, choice.tier, choice.source, choice.expected_us) == (A, "predicted", str(guess), 7.0)
    assert toy_serving(toy, tmp_path, guess).choose(toy, toy.problem(64)).config == B, "another problem"


@pytest.mark.parametrize(
    "fields", [{"device": "faster"}, {"device": "nobody's"}, {"config": config("plain", block=64)}]
)
def test_one_of_other_rates_or_that_does_not_fit_is_left_out(
    toy: Toy, guess: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    change(guess, **fields)
    choice = toy_serving(toy, tmp_path, guess).choose(toy, toy.problem())
    assert (choice.config, choice.tier, choice.source) == (B, "predicted", "cost model")


def test_one_that_failed_here_is_left_out(toy: Toy, guess: Path, tmp_path: Path) -> None:
    active = toy_serving(toy, tmp_path, guess)
    active.failed(toy.problem(), A, RuntimeError("no"))
    assert active.choose(toy, toy.problem()).config == B
    with Store.open(tmp_path / "user.sqlite") as store:
        here = active.places.here("cpu", 0).environment
        store.put([Timing(problem=toy.problem(), config=A, environment=here, status="wrong", reason="bad")])
    assert toy_serving(toy, tmp_path, guess).choose(toy, toy.problem()).config == B


def test_a_variant_is_answered_by_one_of_that_variant_alone(toy: Toy, guess: Path, tmp_path: Path) -> None:
    active = toy_serving(toy, tmp_path, guess)
    assert active.choose(toy, toy.problem(), variant="plain").config == A
    assert active.choose(toy, toy.problem(), variant="other").config == C


def test_it_keeps_no_call_from_tuning(toy: Toy, guess: Path, tmp_path: Path) -> None:
    choice = toy_serving(toy, tmp_path, guess, mode="tune").choose(toy, toy.problem())
    assert (choice.config, choice.tier) == (C, "measured") and {tried for tried, _ in toy.launches} == {A, B, C}


def test_equal_digests_mean_equal_predictions(toy: Toy, guess: Path, tmp_path: Path) -> None:
    first, without = (toy_serving(toy, tmp_path, *files).digest([toy.name]) for files in ((guess,), ()))
    assert first == toy_serving(toy, tmp_path, guess).digest([toy.name]) != without
    change(guess, config=B)
    assert toy_serving(toy, tmp_path, guess).digest([toy.name]) not in (first, without)


def test_a_device_is_told_by_its_rates_whatever_its_name(asked: Problem) -> None:
    lookup = serving(MEMORY).lookup
    for product, found in (("mi300x", "AMD Instinct MI300X"), ("mi325x", "AMD Instinct MI325X")):
        device = KNOWN[product].model_copy(update={"name": "AMD Radeon Graphics"})
        choice = policy.decide(Ask(ops.get(asked.op), asked, Place(None, device, 0, Environment())), lookup)
        assert f"with the rates of {found}" in choice.reason
    part = KNOWN["mi300x"].model_copy(update={"bandwidth_gbs": 650.0})
    choice = policy.decide(Ask(ops.get(asked.op), asked, Place(None, part, 0, Environment())), lookup)
    assert (choice.tier, choice.source) == ("predicted", "cost model")


# --- what the commands say of them


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments], prog_name="moecache")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, (arguments, done.exit_code, done.output)
    return done.stdout


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two predictions; the user has a measurement of another problem."""
    for name in ("MODE", "PATH", "STRICT"):
        monkeypatch.delenv(f"MOECACHE_{name}", raising=False)
    user, folder = tmp_path / "user.sqlite", tmp_path / "prebuilt"
    monkeypatch.setenv("MOECACHE_DB", str(user))
    for place in ("moecache.settings", "moecache.cli.find"):
        monkeypatch.setattr(f"{place}.PREBUILT", folder)
    with Store.memory() as store:
        rows = [row for row in shipped("gfx942") if row.problem.op == "moe_sort" and row.problem.tokens == 256]
        store.predict(rows[:2])
        store.export_file(folder / "predicted-gfx942.sqlite")
    with Store.open(user) as store:
        store.put([timing(Toy().problem(), A, 5.0, H200)])
    return folder / "predicted-gfx942.sqlite"


def test_ls_lists_predictions_of_a_file_that_is_named(file: Path) -> None:
    found = json.loads(run("ls", "--db", file, "--json"))
    assert len(found) == 2 and all(each["predicted_us"] > 0 and "median_us" not in each for each in found)
    (winner,) = json.loads(run("ls", "--json"))
    assert winner["problem"]["op"] == "toy" and "predicted_us" not in winner, "the measured ones alone"
    run("ls", "--db", file, "environment=abc", code=1)
    header, *lines = run("ls", "--db", file).splitlines()
    assert "predicted µs" in header and "MAD" not in header
    assert len(lines) == 2 and all("AMD_Instinct_MI3" in line for line in lines)


def test_the_other_commands_know_them(file: Path) -> None:
    first = json.loads(run("ls", "--db", file, "--json"))[0]
    (told,) = json.loads(run("explain", "--key", first["id"], "--json"))
    assert told["choice"]["tier"] == "predicted" and told["choice"]["source"] == str(file)
    assert "no findings" in run("verify", "--db", file)
    report = json.loads(run("doctor", "--json"))
    assert report["files"][-1]["role"] == "prebuilt" and report["files"][-1]["stats"]["predictions"] == 2
    out = file.with_name("out.sqlite")
    assert "no timings and 2 predictions from" in run("export", out, "--db", file)
    run("report", page := file.with_name("page.html"))
    assert "user.sqlite" in page.read_text() and "predicted-gfx942" not in page.read_text()


def test_verify_judges_them(file: Path) -> None:
    with Store.open(file) as store:
        row = store.predictions()[0]
        store.predict([row.model_copy(update={"config": config("teleport", speed=9)})])
    assert "teleport(speed=9)" in run("verify", "--db", file, code=1)
    with Store.open(file) as store:
        store.predict([row.model_copy(update={"problem": row.problem.model_copy(update={"source": "0123456789ab"})})])
    assert "code that has changed since: 1 predictions not judged" in run("verify", "--db", file, code=1)


# --- how they are made


@pytest.mark.parametrize("change", ["nothing", "a source", "a config", "a row less"])
def test_check_finds_a_stale_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    rows = shipped("gfx950")[:5]
    monkeypatch.setattr(prebuilt, "predictions", lambda arch: list(rows))
    monkeypatch.setattr(prebuilt, "archs", lambda: ["gfx950"])
    assert prebuilt.main(["predict", "--folder", str(tmp_path)]) == 0
    edits: dict[str, Prediction | None] = {
        "nothing": rows[0],
        "a source": rows[0].model_copy(update={"problem": rows[0].problem.model_copy(update={"source": "x"})}),
        "a config": rows[0].model_copy(update={"config": config("other")}),
        "a row less": None,
    }
    rows[:1] = [edits[change]] if edits[change] else []  # type: ignore[list-item]
    assert prebuilt.main(["predict", "--check", "--folder", str(tmp_path)]) == int(change != "nothing")
    assert ("run `make prebuilt`" in capsys.readouterr().err) == (change != "nothing")


def sorting(tokens: int, **changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "op": "moe_sort", "vendor": "nvidia", "arch": "sm_90", "units": 132, "tokens": tokens, "experts": 64,
        "topk": 8, "routing": "a0e0", "dtype": "int32", "source": ops.get("moe_sort").source, "dims": {"block_m": 16},
    }  # fmt: skip
    return Problem(**fields | changes)


def named(number: int) -> Config:
    return config("oneshot", programs=number)


def race(
    problem: Problem, times: list[float], default: int = 0, where: Environment = H200, **more: Any
) -> list[Timing]:
    day = {"measured_at": "2026-01-01T00:00:00+00:00"} | more
    rows = [timing(problem, named(n), us, where, is_default=n == default) for n, us in enumerate(times)]
    return [row.model_copy(update=day) for row in rows]


@pytest.fixture
def caches(tmp_path: Path) -> list[Path]:
    """Two files: a plain win, a tie that the default wins, one that the lowest wins; what stays out."""
    first, second = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    with Store.open(first) as store:
        store.put(race(sorting(1), [50.0, 10.0, 20.0, 30.0, 40.0]))
        store.put(race(sorting(16), [10.08, 10.0, 10.05, 30.0, 40.0]))
        store.put(race(sorting(64), [50.0, 10.09, 10.06, 10.03, 10.0, 60.0]))
        store.put(race(sorting(256), [50.0, 10.0], where=OLDER))
        store.put([Timing(problem=sorting(1), config=named(9), environment=H200, status="wrong", reason="bad")])
    with Store.open(second) as store:
        store.put(race(sorting(256), [9.0, 20.0, 30.0, 40.0], measured_at="2026-02-01T00:00:00+00:00"))
        store.put(race(sorting(1024, source="0123456789ab"), [5.0, 4.0]))
        store.put(race(sorting(1024, op="mine"), [5.0, 4.0]))
        store.put(race(sorting(1024), [5.0, 4.0], where=Environment(device_name="NVIDIA H100")))
        store.put(race(sorting(1024, arch="sm_100"), [5.0, 4.0], where=Environment(device_name="NVIDIA H200")))
    return [first, second]


def test_pack_keeps_winner_default_and_two_runners_up(
    caches: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [file.read_bytes() for file in caches]
    assert prebuilt.main(["pack", "h200", *map(str, caches), "--folder", str(tmp_path / "out")]) == 0
    assert [file.read_bytes() for file in caches] == before
    with Store.open(tmp_path / "out" / "h200.sqlite", shipped=True) as store:
        kept = {p: [t.config["programs"] for t in store.timings(sorting(p))] for p in (1, 16, 64, 256)}
        assert kept == {1: [1, 2, 3, 0], 16: [1, 2, 0], 64: [4, 3, 2, 0], 256: [0, 1, 2]}
        winners = {w.problem.tokens: (w.config["programs"], w.environment) for w in store.winners()}
        assert winners == {1: (1, H200), 16: (0, H200), 64: (4, H200), 256: (0, H200)}
        assert store.check() == [] and store.stats()["journal"] == "delete" and store.stats()["status"] == {"ok": 14}
    said = capsys.readouterr().out
    assert "4 problems, 14 timings" in said and "as mine is not built in" in said and "of other code" in said
    assert "NVIDIA H100" in said and said.count("left out: 1 problems") == 4


def test_pack_makes_equal_files_of_equal_caches(caches: list[Path], tmp_path: Path) -> None:
    for order, out in ((caches, "x"), (caches[::-1], "y")):
        assert prebuilt.main(["pack", "h200", *map(str, order), "--folder", str(tmp_path / out)]) == 0
    assert (tmp_path / "x" / "h200.sqlite").read_bytes() == (tmp_path / "y" / "h200.sqlite").read_bytes()


def test_pack_writes_nothing_where_nothing_is_left(
    caches: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prebuilt.main(["pack", "mi300x", *map(str, caches), "--folder", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists() and "nothing is left" in capsys.readouterr().err


def test_a_packed_file_answers_behind_the_users(caches: list[Path], tmp_path: Path) -> None:
    prebuilt.main(["pack", "h200", *map(str, caches), "--folder", str(tmp_path / "out")])
    active = serving(tmp_path / "user.sqlite", path=(tmp_path / "out" / "h200.sqlite",))
    choice = active.lookup.tiers.winners(H200).get(sorting(64).key)
    assert (choice[0].config, choice[1]) == (named(4), "measured")
    assert active.lookup.tiers.winners(OLDER).get(sorting(64).key)[1] == "unverified"


def test_how_two_gpus_exchange_is_packed_and_answers_a_new_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    folder, (ctx, _) = tmp_path / "out", contexts(2, 7168, 256, 8, 128)
    ctx.links = "nvlink18"
    asked = exchange.Exchange(ctx).question(KNOWN["h200"], 128)
    with Store.open(tmp_path / "ep.sqlite") as store:
        default, fastest = measured(asked, 19.0)
        store.put([default, fastest])
    assert prebuilt.main(["pack", "h200", str(tmp_path / "ep.sqlite"), "--folder", str(folder)]) == 0
    with Store.open(folder / "h200.sqlite", shipped=True) as store:
        assert verify(store) == Findings([], [])
    with Store.open(tmp_path / "ep.sqlite") as store:
        other = fastest.config.model_copy(update={"params": (*fastest.config.params, ("stored", 3))})
        store.put([timing(asked, other, 20.0, H200)])
        assert verify(store).wrong == [f"{asked.id} {other.name}: {other.name} is in no search space of ep_exchange"]
    monkeypatch.setattr("moecache.settings.PREBUILT", folder)
    monkeypatch.setattr(exchange, "problem", lambda ctx, capacity: asked)
    monkeypatch.setattr(ctx.team, "broadcast", lambda what, value: value)
    with moecache.using(db=tmp_path / "user.sqlite", mode="replay"):
        assert exchange.chosen(ctx, 128) == exchange.ways(fastest.config) != exchange.ways(default.config)
        for changes in ({"world": 4}, {"links": "nvlink12"}, {"wire": "fp8", "fp8": "e4m3fn"}):
            other = asked.model_copy(update={"dims": tuple((dict(asked.dims) | changes).items())})
            choice = moecache.dispatch.dispatcher().choose(exchange.Exchange(ctx), other)
            assert choice.source != str(folder / "h200.sqlite") and choice.tier == "predicted"
        shipped = moecache.dispatch.dispatcher().choose(exchange.Exchange(ctx), asked)
        assert (shipped.tier, shipped.source) == ("unverified", str(folder / "h200.sqlite"))
