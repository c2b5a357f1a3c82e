"""The tables of SGLang's Triton kernel."""

import re
import shutil
from importlib import import_module
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

from moecache.integrations import tables
from moecache.schemas.flags import installed
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing

OP = "sglang.fused_experts"
MODULE = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config"
_FOLDER = "srt/layers/moe"  # its tables have moved within it


def path(folder: Path, problem: Problem, there: Environment) -> Path:
    """Where it looks for a table, with SGLANG_MOE_CONFIG_DIR=folder. It reads the version as whole numbers."""
    version = re.match(r"\d+(\.\d+)*", there.triton)
    name = tables.file_name(problem, there.device_name.replace(" ", "_"), space=" ")
    return folder / "configs" / f"triton_{version[0].replace('.', '_') if version else 0}" / name


def head(triton: str) -> dict[str, str]:
    """Nothing: it takes every name in a table for a number of tokens."""
    return {}


def default(tokens: int, of: Problem) -> dict[str, Any]:
    """What it takes without a table.

    Raises:
        ImportError: it is not installed.
    """
    chosen = import_module(MODULE).get_default_config
    # it asks a running server whether results must not depend on the config; here is none
    chosen = FunctionType(chosen.__code__, {**chosen.__globals__, "get_exec": _no_server}, argdefs=chosen.__defaults__)
    sizes = tokens, of.experts, of.dim("intermediate"), of.dim("hidden"), of.topk
    return dict(chosen(*sizes, of.dtype or None, False, tables.block(of)))


def _no_server() -> Any:
    return SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))


def beside(folder: Path) -> None:
    """Its own tables, as it reads this folder in the place of them."""
    if installed("sglang"):
        for configs in (tables.package_folder("sglang") / _FOLDER).rglob("configs"):
            shutil.copytree(configs, folder / "configs", dirs_exist_ok=True)


def seeds(path: Path | None) -> tuple[list[Timing], int]:
    """What its tables name, and how many tables or rows are of unknown devices or configs."""
    return tables.seeds(OP, "sglang", path, _FOLDER)
