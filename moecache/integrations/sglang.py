"""SGLang: the plugin that serves configs to its Triton kernel, and the kernel as an op."""

import pkgutil
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

from moecache.dispatch import dispatcher
from moecache.integrations import kernel, layers, warming
from moecache.integrations.kernel import Asked, EngineKernel
from moecache.integrations.sglang_tables import MODULE, OP
from moecache.kernels import registry
from moecache.ops import Quant
from moecache.schemas.errors import InvalidInput
from moecache.schemas.flags import installed
from moecache.wrapping import Wrapped

_UTILS = "sglang.srt.layers.moe.moe_runner.triton_utils"
_TARGET = f"{MODULE}.try_get_optimal_moe_config"
_LAYER = f"{_UTILS}.fused_moe.fused_experts"
_RUNNER = "sglang.srt.model_executor.runner.base_runner.BaseRunner"
_WARMUP = f"{_RUNNER}._warmup"
_FP8 = {"use_fp8_w8a8", "w1_scale", "w2_scale", "block_shape"}  # what a layer of fp8 with blocks of scales gives
_KERNELS = "sglang.kernels.ops.moe.fused_moe_triton_kernels"
_HOOKS = "sglang.srt.plugins.hook_registry"


def register() -> None:
    """The plugin, which SGLang calls in each of its processes. See docs/sglang.md."""
    kernel.quietly("sglang", _install)


def _install() -> str:
    hooks = import_module(_HOOKS)
    if any(hook is _chosen for _, hook, *_ in hooks.HookRegistry._hooks.get(_TARGET, ())):
        return ""
    _chooser(import_module(MODULE).try_get_optimal_moe_config)  # raises where it is not as we know it
    hooks.HookRegistry.register(_TARGET, _chosen, hooks.HookType.AROUND)
    active, done = dispatcher(), f"serves configs to the Triton kernel of SGLang {installed('sglang')}"
    if active.settings.kernels:
        done += ", and runs its own in the place of it"
    if active.settings.kernels or active.settings.tune:
        hooks.HookRegistry.register(_LAYER, _either, hooks.HookType.AROUND)
        done += warming.begin("SGLang", active, _hook_warmup)
    return done


def _hook_warmup() -> None:
    hooks, runner = import_module(_HOOKS), pkgutil.resolve_name(_RUNNER)
    if missing := [name for name in ("_warmup", "_dummy_run", "_autotune_buffers") if not hasattr(runner, name)]:
        raise InvalidInput(f"BaseRunner has no {', '.join(missing)}")
    hooks.HookRegistry.register(_WARMUP, _warmed, hooks.HookType.AROUND)


def _warmed(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    first = not getattr(runner.model_runner, "_kernel_warmed_up", False)
    done = original(runner, *args, **kwargs)
    if first:
        state = import_module("sglang.srt.distributed.parallel_state")
        warming.warm("sglang", lambda: state.get_world_group().cpu_group, partial(_show, runner))
    return done


def _show(runner: Any) -> int:
    """A dry run of the largest decode batch; tokens of the largest prefill."""
    buffers, size = runner._autotune_buffers()
    with torch.no_grad():
        runner._dummy_run(batch_size=size, buffers=buffers)
    return int(import_module("sglang.srt.runtime_context").max_prefill_buffer_tokens())


def _either(original: Any, *args: Any, **kwargs: Any) -> Any:
    return _layers(original, dispatcher().settings.kernels)(*args, **kwargs)


@cache
def _layers(original: Any, kernels: bool) -> Any:
    return layers.either("sglang", original, _layer if kernels else lambda *_, **__: "", _saw)


def _layer(
    hidden_states: Any,
    w1: Any,
    w2: Any,
    topk_output: Any,
    moe_runner_config: Any,
    b1: Any = None,
    b2: Any = None,
    **rest: Any,
) -> Any:
    """A layer of `fused_experts`, or why not."""
    config, (weights, ids, *_) = moe_runner_config, topk_output
    named = {name: value for name, value in rest.items() if value is not None and value is not False}
    blocks = named.keys() == _FP8 and list(named["block_shape"]) == [128, 128]
    if not blocks and (hidden_states.dtype is not w1.dtype or named):
        return f"w1 of {w1.dtype} for {hidden_states.dtype}, with {', '.join(named) or 'nothing'}"
    limits = [getattr(config, name, None) for name in ("gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit")]
    if config.activation not in layers.SAME or config.no_combine or any(limit is not None for limit in limits):
        return f"activation {config.activation}, limits {limits}, no_combine={config.no_combine}"
    factor, on_input = config.routed_scaling_factor, config.apply_router_weight_on_input
    if on_input and factor not in (None, 1.0):  # it is of the sum, and so cannot go with weights of the input
        return f"routed_scaling_factor={factor} with apply_router_weight_on_input"
    if _fixed():
        return "deterministic inference"
    return layers.fused(
        hidden_states, w1, w2, weights if factor is None else weights * factor, ids, activation=config.activation,
        gated=config.is_gated, w1_bias=b1, w2_bias=b2, on_input=on_input,
        quant=Quant("fp8_block", named["w1_scale"], named["w2_scale"]) if blocks else None, layer=config.layer_id or 0,
    )  # fmt: skip


def _saw(
    hidden_states: Any, w1: Any, w2: Any, topk_output: Any, moe_runner_config: Any, *rest: Any, **named: Any
) -> None:
    """Note a layer that SGLang's own kernel runs, one whose config depends on formats that its table names."""
    op: Any = registry.get(OP)
    if rest or any(named.get(name) is not None for name in ("a1_q", "a1_scale", "w1_zp", "w2_zp")):
        return
    router, ids = topk_output[0].dtype, topk_output[1].dtype
    config = replace(moe_runner_config, inplace=False)

    def call(x: Any, weights: Any, chosen: Any) -> Any:
        return (x, w1, w2, (weights.to(router), chosen.to(ids), None), config), named

    problem = op.problem(
        _key(hidden_states, w1, w2, topk_output, config, **named), dispatcher().places.of_tensor(w1).device
    )
    warming.saw(problem, w1, (hidden_states.dtype, call))


def _chosen(original: kernel.Chooses, *args: Any, **kwargs: Any) -> Any:
    return _chooser(original)(*args, **kwargs)


@cache
def _chooser(original: kernel.Chooses) -> kernel.Chooses:
    return kernel.chooser(original, _op(original), import_module(_UTILS).get_config, _fixed, wide="return_down_config")


@cache
def _fixed() -> bool:
    """Whether results must not depend on the config, in this process, as its server was told."""
    return bool(import_module("sglang.srt.runtime_context").get_exec().deterministic.enable_deterministic_inference)


def _op(chooses: kernel.Chooses) -> EngineKernel:
    layer, text = import_module(_UTILS).fused_experts, import_module(_KERNELS).fused_moe_kernel
    return kernel.op(OP, layer, _UTILS, text, chooses)


def wrap() -> Wrapped[Any]:
    """`fused_experts` with a config that is measured at the first call of a size, in mode tune."""
    chooses = import_module(MODULE).try_get_optimal_moe_config
    return Wrapped(_op(getattr(chooses, "__wrapped__", chooses)), _key)


def _key(
    hidden_states: Any, w1: Any, w2: Any, topk_output: Any, moe_runner_config: Any, *rest: Any, **kwargs: Any
) -> dict[str, Any]:
    if rest:
        raise InvalidInput("give all but the first five arguments of fused_experts by name")
    flags = {
        name: kwargs.get(name, False) for name in ("use_int8_w8a16", "use_int4_w4a16", "use_fp8_w8a8", "use_int8_w8a8")
    }
    word = import_module(MODULE).get_config_dtype_str(hidden_states.dtype, **flags)
    formats = kwargs.get("block_shape"), bool(kwargs.get("per_channel_quant"))
    return Asked(w1.shape, w2.shape, topk_output[1].shape[1], word, hidden_states.shape[0], *formats).dims()
