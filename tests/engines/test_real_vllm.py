"""vLLM itself: its loader finds the plugin, its functions answer with our configs, and it is left as it was."""

import inspect
import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.envs as envs
import vllm.plugins
from engine_cases import DTYPES, MADE_UP, SHAPES, apart, dims, drawn, fp8, logged, shape, store, timing, wide
from vllm.model_executor.layers import fused_moe as package
from vllm.model_executor.layers.fused_moe import fused_moe, modular_kernel
from vllm.model_executor.layers.fused_moe import utils as fused_moe_utils
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, fp8_w8a8_moe_quant_config
from vllm.model_executor.layers.fused_moe.experts import fused_batched_moe, triton_moe
from vllm.model_executor.layers.fused_moe.prepare_finalize import no_dp_ep
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
from vllm.model_executor.warmup import kernel_warmup
from vllm.platforms import current_platform
from vllm.v1.worker import workspace

from moecache.dispatch import dispatcher, using
from moecache.integrations import layers, tables
from moecache.integrations import vllm as ours
from moecache.integrations import vllm_tables as its
from moecache.integrations.tables import GRID
from moecache.kernels import registry
from moecache.ops import fused_moe as ours_moe
from moecache.schemas.config import Config
from moecache.schemas.device import KNOWN
from moecache.schemas.timing import Environment
from moecache.store import Store


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "NVIDIA H200")
    fused_moe.get_moe_configs.cache_clear()


def named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As if this were the GPU."""
    monkeypatch.setattr(type(current_platform), "get_device_name", classmethod(lambda cls, device_id=0: name))
    if cached := getattr(fused_moe, "get_device_name_as_file_name", None):
        cached.cache_clear()


# --- files


@pytest.mark.parametrize(("dtype", "block"), DTYPES)
@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3", "AMD Instinct MI300X"])
def test_names(name: str, dtype: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, name)
    problem = tables.problem(ours.OP, KNOWN["h200"], dims(1, dtype, block))
    assert its.path(Path("x"), problem, Environment(device_name=name)).name == fused_moe.get_config_file_name(
        128, 768, dtype or None, shape(block)
    )


@pytest.mark.parametrize(("dtype", "block"), DTYPES)
def test_it_reads_what_is_exported(tmp_path: Path, dtype: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    ((path, rows),) = tables.grouped([timing(ours.OP, 16, dtype, block)], partial(its.path, tmp_path)).items()
    table = tables.table(rows, its.default)
    tables.write(path, table, **its.head("3.6.0"))
    read = fused_moe.get_moe_configs(128, 768, dtype or None, block, block)
    assert read == table and tuple(read) == GRID and read[16] == MADE_UP
    for tokens in (1, 16, 20, 100, 5000):
        nearest = min(GRID, key=lambda size: abs(size - tokens))
        found = fused_moe.try_get_optimal_moe_config(*SHAPES, 8, dtype or None, tokens, block_shape=shape(block))
        theirs = fused_moe.get_default_config(nearest, 128, 768, 2048, 8, dtype or None, shape(block))
        assert found == (MADE_UP if nearest == 16 else theirs)


def test_its_own_tables_are_taken_as_seeds() -> None:
    seeds, others = its.seeds(None)
    folder = tables.package_folder("vllm") / "model_executor/layers/fused_moe/configs"
    assert len(seeds) > 1000 and 0 < others < len(seeds)
    shipped = folder / "E=128,N=192,device_name=NVIDIA_H200.json"
    rows = {int(size): row for size, row in json.loads(shipped.read_text()).items() if size != "triton_version"}
    asked = {tables.problem(ours.OP, KNOWN["h200"], tables.dims(128, 192, size)).key for size in rows}
    of_file = {s.config.name for s in seeds if s.problem.key in asked and s.environment.device_name == "NVIDIA H200"}
    assert of_file == {Config(variant=tables.VARIANT, params=tuple(row.items())).name for row in rows.values()}
    with Store.memory() as store:
        store.put(seeds)
        assert len(store.timings()) == len(seeds) and store.winners() == [] and store.check() == []


# --- the plugin


def test_its_loader_finds_the_plugin_and_unregister_leaves_it_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    assert [each.value for each in entry_points(group="vllm.general_plugins", name="moecache")] == [
        "moecache.integrations.vllm:register"
    ]
    before = fused_moe.try_get_optimal_moe_config
    sites = (fused_moe, triton_moe, fused_batched_moe)
    logged("vllm", caplog)
    try:
        with using():
            vllm.plugins.plugins_loaded = False
            vllm.plugins.load_general_plugins()
            hooked = fused_moe.try_get_optimal_moe_config
            assert hooked is not before and all(site.try_get_optimal_moe_config is hooked for site in sites)
            vllm.plugins.plugins_loaded = False
            vllm.plugins.load_general_plugins()
            assert fused_moe.try_get_optimal_moe_config is hooked
            assert caplog.text.count("moecache serves configs") == 1
    finally:
        ours.unregister()
    assert all(site.try_get_optimal_moe_config is before for site in sites)


@pytest.mark.parametrize(("dtype", "block"), DTYPES)
def test_its_function_answers_with_our_config(dtype: str, block: int) -> None:
    asked: Any = (*SHAPES, 8, dtype or None, 16)
    theirs = fused_moe.try_get_optimal_moe_config(*asked, block_shape=shape(block))
    try:
        with using() as serving:
            ours.register()
            answer = triton_moe.try_get_optimal_moe_config
            assert answer(*asked, block_shape=shape(block)) == theirs
            store(serving, registry.get(ours.OP), 16, dtype, block)
            assert answer(*asked, block_shape=shape(block)) == MADE_UP != theirs
            assert answer(*SHAPES, 8, dtype or None, 64, block_shape=shape(block)) != MADE_UP
            with package.override_config({"BLOCK_SIZE_M": 1}):
                assert answer(*asked, block_shape=shape(block)) == {"BLOCK_SIZE_M": 1}
    finally:
        ours.unregister()
    assert fused_moe.try_get_optimal_moe_config(*asked, block_shape=shape(block)) == theirs


def test_batch_invariance_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours._fixed.cache_clear()
    assert not ours._fixed()
    ours._fixed.cache_clear()
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True)
    assert ours._fixed()
    ours._fixed.cache_clear()


def test_its_kernel_is_an_op() -> None:
    with using() as serving:
        op: Any = ours.wrap().op
        problem = op.problem(dims(16), KNOWN["h200"])
        theirs = fused_moe.try_get_optimal_moe_config(*SHAPES, 8, None, 16)
        assert dict(op.space(problem, KNOWN["h200"])[0].params) == theirs
        assert serving.peek(op, problem).config == op.space(problem, KNOWN["h200"])[0]


# --- our kernels


def layer(activation: str = "silu", dtype: torch.dtype = torch.float32, tokens: int = 24) -> tuple[Any, dict[str, Any]]:
    """Experts without a GPU to make them for, and the arguments that the modular kernel gives them."""
    experts = object.__new__(triton_moe.TritonExperts)
    experts.quant_config = FUSED_MOE_UNQUANTIZED_CONFIG
    experts.activation_config = SimpleNamespace(clamp_limit=None)
    word = MoEActivation.from_str(activation)
    x = torch.randn(tokens, 32).to(dtype)
    call = {
        "output": torch.full_like(x, float("nan")), "hidden_states": x, "w1": torch.randn(4, 96, 32).to(dtype),
        "w2": torch.randn(4, 32, 48 if word.is_gated else 96).to(dtype), "topk_weights": torch.rand(tokens, 2),
        "topk_ids": drawn(tokens), "activation": word, "global_num_experts": -1, "expert_map": None, "a1q_scale": None,
        "a2_scale": None, "workspace13": None, "workspace2": None, "expert_tokens_meta": None,
        "apply_router_weight_on_input": False,
    }  # fmt: skip
    return experts, call


def wanted(call: dict[str, Any]) -> torch.Tensor:
    """By a loop."""
    out = torch.zeros_like(call["hidden_states"])
    for t, x in enumerate(call["hidden_states"]):
        for weight, e in zip(call["topk_weights"][t], call["topk_ids"][t], strict=True):
            h = call["w1"][e] @ x
            if call["activation"].is_gated:
                gate, up = h.chunk(2)
                h = torch.nn.functional.silu(gate) * up
            else:
                h = torch.relu(h) ** 2
            out[t] += weight * (call["w2"][e] @ h)
    return out


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = triton_moe.TritonExperts.apply
    with using(kernels=True):
        ours.register()
        yield
        ours.unregister()
    assert triton_moe.TritonExperts.apply is before


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("activation", ["silu", "relu2_no_mul"])
def test_a_layer_runs_on_our_kernels(activation: str) -> None:
    experts, call = layer(activation)
    assert experts.apply(**call) is None
    torch.testing.assert_close(call["output"], wanted(call), rtol=1e-4, atol=1e-3)


def test_what_we_cannot_run_is_theirs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    theirs: list[Any] = []
    run = layers.either("vllm", lambda self, **call: theirs.append(call), ours._layer)
    monkeypatch.setattr(triton_moe.TritonExperts, "apply", run)
    logged("vllm", caplog)
    cases = [layer("swigluoai"), layer(), layer(), layer()]
    cases[1][0]._lora_context = object()
    cases[2][1]["w1"] = cases[2][1]["w1"].half()
    cases[3][1]["w2"] = cases[3][1]["w2"][:, :7]
    for experts, call in [*cases, *cases]:
        experts.apply(**call)
        assert call["output"].isnan().all()
    assert len(theirs) == 8
    told = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert [each.partition(":")[0] for each in told] == [
        "activation swigluoai, limit None", "TritonExperts with _lora_context", "w1 of torch.float16 for torch.float32",
        "InvalidInput",
    ]  # fmt: skip


@pytest.mark.usefixtures("_registered")
def test_it_sorts_with_our_kernel() -> None:
    ids = torch.tensor([[0, 3], [3, 1], [2, 3]]).int()
    config = {"BLOCK_SIZE_M": 4}
    rows, experts, used = fused_moe._prepare_expert_assignment(ids, config, 3, 2, 4, None)
    assert int(used) == 16 and experts[:4].tolist() == [0, 1, 2, 3]
    assert rows[:16].reshape(4, 4).tolist() == [[0, 6, 6, 6], [3, 6, 6, 6], [4, 6, 6, 6], [1, 2, 5, 6]]


class Kernel:
    """A layer of fp8 as vLLM runs one: it prepares, its experts multiply, it finishes."""

    def __init__(self, weights: tuple[torch.Tensor, ...], block: int = 128) -> None:
        parallel = SimpleNamespace(dp_size=1, use_ep=False, use_all2all_kernels=False)
        limits = dict.fromkeys(("swiglu_limit", "swiglu_alpha", "swiglu_beta"))
        limits |= dict.fromkeys(("activation_situ_beta", "activation_situ_linear_beta"))
        config: Any = SimpleNamespace(moe_parallel_config=parallel, in_dtype=torch.bfloat16, **limits)
        w1, w2, scale1, scale2 = weights
        quant = fp8_w8a8_moe_quant_config(w1_scale=scale1, w2_scale=scale2, block_shape=[block, block])
        self.weights, self.experts = (w1, w2), triton_moe.TritonExperts(config, quant)
        self.run = modular_kernel.FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), self.experts)

    def __call__(self, x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        experts = len(self.weights[0])
        return self.run.apply(x, *self.weights, router, ids, MoEActivation.SILU, experts, None, False)


@pytest.fixture
def _workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.init_workspace_manager(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)


@pytest.mark.usefixtures("_registered", "_workspaces")
def test_a_layer_of_fp8_with_blocks_of_scales_runs_on_our_kernels() -> None:
    """Against the same layer of the weights that the scales give; its tokens come as they are."""
    weights = fp8()
    x, router, ids = torch.randn(24, 256).bfloat16(), torch.rand(24, 2), drawn(24)
    layer = Kernel(weights)
    want = ours_moe(x, wide(*weights[::2]), wide(*weights[1::2]), router, ids)
    assert apart(layer(x, router, ids), want) < 0.06
    assert layer.experts.expects_unquantized_inputs and layer.experts._moecache is True


def in_the_place(monkeypatch: pytest.MonkeyPatch, work: Callable[..., None]) -> None:
    """Of vLLM's own kernel, which runs on GPUs."""

    def apply(self: Any, **call: Any) -> None:
        work(**call)

    apply.__signature__ = inspect.signature(triton_moe.TritonExperts.apply)  # type: ignore[attr-defined]
    monkeypatch.setattr(triton_moe.TritonExperts, "apply", apply)


@pytest.mark.usefixtures("_workspaces")
@pytest.mark.parametrize("case", ["blocks", "shape", "static", "sent", "lora"])
def test_a_layer_of_fp8_that_we_cannot_run_gets_what_it_had(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logged("vllm", caplog)
    got: list[dict[str, Any]] = []
    in_the_place(monkeypatch, lambda **call: got.append(call))
    for module in (fused_moe_utils, no_dp_ep):
        monkeypatch.setattr(module, "moe_kernel_quantize_input", quantised)
    weights = fp8()
    weights = (*weights[:2], weights[2][:, :1], weights[3]) if case == "shape" else weights
    layer = Kernel(weights, 64 if case == "blocks" else 128)
    if case == "lora":
        layer.experts._lora_context = SimpleNamespace()
    if case == "static":
        monkeypatch.setattr(type(layer.experts), "a1_scale", torch.ones(1))
    layer.experts.moe_config.moe_parallel_config.use_all2all_kernels = case == "sent"
    with using(kernels=True):
        ours.register()
        try:
            for _ in range(2):
                layer(torch.randn(24, 256).bfloat16(), torch.rand(24, 2), drawn(24))
            assert not layer.experts._moecache
        finally:
            ours.unregister()
    assert len(got) == 2 and all(call["hidden_states"].dtype is weights[0].dtype for call in got)
    assert all(call["a1q_scale"] is not None for call in got)
    said = {"blocks": "fp8 with blocks of [64, 64]", "shape": "InvalidInput: quant.w1_scale", "static": "static scales",
            "sent": "tokens are sent quantised", "lora": "TritonExperts with _lora_context"}[case]  # fmt: skip
    assert caplog.text.count("leaves a layer to the engine") == caplog.text.count(said) == 1


def quantised(x: torch.Tensor, *args: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of a kernel that runs on GPUs."""
    return x.to(torch.float8_e4m3fn), torch.ones(len(x), -(-x.shape[1] // 128))


def test_without_the_setting_layers_stay_theirs() -> None:
    with using():
        ours.register()
        assert not hasattr(triton_moe.TritonExperts.apply, "moecache")
        ours.unregister()


# --- its warm-up


@pytest.mark.parametrize("kernels", [True, False])
def test_its_warm_up_measures_what_it_has_run_before(
    kernels: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the place of a worker stands nothing, in that of vLLM's kernel a loop."""
    logged("vllm", caplog)
    came: list[str] = []
    in_the_place(monkeypatch, lambda **call: call["output"].copy_(wanted(call)))
    monkeypatch.setattr(kernel_warmup, "kernel_warmup", lambda worker: came.append(dispatcher().settings.mode))
    monkeypatch.setattr(fused_moe, "fused_experts", by_loop)
    theirs = kernel_warmup.kernel_warmup
    experts, call = layer(tokens=6)
    with using(kernels=kernels, tune=True, tune_budget=20.0) as serving:
        ours.register()
        try:
            experts.apply(**call)  # as vLLM does when it looks how much memory that takes
            torch.testing.assert_close(call["output"], wanted(call), rtol=1e-4, atol=1e-3)
            assert came == []
            for _ in range(2):
                kernel_warmup.kernel_warmup(None)
            rows = serving.lookup.known("fused_moe" if kernels else ours.OP, serving.places.first()).values()
            assert {winner.problem.tokens for winner, _, _ in rows} == {1, 2, 4, 8}
            experts.apply(**call)
            torch.testing.assert_close(call["output"], wanted(call), rtol=1e-4, atol=1e-3)
        finally:
            ours.unregister()
    assert came == ["replay"] * 2 and kernel_warmup.kernel_warmup is theirs
    assert caplog.text.count("has measured choices for") == 1 and "goes on with what it knows" not in caplog.text


def by_loop(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, router: Any, ids: Any, **named: Any) -> torch.Tensor:
    call = {"hidden_states": x, "w1": w1, "w2": w2, "topk_weights": router, "topk_ids": ids}
    return wanted(call | {"activation": named["activation"]})


# --- on a GPU


def on_gpu(tokens: int) -> tuple[torch.Tensor, ...]:
    """A layer of 128 experts, top-8, with skewed routing."""
    torch.manual_seed(0)
    x = torch.randn(tokens, 2048, dtype=torch.bfloat16, device="cuda")
    w1 = torch.randn(128, 2 * 768, 2048, dtype=torch.bfloat16, device="cuda") / 45
    w2 = torch.randn(128, 2048, 768, dtype=torch.bfloat16, device="cuda") / 28
    skewed = torch.arange(1, 129, device="cuda").float() ** -1.2
    ids = torch.multinomial(skewed.expand(tokens, -1), 8).int()
    return x, w1, w2, torch.rand(tokens, 8, device="cuda"), ids


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_wrapped_it_gives_the_same_and_the_plugin_serves_what_was_measured(tokens: int) -> None:
    call = on_gpu(tokens)
    want = fused_moe.fused_experts(*call)
    with using(budget=20.0):
        fast = ours.wrap()
        assert apart(fast(*call), want) < 0.02
        choice = fast.explain(*call).choice
        assert choice.tier == "measured"
        ours.register()
        try:
            row = fused_moe.try_get_optimal_moe_config(call[1].shape, call[2].shape, 8, None, tokens)
            assert row == dict(choice.config.params)
            assert apart(fused_moe.fused_experts(*call), want) < 0.02
        finally:
            ours.unregister()


@pytest.mark.gpu
@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_a_layer_runs_on_our_kernels_also_in_a_graph(tokens: int) -> None:
    x, w1, w2, weights, ids = on_gpu(tokens)
    want = fused_moe.fused_experts(x, w1, w2, weights, ids)
    experts, call = layer()
    call |= {
        "output": torch.empty_like(x),
        "hidden_states": x,
        "w1": w1,
        "w2": w2,
        "topk_weights": weights,
        "topk_ids": ids,
    }
    experts.apply(**call)
    assert apart(call["output"], want) < 0.02
    graph = torch.cuda.CUDAGraph()
    call["output"].zero_()
    with torch.cuda.graph(graph):
        experts.apply(**call)
    graph.replay()
    assert apart(call["output"], want) < 0.02


@pytest.mark.gpu
@pytest.mark.usefixtures("_workspaces")
@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_a_layer_of_fp8_gives_what_their_kernel_gives(tokens: int) -> None:
    torch.manual_seed(0)
    layer, (x, _, _, router, ids) = Kernel(fp8(128, 2048, 768, "cuda")), on_gpu(tokens)
    want = layer(x, router, ids).clone()
    with using(kernels=True):
        ours.register()
        try:
            assert apart(layer(x, router, ids), want) < 0.05 and layer.experts._moecache
        finally:
            ours.unregister()


@pytest.mark.gpu
@pytest.mark.usefixtures("_workspaces")
@pytest.mark.parametrize("kernels", [True, False])
def test_graphs_are_captured_after_its_warm_up(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of fp8, on our kernels and on theirs with measured configs."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernel_warmup, "kernel_warmup", lambda worker: None)
    layer = Kernel(fp8(128, 2048, 768, "cuda"))
    calls = {tokens: (x, router, ids) for tokens in (1, 64, 512) for x, _, _, router, ids in [on_gpu(tokens)]}
    want = {tokens: layer(*call).clone() for tokens, call in calls.items()}
    with using(kernels=kernels, tune=True, tune_budget=90.0, tune_gib=1.0) as serving:
        ours.register()
        try:
            layer(*calls[512])
            kernel_warmup.kernel_warmup(None)
            rows = serving.lookup.known("fused_moe" if kernels else ours.OP, serving.places.first()).values()
            assert {winner.problem.tokens for winner, _, _ in rows} == {1 << k for k in range(10)}
            for tokens, call in calls.items():
                if not kernels:  # ours are compiled for all numbers of tokens, theirs at a first call, as vLLM makes it
                    layer(*call)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = layer(*call)
                graph.replay()
                assert apart(out, want[tokens]) < 0.05
        finally:
            ours.unregister()
