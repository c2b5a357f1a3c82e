"""Warm-up inside an engine: layers that were seen are measured with their own weights, then nothing is any more."""

import logging
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from fake_engine import engine
from ranks import ranks
from warm_scenes import LAYERS, call, known

from moecache import warmup
from moecache.dispatch import dispatcher, policy, using
from moecache.integrations import kernel, layers, tables, vllm, warming
from moecache.kernels.contract import EXTREME
from moecache.kernels.fused_moe import op as fused
from moecache.kernels.shared_inputs import layer_key, lending
from moecache.ops import Quant
from moecache.schemas.errors import NotTuned
from moecache.schemas.problem import problem_from_key
from moecache.store import Store, locks


@pytest.fixture(autouse=True)
def _no_engine_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(warming, "_seen", None)
    LAYERS.clear()
    yield


def test_layers_are_measured_with_their_own_weights_and_then_nothing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "shared", lambda *args: pytest.fail("weights were made"))
    monkeypatch.setattr(warming, "EVERY", 0.0)
    cache = tmp_path / "x.sqlite"
    with caplog.at_level(logging.INFO, "engine"), using(db=cache, tune=True, tune_budget=60.0) as serving:
        warming.begin("engine", serving, lambda: None)
        first = [call(24, layer) for layer in (0, 1)]
        assert not known(serving) and serving.settings.mode == "replay"
        state = torch.get_rng_state()
        warming.warm("engine", lambda: None)
        assert torch.equal(torch.get_rng_state(), state)
        problems = [problem_from_key(key) for key in known(serving)]
        assert {each.tokens for each in problems} == {1, 2, 4, 8, 16, 32} and len(problems) > 6
        assert serving.settings.mode == "replay" and not warming.watching()
        for layer in (0, 1):
            torch.testing.assert_close(call(24, layer), first[layer])
        call(200)
        assert len(known(serving)) == len(problems)  # not measured, but noted
    text = caplog.text
    assert "measures 6 layers and sizes" in text and "moecache: 1 of" in text and " s to go" in text
    assert f"choices for {len(problems)} of {len(problems)} problems" in text
    with Store.open(cache) as store:
        assert [problem.tokens for problem, _ in store.wanted()] == [256]
    monkeypatch.undo()
    with using(db=cache):
        assert {(row.problem.tokens, row.tier) for row in warmup("wanted")} == {(256, "measured")}


def test_layers_lend_their_weights_by_turns() -> None:
    with using(db=":memory:", mode="replay") as serving:
        call(8, 0), call(8, 1)
        live = [LAYERS[layer, 4] for layer in (0, 1)]
        ids = torch.zeros(8, 2, dtype=torch.int32)
        args = fused.call_args(torch.zeros(8, 32), *live[0], torch.zeros(8, 2), ids)
        problem = fused.FUSED_MOE.problem(args, serving.places.first().device, "")
        with lending({layer_key(problem): [(*weights, None, None, None) for weights in live]}):
            for seed in (0, 1, 2, EXTREME):
                given = fused.FUSED_MOE.inputs(problem, ids, seed)
                assert given.w1 is live[seed % 2][0] and given.w2 is live[seed % 2][1]
                torch.testing.assert_close(given.topk_weights.sum(1), torch.ones(8))  # nothing is made extreme
        assert fused.FUSED_MOE.inputs(problem, ids, 0).w1 is not live[0][0]


def test_an_engines_own_kernel_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w1, w2 = torch.ones(8, 128, 32), torch.ones(8, 32, 64)
    with engine(tmp_path, monkeypatch) as module, using(db=":memory:", tune=True, tune_budget=60.0) as serving:
        warming.begin("engine", serving, lambda: None)
        op = vllm._op(module, module.try_get_optimal_moe_config)
        dims = tables.dims(8, 64, 30, 32, 2)
        live = torch.float32, lambda x, router, ids: ((x, w1, w2, router, ids), {"activation": "silu"})
        warming.saw(op.problem(dims, serving.places.first().device), w1, live)
        cloned = []
        monkeypatch.setattr("moecache.wrapping.wrapped.clone_tensor", lambda t: cloned.append(t.shape) or t.clone())
        warming.warm("engine", lambda: None)
        assert w1.shape not in cloned
        rows = {
            winner.problem.tokens: dict(winner.config.params)
            for winner, _, _ in serving.lookup.known(vllm.OP, serving.places.first()).values()
        }
        assert set(rows) == {1, 2, 4, 8, 16, 32}
        asked = kernel.Asked((8, 128, 32), (8, 32, 64), 2, None, 32, None, False)
        assert kernel.served(op, asked)["BLOCK_SIZE_M"]


def test_a_small_budget_measures_the_fewest_tokens(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "engine"), using(db=":memory:", tune=True, tune_budget=0.0) as serving:
        warming.begin("engine", serving, lambda: None)
        call(24)
        warming.warm("engine", lambda: None)
        assert not known(serving) and "choices for 0 of" in caplog.text
        assert call(24).isfinite().all()


def test_an_engine_that_is_not_as_it_is_known_is_not_watched() -> None:
    with using(db=":memory:", tune=True):
        said = warming.begin("engine", dispatcher(), lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        assert "warms nothing: ZeroDivisionError" in said and not warming.watching()


def test_without_tune_all_that_may_serve_is_run_and_nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: set[int] = set()
    with using(db=":memory:", kernels=True) as serving:
        said = warming.begin("engine", serving, lambda: None)
        call(24)
        real = fused.FusedMoe.bind
        monkeypatch.setattr(fused.FusedMoe, "bind", lambda *args: ran.add(len(args[2].topk_ids)) or real(*args))
        warming.warm("engine", lambda: None)
        assert "compiles before engine captures graphs" in said and not known(serving)
    assert ran == {1, 2, 4, 8, 16, 32} | {3, 7, 15, 31}


def test_after_it_no_call_ranks_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes milliseconds for each size and routing, in which a server stands still."""
    with using(db=":memory:", kernels=True) as serving:
        warming.begin("engine", serving, lambda: None)
        call(24)
        warming.warm("engine", lambda: None)
        monkeypatch.setattr(policy, "rank", lambda *args: pytest.fail("it ranked"))
        for tokens in (1, 2, 5, 16, 31, 32):
            assert call(tokens).isfinite().all()
        with pytest.raises(pytest.fail.Exception):
            call(33)


def test_a_strict_server_measures_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then its layers are the engine's, and that is decided once."""
    with using(db=":memory:", tune=True, strict=True, tune_budget=60.0) as serving:
        warming.begin("engine", serving, lambda: None)
        with pytest.raises(NotTuned):
            call(24)
        with monkeypatch.context() as within, pytest.raises(NotTuned):
            within.setattr(policy, "rank", lambda *args: pytest.fail("it ranked"))
            call(24)
        warming.warm("engine", lambda: None)
        assert call(24).isfinite().all()


def test_a_server_does_not_wait_for_who_keeps_its_file(tmp_path: Path) -> None:
    cache = tmp_path / "x.sqlite"
    with using(db=cache, kernels=True) as serving, closing(sqlite3.connect(cache, isolation_level=None)) as other:
        warming.begin("engine", serving, lambda: None)
        call(24)
        warming.warm("engine", lambda: None)
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        with pytest.warns(RuntimeWarning, match=r"held it for 0\.5 s"):
            assert call(200).isfinite().all() and call(1000).isfinite().all()
        assert time.monotonic() - began < locks.LONG_S / 2


def test_of_an_engines_own_kernel_nothing_is_compiled_where_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w1, w2 = torch.ones(8, 128, 32), torch.ones(8, 32, 64)
    with engine(tmp_path, monkeypatch) as module, using(db=":memory:", kernels=True) as serving:
        warming.begin("engine", serving, lambda: None)
        op = vllm._op(module, module.try_get_optimal_moe_config)
        live = torch.float32, lambda x, router, ids: ((x, w1, w2, router, ids), {})
        warming.saw(op.problem(tables.dims(8, 64, 30, 32, 2), serving.places.first().device), w1, live)
        for name in ("space", "inputs"):
            monkeypatch.setattr(kernel.EngineKernel, name, lambda *args: pytest.fail("it was asked for more"))
        warming.warm("engine", lambda: None)


@pytest.mark.parametrize("mode", ["replay", "tune"])
def test_only_who_may_measure_and_asks_for_it_measures_and_writes(mode: Any, tmp_path: Path) -> None:
    cache = tmp_path / "x.sqlite"
    with using(mode=mode, db=cache, tune=mode == "replay") as serving:
        warming.begin("engine", serving, lambda: None)
        call(24)
        warming.warm("engine", lambda: None, lambda: pytest.fail("it ran the model"))
        call(24)
        assert not known(serving) and serving.settings.mode == "replay"
    with Store.open(cache) as store:
        assert len(store.wanted()) == (mode == "tune")


def test_a_failure_of_ours_does_not_end_the_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with using(db=":memory:", tune=True) as serving:
        warming.begin("engine", serving, lambda: None)
        call(24)
        monkeypatch.setattr(warming, "warmup", lambda *args, **how: 1 / 0)
        warming.warm("engine", lambda: None)
        assert serving.settings.mode == "replay" and not warming.watching()
        assert "moecache goes on with what it knows: ZeroDivisionError" in caplog.text
        assert call(24).isfinite().all()


# --- ranks


def test_rank_0_measures_and_its_choices_count_on_all(tmp_path: Path) -> None:
    (first, count, *_), (second, none, *_) = found = ranks("warm_scenes:together", 2, FOLDER=str(tmp_path))
    assert count > none == 0 and first == second
    assert {problem_from_key(key).experts for key in first} == {4, 8}
    assert [each[2:] for each in found] == [["replay", True]] * 2
    with Store.open(tmp_path / "1.sqlite") as store:
        assert not store.timings()


@pytest.mark.parametrize("scene", ["failing", "one_away"])
def test_ranks_go_on_where_one_fails_or_does_not_come(scene: str, tmp_path: Path) -> None:
    assert [each[2:] for each in ranks(f"warm_scenes:{scene}", 2, FOLDER=str(tmp_path))] == [["replay", True]] * 2


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("quantised", [False, True])
def test_after_it_nothing_compiles_or_waits_and_graphs_capture(
    quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at numbers of tokens that no warm-up has run."""
    from triton import knobs

    torch.manual_seed(0)
    made, quant = (
        [torch.randn(size, device="cuda").bfloat16() / 32 for size in ((64, 1024, 1024), (64, 1024, 512))],
        None,
    )
    if quantised:
        made = [(32 * each).clamp(-8, 8).to(torch.float8_e4m3fn) for each in made]
        scales = (torch.rand(64, 8, columns, device="cuda") / 32 for columns in (8, 4))
        quant = Quant("fp8_block", *scales)
    how: Any = {"activation": "silu", "gated": True, "w1_bias": None, "w2_bias": None, "quant": quant}

    def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
        rng = torch.Generator("cuda").manual_seed(tokens)
        x = torch.randn(tokens, 1024, device="cuda", generator=rng).bfloat16()
        ids = torch.rand(tokens, 64, device="cuda", generator=rng).topk(8).indices.int()
        return x, torch.rand(tokens, 8, device="cuda", generator=rng), ids

    def run(x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return layers.fused(x, *made, router, ids, on_input=False, layer="a", out=out, **how)

    with using(db=":memory:", tune=True, tune_budget=60.0, tune_gib=1.0) as serving:
        warming.begin("engine", serving, lambda: None)
        first = run(*inputs(512))
        torch.cuda.synchronize()
        held, state = torch.cuda.memory_reserved(), torch.cuda.get_rng_state()
        warming.warm("engine", lambda: None)
        assert torch.cuda.memory_reserved() <= held + (64 << 20)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert {problem_from_key(key).tokens for key in known(serving)} == {1 << k for k in range(10)}
        assert relative(run(*inputs(512)), first) < 0.05
        compiled: list[Any] = []
        monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **told: compiled.append(told))
        out, call = torch.empty(200, 1024, dtype=torch.bfloat16, device="cuda"), inputs(200)
        unseen = [inputs(tokens) for tokens in (1, 7, 37, 100, 300, 511)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for each in unseen:
                assert run(*each).shape == each[0].shape
        finally:
            torch.cuda.set_sync_debug_mode("default")
        want, graph = run(*call), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(*call, out=out)
        graph.replay()
        assert relative(out, want) < 0.05 and not compiled


@pytest.mark.gpu
def test_what_it_may_take_is_bounded_and_given_back() -> None:
    with using(db=":memory:") as serving:
        place = serving.places.first()
        torch.cuda.empty_cache()
        held, state = torch.cuda.memory_reserved(), torch.cuda.get_rng_state()
        with warming._bounded(place, 0.5):
            kept = [torch.rand(1 << 26, device="cuda")]  # a quarter of a GiB
            with pytest.raises(torch.OutOfMemoryError):
                kept.append(torch.empty(1 << 30, device="cuda"))
            kept.clear()
        assert torch.cuda.memory_reserved() == held and torch.equal(torch.cuda.get_rng_state(), state)
        assert torch.empty(1 << 28, device="cuda").numel()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).float().norm() / want.float().norm())
