"""The plugin in an engine: it serves what was measured, else nothing changes; and the engine's kernel as an op."""

import logging
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from fake_engine import MODULE, engine

from moecache import feedback, routing
from moecache.dispatch import using
from moecache.integrations import aiter, kernel, layers, sglang, tables, vllm
from moecache.kernels import registry
from moecache.ops import moe_align_block_size
from moecache.schemas.config import Config
from moecache.schemas.device import KNOWN
from moecache.schemas.errors import InvalidInput
from moecache.schemas.timing import Timing

ROOT = Path(__file__).parent.parent
W1, W2 = (8, 128, 32), (8, 32, 64)
THEIRS = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "SPLIT_K": 1}
OURS = {**THEIRS, "BLOCK_SIZE_M": 32, "num_warps": 4, "num_stages": 3}


@pytest.fixture
def vllm_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(kernel, "_said", set())
    vllm._fixed.cache_clear()
    with engine(tmp_path, monkeypatch) as module:
        yield module


def measured(serving: Any, routing: str = "a0e0", us: float = 5.0, tokens: int = 16, **changes: int) -> Timing:
    """A timing on this machine's CPU, stored."""
    place = serving.places.first()
    op: Any = registry.get(vllm.OP)
    problem = op.problem(tables.dims(8, 64, tokens, 32, 2) | {"routing": routing}, place.device)
    config = Config(variant=tables.VARIANT, params=tuple({**OURS, **changes}.items()))
    row = Timing(problem=problem, config=config, environment=place.environment, median_us=us, mad_us=0.01, n=20)
    serving.lookup.put([row], place)
    return row


def test_entry_points_name_functions_that_exist() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {
        "vllm.general_plugins": {"moecache": "moecache.integrations.vllm:register"},
        "sglang.srt.plugins": {"moecache": "moecache.integrations.sglang:register"},
    }


def test_what_is_measured_is_served_and_all_else_is_theirs(vllm_module: Any) -> None:
    original = vllm_module.try_get_optimal_moe_config
    with using(db=":memory:") as serving:
        vllm.register()
        vllm.register()  # a second time changes nothing
        hooked = vllm_module.try_get_optimal_moe_config
        assert hooked.__wrapped__ is original and sys.modules["vllm.user"].chooses is hooked
        assert hooked(W1, W2, 2, None, 16) == THEIRS
        measured(serving)
        serving.hot.clear()
        for asked in ((W1, W2, 2, None, 16), (W1, W2, 2, None, 9, None), (torch.Size(W1), torch.Size(W2), 2, None, 16)):
            row = hooked(*asked)
            assert row == OURS
            row["BLOCK_SIZE_M"] = 0  # a caller's own
            assert hooked(*asked) == OURS
        other: Any
        for other in ((W1, W2, 2, None, 17), (W1, W2, 1, None, 16), ((8, 128, 48), (8, 48, 64), 2, None, 16)):
            assert hooked(*other) == THEIRS
        assert hooked(W1, W2, 2, "fp8_w8a8", 16, [128, 128]) == THEIRS
        assert hooked(W1, W2, 2, "fp8_w8a8", 16, block_shape=[128, 128]) == THEIRS
    vllm.unregister()
    assert vllm_module.try_get_optimal_moe_config is original and sys.modules["vllm.user"].chooses is original


def test_where_nothing_is_measured_no_candidates_are_ranked(vllm_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine has its own answer, and 1920 candidates take tens of milliseconds."""
    with using(db=":memory:"):
        vllm.register()
        monkeypatch.setattr(kernel.EngineKernel, "space", lambda *args: pytest.fail("it made candidates"))
        assert [vllm_module.try_get_optimal_moe_config(W1, W2, 2, None, size) for size in (1, 16)] == [THEIRS, THEIRS]


def test_one_config_serves_all_routings_that_were_measured(vllm_module: Any) -> None:
    with using(db=":memory:") as serving:
        vllm.register()
        for routing, best, other in (("a0e0", 10.0, 10.4), ("a2e3", 30.0, 20.0)):
            measured(serving, routing, best)
            measured(serving, routing, other, BLOCK_SIZE_M=64)
        assert vllm_module.try_get_optimal_moe_config(W1, W2, 2, None, 16)["BLOCK_SIZE_M"] == 64


def test_the_routing_that_our_sort_posted_decides(vllm_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    even, hot = torch.arange(32).reshape(16, 2).int() % 8, torch.tensor([[0, 1]] * 16).int()
    monkeypatch.setattr(feedback, "_slabs", {})  # slots of another memory: later ones must not begin with these buckets
    monkeypatch.setattr(feedback, "slots", {})
    with using(db=":memory:", mode="replay") as serving:
        vllm.register()
        for ids, height in ((even, 32), (hot, 64)):
            bucket = routing.bucket(routing.histogram(ids, 8))
            measured(serving, bucket, 10.0, BLOCK_SIZE_M=height)
            measured(serving, bucket, 10.4, BLOCK_SIZE_M=128)
        chooses = vllm_module.try_get_optimal_moe_config
        assert chooses(W1, W2, 2, None, 16)["BLOCK_SIZE_M"] == 128
        for ids, height in ((even, 32), (hot, 64), (even, 32)):
            moe_align_block_size(ids, 16, 8)
            assert chooses(W1, W2, 2, None, 16)["BLOCK_SIZE_M"] == height
        moe_align_block_size(torch.tensor([[0, 1]] * 10 + [[2, 3]] * 6).int(), 16, 8)  # a bucket that nobody measured
        assert chooses(W1, W2, 2, None, 16)["BLOCK_SIZE_M"] == 128


def test_what_the_engine_forces_goes_first(vllm_module: Any) -> None:
    with using(db=":memory:") as serving:
        vllm.register()
        measured(serving)
        forced = {**THEIRS, "BLOCK_SIZE_N": 128}
        with sys.modules["vllm.model_executor.layers.fused_moe"].override_config(forced):
            assert vllm_module.try_get_optimal_moe_config(W1, W2, 2, None, 16) == forced
        vllm._fixed.cache_clear()
        sys.modules["vllm.envs"].VLLM_BATCH_INVARIANT = True  # type: ignore[attr-defined]
        assert vllm_module.try_get_optimal_moe_config(W1, W2, 2, None, 16) == THEIRS


def test_mode_off_installs_nothing(vllm_module: Any) -> None:
    original = vllm_module.try_get_optimal_moe_config
    with using(mode="off", db=":memory:"):
        vllm.register()
    assert vllm_module.try_get_optimal_moe_config is original
    with using(db=":memory:") as serving:
        vllm.register()
        measured(serving)
        with using(mode="off"):
            assert vllm_module.try_get_optimal_moe_config(W1, W2, 2, None, 16) == THEIRS


def test_it_says_once_what_it_did(vllm_module: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vllm"), using(db=":memory:"):
        vllm.register()
        vllm.register()
    assert [record.name for record in caplog.records] == ["vllm.moecache"]
    assert "moecache serves configs to the Triton kernel of vLLM" in caplog.text and "MOECACHE_MODE=off" in caplog.text


@pytest.mark.parametrize("module", [MODULE.replace("top_k,", "topk,"), "x = 1", ""])
def test_an_engine_that_it_does_not_know_starts(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fake_engine.USER", "")
    if not module:
        monkeypatch.setattr(vllm, "MODULE", "vllm.moved")
    with engine(tmp_path, monkeypatch, module=module), using(db=":memory:"):
        vllm.register()
    assert "moecache does nothing here" in caplog.text


def test_a_parameter_before_the_block_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vLLM of 2025, and in SGLang."""
    with engine(tmp_path, monkeypatch, extra="is_marlin=False, ") as module, using(db=":memory:") as serving:
        vllm.register()
        measured(serving)
        assert module.try_get_optimal_moe_config(W1, W2, 2, None, 16, False, None) == OURS
        assert module.try_get_optimal_moe_config(W1, W2, 2, None, 16, False, [128, 128]) == THEIRS


def test_an_error_while_choosing_leaves_the_engine_alone(
    vllm_module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with using(db=":memory:"):
        vllm.register()
        monkeypatch.setattr(kernel, "served", lambda *asked: 1 / 0)
        for _ in range(3):
            assert vllm_module.try_get_optimal_moe_config(W1, W2, 2, None, 16) == THEIRS
    assert caplog.text.count("moecache cannot choose, so the engine does: ZeroDivisionError") == 1


# --- the kernel as an op


def test_the_space_begins_with_what_the_engine_would_take(vllm_module: Any) -> None:
    op = vllm._op(vllm_module, vllm_module.try_get_optimal_moe_config)
    problem = tables.problem(vllm.OP, KNOWN["h200"], tables.dims(8, 64, 16, 32, 2))
    space = op.space(problem, KNOWN["h200"])
    assert dict(space[0].params) == THEIRS and len(space) == len(set(space)) > 1000
    assert {config["SPLIT_K"] for config in space} == {1}
    assert not [config for config in space if op.fits(problem, config, KNOWN["h200"])]
    changed = [
        sum(config[name] != THEIRS.get(name, {"num_warps": 4}.get(name, 3)) for name in kernel.GRID)
        for config in space[1:5]
    ]
    assert max(changed) == 1
    fp8 = problem.model_copy(update={"dtype": "fp8_w8a8", "dims": (*problem.dims, ("block_n", 128), ("block_k", 128))})
    assert "bytes of tiles" in op.fits(problem, _tile(256, 256, 256, 5), KNOWN["h200"])
    assert op.fits(fp8, _tile(16, 64, 128, 4), KNOWN["mi300x"]) == ""
    assert "is no config" in op.fits(problem, Config(variant="tile"), KNOWN["h200"])


def _tile(m: int, n: int, k: int, stages: int) -> Config:
    row = {**OURS, "BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "num_stages": stages}
    return Config(variant=tables.VARIANT, params=tuple(row.items()))


def test_wrapped_it_measures_and_then_serves(vllm_module: Any) -> None:
    fast = vllm.wrap()
    assert fast.__name__ == "fused_experts" and fast.__doc__ == "Runs a layer."
    x, w1, w2 = torch.ones(64, 32), torch.ones(W1), torch.ones(W2)
    call: Any = (x, w1, w2, torch.ones(64, 2), torch.zeros(64, 2, dtype=torch.int32))
    seed = _tile(64, 128, 64, 4)
    with using(db=":memory:", budget=20.0) as serving:
        place = serving.places.first()
        problem = fast.problem(*call)
        serving.lookup.tiers.put(
            [tables.seed(tables.told(problem), seed, place.environment.model_copy(update={"flags": "from=x"}))]
        )
        assert torch.equal(fast(*call), x + 1)
        tried = [timing.config for timing, _ in serving.lookup.timings(problem)]
        choice = fast.explain(*call).choice
        assert choice.tier == "measured" and seed in tried and len(tried) > 2
        vllm_module.used.clear()
        fast(*call)
        assert vllm_module.used == [dict(choice.config.params)]
        with pytest.raises(RuntimeError, match="for example"):
            fast(*call, activation="raise")
        assert sys.modules["vllm.model_executor.layers.fused_moe"].get_config() is None  # nothing stays forced
        vllm.register()  # and serves what was measured, also to calls that do not go through `fast`
        assert vllm_module.try_get_optimal_moe_config(w1.shape, w2.shape, 2, "float32", 64) == dict(
            choice.config.params
        )


AITER = """
used = []
def fused_moe(hidden_states, w1, w2, topk_weight, topk_ids, expert_mask=None, activation=0, quant_type="No",
              doweight_stage1=False, block_size_M=None, moe_sorting_dispatch_policy=0):
    used.append((block_size_M, moe_sorting_dispatch_policy))
    return hidden_states * 2
"""


def test_aiters_layer_is_an_op_whose_default_is_its_own_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_wrapped", {})
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text("")
    (tmp_path / "aiter" / "fused_moe.py").write_text(AITER)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        fast = aiter.wrap()
        x, w1, w2 = torch.ones(16, 32), torch.ones(W1), torch.ones(W2)
        call: Any = (x, w1, w2, torch.ones(16, 2), torch.zeros(16, 2, dtype=torch.int32))
        with using(db=":memory:", mode="replay"):
            assert torch.equal(fast(*call, quant_type="per_Token"), x * 2)
        assert sys.modules["aiter.fused_moe"].used == [(None, 0)]
        problem = fast.problem(*call, activation="ActivationType.Silu")
        assert (problem.tokens, problem.experts, problem.topk) == (16, 8, 2)
        assert dict(problem.dims)["activation"] == "ActivationType.Silu" and problem.dim("intermediate") == 64
        with using(db=":memory:", budget=20.0):
            fast(*call)
        tried = set(sys.modules["aiter.fused_moe"].used)
        assert {(32, 0), (64, 1), (None, 2)} <= tried and len(tried) == len(aiter.CHOICES)
    finally:
        for name in ("aiter", "aiter.fused_moe"):
            sys.modules.pop(name, None)


def test_weights_on_the_input_are_ours_only_where_engines_mean_the_same() -> None:
    x, router, ids = torch.randn(3, 32), torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int32)
    w1, w2, bias = torch.randn(4, 96, 32), torch.randn(4, 32, 48), torch.randn(4, 96)
    with pytest.raises(InvalidInput, match="on_input with w1_bias"):
        layers.fused(x, w1, w2, router, ids, on_input=True, w1_bias=bias, layer=0)
    config = SimpleNamespace(
        activation="silu", no_combine=False, routed_scaling_factor=2.5, apply_router_weight_on_input=True
    )
    assert "routed_scaling_factor=2.5" in sglang._layer(x, w1, w2, (router, ids, None), config)


@pytest.mark.parametrize("strict", [False, True])
def test_a_refused_size_does_not_leave_a_quantised_layer_to_vllm(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict refuses what is not measured yet; all other reasons hold for the layer."""
    quantise = SimpleNamespace(moe_kernel_quantize_input=lambda x, *how: (x.to(torch.float8_e4m3fn), how))
    monkeypatch.setitem(sys.modules, f"{vllm._PACKAGE}.utils", quantise)
    experts = SimpleNamespace(
        _moecache=True, a1_scale=None, quant_dtype="fp8", per_act_token_quant=False, block_shape=[128, 128]
    )
    apply = vllm._quantised(lambda self, **named: named)
    given = {name: None for name in vllm._APPLY[1:]}
    given |= {"hidden_states": torch.ones(3, 128), "w1": torch.ones(1).to(torch.float8_e4m3fn)}
    with using(db=":memory:", strict=strict):
        got = apply(experts, **given)
    assert got["hidden_states"].dtype is torch.float8_e4m3fn and got["a1q_scale"] == (None, "fp8", False, [128, 128])
    assert experts._moecache is strict and vllm._unquantised(None, experts) is strict
