"""A package with the seams of vLLM: it chooses configs, forces them, and multiplies with the one that it chose."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from moecache.kernels import registry

PACKAGE = """
from contextlib import contextmanager
_config = None
@contextmanager
def override_config(config):
    global _config
    old_config = _config
    _config = config
    yield
    _config = old_config
def get_config():
    return _config
"""
MODULE = '''
import torch
import vllm.model_executor.layers.fused_moe as package
used = []
def fused_moe_kernel(tile):
    return tile
def get_moe_configs(E, N, dtype, block_n=None, block_k=None):
    return None
def try_get_optimal_moe_config(w1_shape, w2_shape, top_k, dtype, M, {extra}block_shape=None):
    if package.get_config():
        return package.get_config()
    return {{"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "SPLIT_K": 1}}
def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, activation="silu", quant_config=None):
    """Runs a layer."""
    config = try_get_optimal_moe_config(w1.shape, w2.shape, topk_ids.shape[1], None, len(hidden_states))
    used.append(config)
    if activation == "raise":
        raise RuntimeError("out of memory, for example")
    torch.cat([rows @ w2[0] for rows in hidden_states.split(config["BLOCK_SIZE_M"])])
    return hidden_states + 1
'''
USER = "from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config as chooses\n"


@contextmanager
def engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, extra: str = "", module: str = MODULE
) -> Iterator[ModuleType]:
    """The package `vllm`, gone afterwards; `extra` stands before the last parameter of its choosing function."""
    monkeypatch.setattr(registry, "_wrapped", {})  # no other test finds its op
    files = {
        "vllm": "", "vllm.envs": "VLLM_BATCH_INVARIANT = False\n", "vllm.model_executor": "", "vllm.user": USER,
        "vllm.model_executor.layers": "", "vllm.model_executor.layers.fused_moe": PACKAGE,
        "vllm.model_executor.layers.fused_moe.fused_moe": module.format(extra=extra),
    }  # fmt: skip
    for name, text in files.items():
        parents = {other.rpartition(".")[0] for other in files}
        path = folder.joinpath(*name.split("."))
        file = path / "__init__.py" if name in parents else path.with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    try:
        importlib.import_module("vllm.user")
        importlib.import_module("vllm.envs")
        yield importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
    finally:
        for name in files:
            sys.modules.pop(name, None)
