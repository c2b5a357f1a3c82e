"""SGLang itself: its loader finds the plugin, and its functions answer with our configs."""

import pkgutil
from collections.abc import Iterator
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.plugins as plugins
import torch
from engine_cases import DTYPES, MADE_UP, SHAPES, apart, dims, drawn, fp8, logged, shape, store, timing, wide
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig, triton_utils
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe, fused_moe_triton_config
from sglang.srt.model_executor.runner.base_runner import BaseRunner
from sglang.srt.plugins.hook_registry import HookRegistry

from moecache.dispatch import dispatcher, using
from moecache.integrations import kernel, layers, tables
from moecache.integrations import sglang as ours
from moecache.integrations import sglang_tables as its
from moecache.integrations.tables import GRID
from moecache.kernels import registry
from moecache.schemas.device import KNOWN
from moecache.schemas.timing import Environment
from moecache.store import Store


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU's name, and what a server's arguments would say."""
    monkeypatch.setattr(fused_moe_triton_config, "get_device_name", lambda: "NVIDIA H200")
    said = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))
    monkeypatch.setattr("sglang.srt.runtime_context.get_exec", lambda: said)
    monkeypatch.setattr(fused_moe_triton_config, "get_exec", lambda: said)
    for cached in (fused_moe_triton_config.get_moe_configs, ours._chooser, ours._layers):
        cached.cache_clear()
    yield
    HookRegistry.reset()


def unregister() -> None:
    """Leave SGLang as it was."""
    for target, hook in ((ours._TARGET, ours._chosen), (ours._LAYER, ours._either), (ours._WARMUP, ours._warmed)):
        if any(each[1] is hook for each in HookRegistry._hooks.pop(target, ())):
            HookRegistry._patched.discard(target)
            hooked = pkgutil.resolve_name(target)
            kernel.rebound(hooked, hooked.__wrapped__)
            owner, _, name = target.rpartition(".")
            setattr(pkgutil.resolve_name(owner), name, hooked.__wrapped__)


# --- files


@pytest.mark.parametrize(("dtype", "block"), DTYPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_names(dtype: str, block: int, per_channel: bool) -> None:
    problem = tables.problem(ours.OP, KNOWN["h200"], dims(1, dtype, block, per_channel=per_channel))
    theirs = fused_moe_triton_config.get_config_file_name(128, 768, dtype or None, shape(block), per_channel)
    assert its.path(Path("x"), problem, Environment(device_name="NVIDIA H200", triton="3.6.0")).name == theirs


@pytest.mark.parametrize(("dtype", "block"), DTYPES)
def test_it_reads_what_is_exported(tmp_path: Path, dtype: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path))
    ((path, rows),) = tables.grouped([timing(ours.OP, 16, dtype, block)], partial(its.path, tmp_path)).items()
    table = tables.table(rows, its.default)
    its.beside(tmp_path)
    tables.write(path, table, **its.head("3.6.0"))
    configs = fused_moe_triton_config.get_moe_configs
    read = configs(128, 768, dtype or None, block, block)
    assert read == table and tuple(read) == GRID and read[16] == MADE_UP
    assert configs(128, 192, None, 0, 0)  # its own tables are there as well
    for tokens in (1, 16, 20, 100, 5000):
        found = fused_moe_triton_config.try_get_optimal_moe_config(
            *SHAPES, 8, dtype or None, tokens, block_shape=shape(block), return_down_config=True
        )
        assert found[0] == table[min(GRID, key=lambda size: abs(size - tokens))]


def test_its_defaults_are_known_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [fused_moe_triton_config.get_default_config(m, 8, 64, 32, 2, None, False) for m in (4, 64)]
    problem = tables.problem(ours.OP, KNOWN["h200"], tables.dims(8, 64, 4, 32, 2))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not published"):
        fused_moe_triton_config.get_default_config(4, 8, 64, 32, 2, None, False)
    assert [its.default(m, problem) for m in (4, 64)] == there


def test_its_own_tables_are_taken_as_seeds() -> None:
    seeds, others = its.seeds(None)
    assert len(seeds) > 1000 and others > 0
    assert {"3.6.0", "3.4.0"} <= {seed.environment.triton for seed in seeds}
    with Store.memory() as store:
        store.put(seeds)
        assert len(store.timings()) == len(seeds) and store.winners() == [] and store.check() == []


# --- the plugin


def loaded() -> None:
    plugins._plugins_loaded = False
    plugins.load_plugins()


def test_its_loader_finds_the_plugin(caplog: pytest.LogCaptureFixture) -> None:
    assert [each.value for each in entry_points(group="sglang.srt.plugins")] == [
        "moecache.integrations.sglang:register"
    ]
    before = fused_moe_triton_config.try_get_optimal_moe_config
    sites = (fused_moe_triton_config, fused_moe, triton_utils)
    logged("sglang", caplog)
    with using():
        loaded()
        hooked = fused_moe_triton_config.try_get_optimal_moe_config
        assert hooked is not before and all(site.try_get_optimal_moe_config is hooked for site in sites)
        loaded()
        assert fused_moe_triton_config.try_get_optimal_moe_config is hooked
        assert caplog.text.count("moecache serves configs") == 1
        unregister()
    assert all(site.try_get_optimal_moe_config is before for site in sites)
    assert not HookRegistry._hooks.get(ours._TARGET)


@pytest.mark.parametrize(("dtype", "block"), DTYPES)
def test_its_function_answers_with_our_config(dtype: str, block: int) -> None:
    asked: Any = (*SHAPES, 8, dtype or None, 16)
    theirs = fused_moe_triton_config.try_get_optimal_moe_config(*asked, block_shape=shape(block))
    with using() as serving:
        loaded()
        answer = fused_moe.try_get_optimal_moe_config
        assert answer(*asked, block_shape=shape(block)) == theirs
        store(serving, registry.get(ours.OP), 16, dtype, block)
        assert answer(*asked, block_shape=shape(block)) == MADE_UP != theirs
        assert answer(*asked, False, shape(block)) == MADE_UP  # by place
        wide = answer(*asked, block_shape=shape(block), per_channel_quant=False, return_down_config=True)
        assert wide == (MADE_UP, (None, None))
        assert answer(*asked, block_shape=shape(block), per_channel_quant=True) != MADE_UP
        with triton_utils.override_config({"BLOCK_SIZE_M": 1}):
            assert answer(*asked, block_shape=shape(block)) == {"BLOCK_SIZE_M": 1}
        unregister()
    assert fused_moe_triton_config.try_get_optimal_moe_config(*asked, block_shape=shape(block)) == theirs


def test_its_kernel_is_an_op() -> None:
    with using():
        op: Any = ours.wrap().op
        problem = op.problem(dims(16), KNOWN["h200"])
        theirs = fused_moe_triton_config.try_get_optimal_moe_config(*SHAPES, 8, None, 16)
        assert dict(op.space(problem, KNOWN["h200"])[0].params) == theirs


# --- our kernels


def layer(tokens: int = 24, **config: Any) -> dict[str, Any]:
    """The arguments that the Triton back end gives its function of a whole layer."""
    return {
        "hidden_states": torch.randn(tokens, 32), "w1": torch.randn(4, 96, 32), "w2": torch.randn(4, 32, 48),
        "topk_output": (torch.rand(tokens, 2), drawn(tokens), torch.rand(tokens, 4)),
        "moe_runner_config": MoeRunnerConfig(**config), "b1": None, "b2": None, "use_fp8_w8a8": False, "w1_scale": None,
        "block_shape": None,
    }  # fmt: skip


def by_loop(hidden_states: Any, w1: Any, w2: Any, topk_output: Any, *args: Any, **named: Any) -> torch.Tensor:
    """The same layer in torch."""
    (weights, ids, _), out = topk_output, torch.zeros_like(hidden_states)
    for t, x in enumerate(hidden_states):
        for weight, e in zip(weights[t], ids[t], strict=True):
            gate, up = (w1[e] @ x).chunk(2)
            out[t] += weight * (w2[e] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("factor", [None, 2.5])
def test_a_layer_runs_on_our_kernels(factor: float | None) -> None:
    before = fused_moe.fused_experts
    with using(kernels=True):
        loaded()
        call = layer(routed_scaling_factor=factor)
        out = fused_moe.fused_experts(**call)
        unregister()
    torch.testing.assert_close(out, (factor or 1) * by_loop(**call), rtol=1e-4, atol=1e-3)
    assert fused_moe.fused_experts is before


def test_a_layer_of_fp8_with_blocks_of_scales_does_too() -> None:
    """Against the same layer of the weights that the scales give."""
    (w1, w2, s1, s2), topk = fp8(), (torch.rand(24, 2), drawn(24), None)
    call = layer() | {"hidden_states": torch.randn(24, 256).bfloat16(), "topk_output": topk, "w1": w1, "w2": w2}
    scaled = {"use_fp8_w8a8": True, "w1_scale": s1, "w2_scale": s2, "block_shape": [128, 128]}
    out = ours._layer(**call | scaled)
    assert apart(out, ours._layer(**call | {"w1": wide(w1, s1), "w2": wide(w2, s2)})) < 0.06
    assert "block_shape" in ours._layer(**call | scaled | {"block_shape": [64, 128]})
    assert "a1_scale" in ours._layer(**call | scaled | {"a1_scale": torch.ones(1)})


def test_what_we_cannot_run_is_theirs(caplog: pytest.LogCaptureFixture) -> None:
    theirs: list[Any] = []
    logged("sglang", caplog)
    run = layers.either("sglang", lambda **call: theirs.append(call), ours._layer)
    cases = [
        layer(swiglu_limit=7.0), layer(no_combine=True), layer() | {"use_fp8_w8a8": True},
        layer() | {"w2": torch.randn(4, 7, 48)},
        layer(apply_router_weight_on_input=True, routed_scaling_factor=2.5),
        layer(apply_router_weight_on_input=True) | {"b1": torch.randn(4, 96)},
    ]  # fmt: skip
    for call in [*cases, *cases]:
        assert run(**call) is None
    assert len(theirs) == 12
    told = [record.getMessage() for record in caplog.records]
    assert [each.split(": ")[1].split(",")[0] for each in told] == [
        "activation silu", "activation silu", "w1 of torch.float32 for torch.float32", "InvalidInput",
        "routed_scaling_factor=2.5 with apply_router_weight_on_input", "InvalidInput",
    ]  # fmt: skip


@pytest.mark.parametrize("kernels", [True, False])
def test_its_warm_up_measures_what_a_dry_run_shows(
    kernels: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the place of a model stands one layer, in that of SGLang's kernel a loop."""
    logged("sglang", caplog)
    for module in (fused_moe, triton_utils):
        monkeypatch.setattr(module, "fused_experts", by_loop)
    monkeypatch.setattr("sglang.srt.runtime_context.max_prefill_buffer_tokens", lambda: 8)
    ran: list[Any] = []
    theirs = BaseRunner._warmup

    def run(batch_size: int, buffers: str) -> None:
        ran.append((batch_size, buffers, dispatcher().settings.mode))
        fused_moe.fused_experts(**layer(batch_size))

    runner: Any = SimpleNamespace(model_runner=SimpleNamespace(device="cpu"), _dummy_run=run)
    runner._autotune_buffers = lambda: ("buffers", 4)
    with using(kernels=kernels, tune=True, tune_budget=20.0) as serving:
        loaded()
        for _ in range(2):
            BaseRunner._warmup(runner)
        rows = serving.lookup.known("fused_moe" if kernels else ours.OP, serving.places.first()).values()
        assert {winner.problem.tokens for winner, _, _ in rows} == {1, 2, 4, 8}
        call = layer(6)
        torch.testing.assert_close(fused_moe.fused_experts(**call), by_loop(**call), rtol=1e-4, atol=1e-3)
        unregister()
    assert ran == [(4, "buffers", "replay")] and BaseRunner._warmup is theirs
    assert caplog.text.count("has measured choices for") == 1 and "goes on with what it knows" not in caplog.text
