"""vLLM: the plugin that serves configs to its Triton kernel, and the kernel as an op."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial, wraps
from importlib import import_module
from inspect import signature
from typing import Any

import torch

from moecache.dispatch import dispatcher
from moecache.integrations import kernel, layers, warming
from moecache.integrations.kernel import Asked, EngineKernel
from moecache.integrations.vllm_tables import MODULE, OP
from moecache.kernels import registry
from moecache.ops import Quant, moe_align_block_size
from moecache.schemas.errors import InvalidInput
from moecache.schemas.flags import installed
from moecache.wrapping import Wrapped

_PACKAGE = "vllm.model_executor.layers.fused_moe"
_EXPERTS = f"{_PACKAGE}.experts.triton_moe"
_WARMUP = "vllm.model_executor.warmup.kernel_warmup"
_ASKS = "expects_unquantized_inputs"  # of experts: whether they get tokens as they are, and quantise those themselves
_APPLY = (
    "self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts",
    "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta",
    "apply_router_weight_on_input",
)  # fmt: skip


_FORMATS = ("float32", "fp8_w8a8")  # beside those of 16 bits: what is measured in a warm-up


def register() -> None:
    """The plugin, which vLLM calls in each of its processes. See docs/vllm.md."""
    kernel.quietly("vllm", _install)


_undo = ExitStack()


def unregister() -> None:
    """Leave vLLM as it was."""
    _undo.close()


def _rebound(old: Any, new: Any) -> None:
    kernel.rebound(old, new)
    _undo.callback(kernel.rebound, new, old)


def _install() -> str:
    module = import_module(MODULE)
    original = module.try_get_optimal_moe_config
    if hasattr(original, "moecache"):
        return ""
    _undo.pop_all()
    active = dispatcher()
    kernels = active.settings.kernels
    choose = kernel.chooser(original, _op(module, original), import_module(_PACKAGE).get_config, _fixed)
    done = f"serves configs to the Triton kernel of vLLM {installed('vllm')}"
    if kernels or active.settings.tune:
        experts = import_module(_EXPERTS).TritonExperts
        if tuple(signature(experts.apply).parameters) != _APPLY:
            raise InvalidInput(f"TritonExperts.apply{signature(experts.apply)} is not known")
        align, theirs, asks = module.moe_align_block_size, experts.apply, experts.__dict__.get(_ASKS)
        experts.apply = layers.either("vllm", _quantised(theirs), _layer if kernels else lambda *_, **__: "", _saw)
        _undo.callback(setattr, experts, "apply", theirs)
        if kernels:
            setattr(experts, _ASKS, property(partial(_unquantised, getattr(experts, _ASKS, None))))
            _undo.callback(setattr, experts, _ASKS, asks) if asks else _undo.callback(delattr, experts, _ASKS)
            _rebound(align, layers.either("vllm", align, moe_align_block_size))
            done += ", and runs its own in the place of it"
        done += warming.begin("vLLM", active, _hook_warmup)
    _rebound(original, choose)
    return done


def _hook_warmup() -> None:
    theirs = import_module(_WARMUP).kernel_warmup
    if next(iter(signature(theirs).parameters), "") != "worker":
        raise InvalidInput(f"kernel_warmup{signature(theirs)} is not known")

    @wraps(theirs)
    def warm(worker: Any, *args: Any, **kwargs: Any) -> Any:
        warming.warm("vllm", lambda: import_module("vllm.distributed").get_world_group().cpu_group)
        return theirs(worker, *args, **kwargs)

    _rebound(theirs, warm)


def _unquantised(theirs: Any, self: Any) -> bool:
    """Whether experts get tokens as they are: those that we run, which quantise them on the way, do."""
    if "_moecache" not in self.__dict__:
        self._moecache = self.quant_config.use_fp8_w8a8 and not (_another(self) or _why_not_fp8(self))
    return bool(self._moecache or (theirs and theirs.fget(self)))


def _quantised(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`apply`, for tokens that came as they are, for us, in a layer that we do not run after all."""

    @wraps(theirs)
    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__.get("_moecache"):
            self._moecache = dispatcher().settings.strict  # which refuses a size, not the layer
            named = dict(zip(_APPLY[1:], args, strict=False)) | kwargs
            if named["hidden_states"].dtype is not named["w1"].dtype:
                quantise = import_module(f"{_PACKAGE}.utils").moe_kernel_quantize_input
                how = self.a1_scale, self.quant_dtype, self.per_act_token_quant, self.block_shape
                named["hidden_states"], named["a1q_scale"] = quantise(named["hidden_states"], *how)
            return theirs(self, **named)
        return theirs(self, *args, **kwargs)

    return apply


def _why_not_fp8(self: Any) -> str:
    """Why we cannot run experts with weights of fp8; '' for those with blocks of scales."""
    blocks, scales = self.block_shape and list(self.block_shape), (self.w1_scale, self.w2_scale)
    if blocks != [128, 128]:
        return f"fp8 with blocks of {blocks}"
    if not all(isinstance(scale, torch.Tensor) and scale.dtype is torch.float32 for scale in scales):
        return f"scales of {[getattr(scale, 'dtype', None) for scale in scales]}"
    if self.a1_scale is not None or self.a2_scale is not None or self.quantization_emulation:
        return "static scales of tokens, or emulation"
    return "tokens are sent quantised" if self.moe_config.moe_parallel_config.use_all2all_kernels else ""


def _layer(
    self: Any, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, activation: Any,
    global_num_experts: int, expert_map: Any, a1q_scale: Any, a2_scale: Any, workspace13: Any, workspace2: Any,
    expert_tokens_meta: Any, apply_router_weight_on_input: bool,
) -> str | None:  # fmt: skip
    """A layer of TritonExperts into `output`, or why not; its workspaces are not needed."""
    word, quant = str(activation.value), None
    bare = word.removesuffix("_no_mul")
    limited = getattr(self, "activation_config", self.quant_config)  # what newer versions ask
    limit = getattr(limited, "clamp_limit", None) or getattr(self.quant_config, "gemm1_clamp_limit", None)
    if why := _another(self):
        return why
    if self.quant_config.use_fp8_w8a8:
        if why := _why_not_fp8(self):
            return why
        if hidden_states.dtype is w1.dtype:
            return "" if self.__dict__.get("_moecache") is False else "tokens came quantised"  # '': that was said
        quant = Quant("fp8_block", self.w1_scale, self.w2_scale)
    elif self.quant_config.quant_dtype is not None or hidden_states.dtype is not w1.dtype:
        return f"w1 of {w1.dtype} for {hidden_states.dtype}"
    if bare not in layers.SAME or limit is not None:
        return f"activation {word}, limit {limit}"
    if _fixed():
        return "VLLM_BATCH_INVARIANT"
    layers.fused(
        hidden_states, w1, w2, topk_weights, topk_ids, activation=bare, gated=bare == word, w1_bias=self.w1_bias,
        w2_bias=self.w2_bias, on_input=apply_router_weight_on_input, expert_map=expert_map, quant=quant, out=output,
        layer=id(self),
    )  # fmt: skip
    return None


def _another(self: Any) -> str:
    """What makes experts compute something else than a plain layer."""
    hooks = [name for name in ("_lora_context", "post_gemm2_hook") if getattr(self, name, None) is not None]
    plain = type(self) is import_module(_EXPERTS).TritonExperts and not hooks
    return "" if plain else f"{type(self).__name__} with {', '.join(hooks) or 'nothing'}"


def _saw(
    self: Any, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, activation: Any,
    global_num_experts: int, expert_map: Any, *rest: Any, **named: Any,
) -> None:  # fmt: skip
    """Note a layer that vLLM's own kernel runs. Its config depends on formats that its table names, and no map."""
    config = self.quant_config
    if _another(self) or expert_map is not None or config.config_name(output.dtype) not in (None, *_FORMATS):
        return
    op: Any = registry.get(OP)
    how, router, ids = {"activation": activation, "quant_config": config}, topk_weights.dtype, topk_ids.dtype

    def call(x: Any, weights: Any, chosen: Any) -> Any:
        return (x, w1, w2, weights.to(router), chosen.to(ids)), how

    dims = _key(output, w1, w2, topk_weights, topk_ids, quant_config=config)
    problem = op.problem(dims, dispatcher().places.of_tensor(w1).device)
    warming.saw(problem, w1, (output.dtype, call))


@cache
def _fixed() -> bool:
    """Whether results must not depend on the number of tokens, in this process."""
    return bool(import_module("vllm.envs").VLLM_BATCH_INVARIANT)


def _op(module: Any, chooses: kernel.Chooses) -> EngineKernel:
    return kernel.op(OP, module.fused_experts, _PACKAGE, module.fused_moe_kernel, chooses)


def wrap() -> Wrapped[Any]:
    """`fused_experts` with a config that is measured at the first call of a size, in mode tune. The first five
    arguments may be given by place; all others by name, as their places differ between versions."""
    module = import_module(MODULE)
    chooses = module.try_get_optimal_moe_config
    return Wrapped(_op(module, getattr(chooses, "__wrapped__", chooses)), _key)


def _key(
    hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, *, quant_config: Any = None, **rest: Any
) -> dict[str, Any]:
    plain = "float32" if hidden_states.dtype is torch.float32 else ""
    word = quant_config.config_name(hidden_states.dtype) if quant_config else plain
    block = quant_config and quant_config.block_shape
    return Asked(w1.shape, w2.shape, topk_ids.shape[1], word, hidden_states.shape[0], block).dims()
