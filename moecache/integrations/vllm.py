"""vLLM: the tables of its Triton kernel, the plugin that serves it configs, and the kernel as an op."""

import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from moecache.dispatch import dispatcher
from moecache.integrations import kernel, layers, tables
from moecache.integrations.kernel import EngineKernel
from moecache.integrations.tables import Key
from moecache.ops import fused_moe, moe_align_block_size
from moecache.schemas.errors import InvalidInput
from moecache.schemas.flags import installed
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Timing
from moecache.wrapping import Wrapped

OP = "vllm.fused_experts"
_PACKAGE = "vllm.model_executor.layers.fused_moe"
_MODULE, _EXPERTS = f"{_PACKAGE}.fused_moe", f"{_PACKAGE}.experts.triton_moe"
_APPLY = (
    "self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts",
    "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta",
    "apply_router_weight_on_input",
)  # fmt: skip


def path(folder: Path, key: Key, triton: str) -> Path:
    """Where it looks for a table, with VLLM_TUNED_CONFIG_FOLDER=folder."""
    device = re.sub(r"[\s/]+", "_", key.device)
    device = "NVIDIA_H200" if "H200" in device.split("_") else device
    return folder / tables.file_name(key, device)


def head(triton: str) -> dict[str, str]:
    """What a table says beside its rows; vLLM leaves it out when it reads one."""
    return {"triton_version": triton}


def default(tokens: int, key: Key, hidden: int, topk: int) -> Mapping[str, Any]:
    """What it takes without a table.

    Raises:
        ImportError: it is not installed.
    """
    block = [key.block_n, key.block_k] if key.block_n else None
    chosen = import_module(_MODULE).get_default_config
    found: Mapping[str, Any] = chosen(tokens, key.experts, key.intermediate, hidden, topk, key.dtype or None, block)
    return found


def beside(folder: Path) -> None:
    """Nothing: it reads its own tables as well."""


def seeds(path: Path | None) -> tuple[list[Timing], int]:
    """What its tables name, and how many of them are of unknown devices."""
    files, source = tables.found("vllm", path, "model_executor/layers/fused_moe/configs", "E=*.json")
    return tables.seeds(OP, source, files)


def register() -> None:
    """The plugin, which vLLM calls in each of its processes. See docs/vllm.md."""
    kernel.quietly("vllm", _install)


def unregister() -> None:
    """Leave vLLM as it was."""
    chooses = import_module(_MODULE).try_get_optimal_moe_config
    if hasattr(chooses, "moecache"):
        kernel.rebound(chooses, chooses.__wrapped__)
    experts = getattr(sys.modules.get(_EXPERTS), "TritonExperts", None)
    if experts is not None and hasattr(experts.apply, "moecache"):
        experts.apply = experts.apply.__wrapped__
        sorts = import_module(_MODULE).moe_align_block_size
        kernel.rebound(sorts, sorts.__wrapped__)


def _install() -> str:
    module = import_module(_MODULE)
    original = module.try_get_optimal_moe_config
    if hasattr(original, "moecache"):
        return ""
    choose = kernel.chooser(original, _op(module, original), import_module(_PACKAGE).get_config, _fixed)
    done = f"serves configs to the Triton kernel of vLLM {installed('vllm')}"
    if dispatcher().settings.kernels:
        experts = import_module(_EXPERTS).TritonExperts
        if tuple(signature(experts.apply).parameters) != _APPLY:
            raise InvalidInput(f"TritonExperts.apply{signature(experts.apply)} is not known")
        experts.apply = layers.either("vllm", experts.apply, _layer)
        theirs = module.moe_align_block_size
        kernel.rebound(theirs, layers.either("vllm", theirs, moe_align_block_size))
        done += ", and runs its own in the place of it"
    kernel.rebound(original, choose)
    return done


def _layer(
    self: Any, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, activation: Any,
    global_num_experts: int, expert_map: Any, a1q_scale: Any, a2_scale: Any, workspace13: Any, workspace2: Any,
    expert_tokens_meta: Any, apply_router_weight_on_input: bool,
) -> str | None:  # fmt: skip
    """A layer of TritonExperts into `output`, or why not; its workspaces are not needed."""
    word = str(activation.value)
    bare = word.removesuffix("_no_mul")
    limited = getattr(self, "activation_config", self.quant_config)  # what newer versions ask
    limit = getattr(limited, "clamp_limit", None) or getattr(self.quant_config, "gemm1_clamp_limit", None)
    hooks = [name for name in ("_lora_context", "post_gemm2_hook") if getattr(self, name, None) is not None]
    if type(self) is not import_module(_EXPERTS).TritonExperts or hooks:
        return f"{type(self).__name__} with {', '.join(hooks) or 'nothing'}"
    if hidden_states.dtype is not w1.dtype:
        return f"w1 of {w1.dtype} for {hidden_states.dtype}"
    if bare not in layers.SAME or limit is not None:
        return f"activation {word}, limit {limit}"
    if _fixed():
        return "VLLM_BATCH_INVARIANT"
    fused_moe(
        hidden_states, w1, w2, topk_weights, topk_ids, activation=bare, gated=bare == word, w1_bias=self.w1_bias,
        w2_bias=self.w2_bias, apply_router_weight_on_input=apply_router_weight_on_input, expert_map=expert_map,
        out=output, layer=id(self),
    )  # fmt: skip
    return None


@cache
def _fixed() -> bool:
    """Whether results must not depend on the number of tokens, in this process."""
    return bool(import_module("vllm.envs").VLLM_BATCH_INVARIANT)


def _op(module: Any, chooses: kernel.Chooses) -> EngineKernel:
    def theirs(problem: Problem) -> Mapping[str, Any]:
        found: Mapping[str, Any] = chooses(*kernel.shapes(problem), block_shape=kernel.block(problem))
        return found

    return kernel.op(OP, module.fused_experts, _PACKAGE, module.fused_moe_kernel, theirs)


def wrap() -> Wrapped[Any]:
    """`fused_experts` with a config that is measured at the first call of a size, in mode tune. The first five
    arguments may be given by place; all others by name, as their places differ between versions."""
    module = import_module(_MODULE)
    chooses = module.try_get_optimal_moe_config
    return Wrapped(_op(module, getattr(chooses, "__wrapped__", chooses)), _key)


def _key(
    hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, *, quant_config: Any = None, **rest: Any
) -> dict[str, Any]:
    plain = "float32" if hidden_states.dtype is torch.float32 else ""
    word = quant_config.config_name(hidden_states.dtype) if quant_config else plain
    block_n, block_k = (quant_config and quant_config.block_shape) or (0, 0)
    key = Key(w2.shape[0], w2.shape[2], "", word or "", block_n, block_k)
    return tables.dims(key, hidden_states.shape[0], w1.shape[2], topk_ids.shape[1])
