"""The tables of vLLM's Triton kernel."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from moecache.integrations import tables
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing

OP = "vllm.fused_experts"
MODULE = "vllm.model_executor.layers.fused_moe.fused_moe"


def path(folder: Path, problem: Problem, there: Environment) -> Path:
    """Where it looks for a table, with VLLM_TUNED_CONFIG_FOLDER=folder."""
    device = re.sub(r"[\s/]+", "_", there.device_name)
    device = "NVIDIA_H200" if "H200" in device.split("_") else device
    return folder / tables.file_name(problem, device)


def head(triton: str) -> dict[str, str]:
    """What a table says beside its rows; vLLM leaves it out when it reads one."""
    return {"triton_version": triton}


def default(tokens: int, of: Problem) -> dict[str, Any]:
    """What it takes without a table.

    Raises:
        ImportError: it is not installed.
    """
    sizes = tokens, of.experts, of.dim("intermediate"), of.dim("hidden"), of.topk
    return dict(import_module(MODULE).get_default_config(*sizes, of.dtype or None, tables.block(of)))


def beside(folder: Path) -> None:
    """Nothing: it reads its own tables as well."""


def seeds(path: Path | None) -> tuple[list[Timing], int]:
    """What its tables name, and how many tables or rows are of unknown devices or configs."""
    return tables.seeds(OP, "vllm", path, "model_executor/layers/fused_moe/configs")
