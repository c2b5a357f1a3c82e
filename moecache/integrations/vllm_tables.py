"""The tables of vLLM's Triton kernel."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from moecache.integrations import tables
from moecache.integrations.tables import Key
from moecache.schemas.timing import Timing

OP = "vllm.fused_experts"
MODULE = "vllm.model_executor.layers.fused_moe.fused_moe"


def path(folder: Path, key: Key, triton: str) -> Path:
    """Where it looks for a table, with VLLM_TUNED_CONFIG_FOLDER=folder."""
    device = re.sub(r"[\s/]+", "_", key.device)
    device = "NVIDIA_H200" if "H200" in device.split("_") else device
    return folder / tables.file_name(key, device)


def head(triton: str) -> dict[str, str]:
    """What a table says beside its rows; vLLM leaves it out when it reads one."""
    return {"triton_version": triton}


def default(tokens: int, key: Key, hidden: int, topk: int) -> dict[str, Any]:
    """What it takes without a table.

    Raises:
        ImportError: it is not installed.
    """
    sizes, chosen = (tokens, key.experts, key.intermediate, hidden, topk), import_module(MODULE).get_default_config
    return dict(chosen(*sizes, key.dtype or None, key.block))


def beside(folder: Path) -> None:
    """Nothing: it reads its own tables as well."""


def seeds(path: Path | None) -> tuple[list[Timing], int]:
    """What its tables name, and how many of them are of unknown devices."""
    return tables.seeds(OP, "vllm", path, "model_executor/layers/fused_moe/configs")
